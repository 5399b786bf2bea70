"""Log-probabilities of continuations are Hugging Face's, on every layout, and so is what a task makes of them."""

from __future__ import annotations

import json
import shutil
from math import inf, isnan, nan
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from minitron_nemo.config import recipe_of
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.scoring import Continuation
from minitron_nemo.evaluation.task import Record, record_of
from minitron_nemo.evaluation.tasks import FILE_NAME, measure_tasks, open_tasks, read_tasks, table
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.steps import fingerprint_of
from tests.evaluation.support import LAYOUTS, QUESTIONS, opened
from tests.models.support import TinyModel, huggingface_model
from tests.pool import run_distributed

MOST = 512  # what the tiny model takes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("scored"))


def _pairs(tiny: TinyModel) -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations of several lengths: one is what the model itself says, one is far too long."""
    generator = torch.Generator().manual_seed(5)
    sizes = ((7, 3), (1, 1), (30, 2), (12, 9), (MOST + 40, 20))
    pairs = [
        (
            torch.randint(256, (context,), generator=generator).tolist(),
            torch.randint(256, (scored,), generator=generator).tolist(),
        )
        for context, scored in sizes
    ]
    model, row = huggingface_model(tiny.huggingface, torch.float32), list(pairs[0][0])
    with torch.no_grad():
        for _ in range(3):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return [*pairs, (row[:7], row[7:])]


def _expected(tiny: TinyModel, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """One sequence after the other, in fp64; of a long one the model sees its last 512 tokens before the last."""
    model = huggingface_model(tiny.huggingface, torch.float64)
    found = []
    for context, continuation in pairs:
        seen = torch.tensor([(context + continuation)[:-1][-MOST:]])
        with torch.no_grad():
            logits = model(seen).logits[0, -len(continuation) :]
        labels = torch.tensor(continuation)
        log_p = logits.log_softmax(-1).gather(-1, labels[:, None])
        found.append((float(log_p.sum()), bool((logits.argmax(-1) == labels).all())))
    return found


def _scores(directory: Path, layout: Layout, pairs: Any, micro_batch_size: int) -> tuple[list[tuple[float, bool]], int]:
    from minitron_nemo.evaluation.scoring import log_likelihoods

    done: list[int] = []
    requests = [Continuation.of(context, continuation, MOST) for context, continuation in pairs]
    return log_likelihoods(opened(directory, layout), requests, micro_batch_size, done.append), sum(done)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.fast_cases(1)
def test_log_likelihoods_equal_hugging_face(tiny: TinyModel, name: str) -> None:
    world_size, layout = LAYOUTS[name]
    pairs = _pairs(tiny)
    expected = _expected(tiny, pairs)
    assert [greedy for _, greedy in expected].count(True) == 1
    for found, done in run_distributed(world_size, _scores, tiny.megatron, layout, pairs, 2):
        np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=1e-4, rtol=0)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert done == len(pairs)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * (MOST + 1))])
def test_what_cannot_be_scored_is_refused(pair: tuple[list[int], list[int]]) -> None:
    with pytest.raises(UserError, match=r"a context of \d+ tokens and a continuation of \d+: .*; change the task"):
        Continuation.of(*pair, MOST)


def _measured(models: dict[str, Path], specs: list[str], layout: Layout, path: Path, precision: str = "fp32") -> Any:
    return measure_tasks(models, specs, layout, path, precision=precision, micro_batch_size=2)


def _accuracies(tiny: TinyModel) -> dict[str, list[bool]]:
    """Of the questions, from Hugging Face's logits; the tiny model's tokens are bytes."""
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for question in questions:
        pairs = [(list(question["context"].encode()), list(choice.encode())) for choice in question["choices"]]
        values = np.array([value for value, _ in _expected(tiny, _in_byte_order(pairs))])
        lengths = [len(choice) - 1 for choice in question["choices"]]  # without the space
        right["acc"].append(bool(values.argmax() == question["answer"]))
        right["acc_norm"].append(bool((values / lengths).argmax() == question["answer"]))
    return right


def _in_byte_order(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Ids of bytes in the tiny tokenizer: its letters are sorted, and printable ones come first."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    place = {ord(letter): index for index, letter in enumerate(letters)} | {ord(" "): letters.index("Ġ")}
    return [([place[byte] for byte in context], [place[byte] for byte in choice]) for context, choice in pairs]


@pytest.mark.slow
def test_a_task_of_questions_is_what_hugging_face_answers_and_is_not_measured_twice(
    tiny: TinyModel, tmp_path: Path
) -> None:
    path, models = tmp_path / "results" / FILE_NAME, {"pruned": tiny.megatron}
    right = _accuracies(tiny)
    first, other = run_distributed(2, _measured, models, [str(QUESTIONS)], Layout(), path)
    assert first == other == read_tasks(path)
    record = first["pruned"]["tasks"]["opposites"]
    assert record["questions"] == 20 and record["by_question"] == right
    assert {type(value) for value in record["by_question"]["acc"]} == {float}  # which can be subtracted
    for metric, answers in right.items():
        assert record["metrics"][metric]["value"] == pytest.approx(np.mean(answers))
        assert record["metrics"][metric]["se"] == pytest.approx(np.std(answers, ddof=1) / 20**0.5)
    assert f"{np.mean(right['acc']):.4f} ± " in table(first).splitlines()[2]

    marked = json.loads(path.read_text())
    marked["models"]["pruned"]["tasks"]["opposites"]["questions"] = 7
    path.write_text(json.dumps(marked))
    again = run_distributed(1, _measured, {"student": tiny.megatron}, [str(QUESTIONS)], Layout(), path)[0]
    assert again["student"]["tasks"]["opposites"]["questions"] == 7  # the same model, under another name
    anew = run_distributed(1, _measured, models, [str(QUESTIONS)], Layout(), path, "bf16")[0]
    assert anew["pruned"]["tasks"]["opposites"]["questions"] == 20


class Unbounded:
    """A task on which a model has an infinite perplexity, as lm-evaluation-harness may well find."""

    name = fingerprint = "unbounded"

    def measure(self, *_: Any) -> Record:
        return record_of(2, {"perplexity": (inf, nan), "bits": (inf, 0.5)}, {"bits": [inf, 1.0]})


def _measured_unbounded(models: dict[str, Path], path: Path) -> Any:
    with patch("minitron_nemo.evaluation.tasks.open_tasks", lambda specs: [Unbounded()]):
        return _measured(models, ["unbounded"], Layout(), path)


def test_a_model_of_the_same_weights_with_another_configuration_or_tokenizer_is_another_one(
    tiny: TinyModel, tmp_path: Path
) -> None:
    path, models = tmp_path / FILE_NAME, {"same": tiny.megatron}
    run_distributed(1, _measured_unbounded, models, path)
    path.write_text(path.read_text().replace('"questions": 2', '"questions": 7'))
    for file, change in (
        ("architecture.json", {"rotary_base": 5e5}),
        ("tokenizer/tokenizer_config.json", {"chat_template": "{{ messages }}"}),
    ):
        models[file] = shutil.copytree(tiny.megatron, tmp_path / file)
        content = json.loads((models[file] / file).read_text())
        (models[file] / file).write_text(json.dumps(content | change))
    [found] = run_distributed(1, _measured_unbounded, models, path)
    assert [model["tasks"]["unbounded"]["questions"] for model in found.values()] == [7, 2, 2]
    # What the manifest has of it, by which the report knows outdated figures.
    assert found["same"]["fingerprint"] == fingerprint_of(tiny.megatron)


def test_what_is_not_finite_is_null_in_the_file(tiny: TinyModel, tmp_path: Path) -> None:
    path, models = tmp_path / FILE_NAME, {"pruned": tiny.megatron}
    [found] = run_distributed(1, _measured_unbounded, models, path)
    assert [line.split("|")[4].strip() for line in table(found).splitlines()[2:]] == ["inf ± nan", "inf ± 0.5000"]
    stored = json.loads(path.read_text(), parse_constant=pytest.fail)["models"]["pruned"]["tasks"]["unbounded"]
    assert stored["metrics"] == {"perplexity": {"value": None, "se": None}, "bits": {"value": None, "se": 0.5}}
    assert stored["by_question"] == {"bits": [None, 1.0]}
    again = read_tasks(path)
    assert [line.split("|")[4].strip() for line in table(again).splitlines()[2:]] == ["nan", "nan ± 0.5000"]
    assert isnan(again["pruned"]["tasks"]["unbounded"]["by_question"]["bits"][0])


def test_a_checkpoint_of_another_format_is_converted_for_the_time_being(tiny: TinyModel, tmp_path: Path) -> None:
    options = [f"evaluate.tasks=[{QUESTIONS}]", "train.precision=fp32", "evaluate.micro_batch_size=4"]
    run_distributed(2, _of_directories, [tiny.huggingface, tiny.megatron], options, tmp_path / "tasks.json")
    theirs, ours = read_tasks(tmp_path / "tasks.json").values()
    assert theirs["tasks"] == ours["tasks"] and theirs["tasks"]["opposites"]["questions"] == 20
    assert [path.name for path in tmp_path.iterdir()] == ["tasks.json"]


def _of_directories(directories: list[Path], options: list[str], out: Path) -> None:
    from minitron_nemo.measuring import measure_tasks

    measure_tasks(directories, recipe_of(options), out)


def test_bad_tasks_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"evaluate\.tasks: .*nowhere\.jsonl: no such file"):
        open_tasks([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(UserError, match=r"evaluate\.tasks: nowhere\.yaml: no such file"):
        open_tasks(["nowhere.yaml"])
    with pytest.raises(UserError, match=r"two of them are called opposites; rename one"):
        open_tasks([str(QUESTIONS), str(QUESTIONS)])
    monkeypatch.setattr("minitron_nemo.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hellaswag is a task of lm-evaluation-harness, which is not installed; pip"):
        open_tasks(["hellaswag"])
