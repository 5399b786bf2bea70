"""lm-evaluation-harness gets from our models what its own adapter gets from the exported ones, on every layout."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from minitron_nemo.data.choices import Question, choice_samples
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.tasks import measure_tasks
from minitron_nemo.parallel.layout import Layout
from tests.evaluation.support import HARNESS_TASK, LAYOUTS, QUESTIONS, SOME, opened
from tests.models.support import TinyModel
from tests.pool import run_distributed

PAIRS = [("The cat sat", " on"), ("", "Whole texts, too."), ("A space ", "moves"), ("long " * 120, "end"), ("a", "b")]
TEXTS = [("Short.",), ("A text longer than what the model takes at once. " * 12,)]
GENERATIONS = [
    ("The cat", {"until": ["\n", "e"], "max_gen_toks": 12}),
    ("A longer prompt than the others", {"until": [], "max_gen_toks": 12}),
    ("x", {"until": "zzz", "max_gen_toks": 12, "do_sample": False}),
    ("cut from the left " * 40, {"until": ["qqq"], "max_gen_toks": 5}),
]


def _instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def _answers(adapter: Any) -> list[Any]:
    return [
        adapter.loglikelihood(_instances("loglikelihood", PAIRS)),
        adapter.loglikelihood_rolling(_instances("loglikelihood_rolling", TEXTS)),
        adapter.generate_until(_instances("generate_until", GENERATIONS)),
    ]


def _ours(directory: Path, layout: Layout) -> list[Any]:
    from minitron_nemo.evaluation.harness import MegatronLM

    return _answers(MegatronLM(opened(directory, layout), directory, micro_batch_size=2))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def theirs(tiny: TinyModel) -> HFLM:
    return HFLM(pretrained=str(tiny.huggingface), dtype=torch.float32, device="cpu", batch_size=1)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.slow
def test_requests_are_answered_as_by_its_own_adapter(tiny: TinyModel, theirs: HFLM, name: str) -> None:
    world_size, layout = LAYOUTS[name]
    pairs, texts, generations = _answers(theirs)
    for found in run_distributed(world_size, _ours, tiny.megatron, layout):
        assert [value for value, _ in found[0]] == pytest.approx([value for value, _ in pairs], abs=1e-4)
        assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in pairs]
        assert found[1] == pytest.approx(texts, abs=1e-3)  # sums over hundreds of tokens
        assert found[2] == generations
    assert "e" not in generations[0] and len(generations[1]) > len(generations[0])


def _measured(directory: Path, spec: str, layout: Layout, path: Path) -> Any:
    content = measure_tasks({"student": directory}, [spec], layout, path, precision="fp32", micro_batch_size=4)
    return content["student"]["tasks"]["opposites"]


@pytest.mark.slow
def test_a_task_is_measured_as_by_its_own_adapter(tiny: TinyModel, theirs: HFLM, tmp_path: Path) -> None:
    from minitron_nemo.evaluation.harness import open_harness_tasks

    (task,) = open_harness_tasks(str(HARNESS_TASK))
    expected = simple_evaluate(theirs, tasks=[task.task], bootstrap_iters=2)["results"]["opposites"]
    world_size, layout = LAYOUTS["tp2-pp2"]
    found = run_distributed(world_size, _measured, tiny.megatron, str(HARNESS_TASK), layout, tmp_path / "tasks.json")
    assert all(each == found[0] for each in found)
    assert found[0]["questions"] == 20
    for metric in ("acc", "acc_norm"):
        assert found[0]["metrics"][metric]["value"] == pytest.approx(expected[f"{metric},none"])
        assert found[0]["metrics"][metric]["se"] == pytest.approx(expected[f"{metric}_stderr,none"])
        assert 0 < found[0]["metrics"][metric]["value"] < 1
    # The same questions as a task of our own.
    own = run_distributed(1, _measured, tiny.megatron, str(QUESTIONS), Layout(), tmp_path / "own.json")[0]
    assert own["by_question"] == found[0]["by_question"]


def test_samples_are_refused(tiny: TinyModel) -> None:
    with pytest.raises(UserError, match="only greedy generation is supported"):
        run_distributed(1, _sampled, tiny.megatron)


def _sampled(directory: Path) -> None:
    from minitron_nemo.evaluation.harness import MegatronLM

    adapter = MegatronLM(opened(directory, Layout()), directory)
    adapter.generate_until(_instances("generate_until", [("a", {"do_sample": True, "temperature": 1.0})]))


def test_a_task_that_is_none_is_refused(tmp_path: Path) -> None:
    from minitron_nemo.evaluation.harness import open_harness_tasks

    (tmp_path / "broken.yaml").write_text("dataset_path: json\n")
    with pytest.raises(UserError, match=r"evaluate\.tasks: .*broken\.yaml: "):
        open_harness_tasks(str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize("with_first", [True, False])
def test_questions_become_the_tokens_of_its_own_adapter(
    tiny: TinyModel, theirs: HFLM, with_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.huggingface)
    first = (tokenizer.bos_token, tokenizer.bos_token_id)
    if with_first:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{first[0]} $A", pair=f"{first[0]} $A $B", special_tokens=[first]
        )
    tokenizer.save_pretrained(tmp_path)
    pairs = [("a", " b"), ("A space ", "moves"), ("", "no context"), ("", f"{first[0]}twice"), (f"{first[0]}The", " x")]
    pairs += [("   ", "white space")] if with_first else []  # which the adapter refuses
    asked: list[Any] = []
    adapter = HFLM(pretrained=theirs.model, tokenizer=AutoTokenizer.from_pretrained(tmp_path), backend="causal")
    monkeypatch.setattr(adapter, "_loglikelihood_tokens", lambda requests, **options: asked.extend(requests))
    adapter.loglikelihood(_instances("loglikelihood", pairs))
    own = load_tokenizer(tmp_path)
    samples = choice_samples([Question((context,), (choice,), 0) for context, choice in pairs], own, 64)
    for (_, context, continuation), sample in zip(asked, samples, strict=True):
        assert [*sample["tokens"].tolist(), int(sample["labels"][-1])] == [*context, *continuation]
        assert sample["token_weights"].sum() == len(continuation)
    assert {context[0] == first[1] for _, context, _ in asked[:2]} == {with_first}
    assert own.encode(f"{first[0]}x")[0] != first[1]  # in documents it stays text


WORDS = [{"text": "The cat", "word": "sat"}, {"text": "A long", "word": "none"}, {"text": "x", "word": "none"}]
LIKELIHOODS = """
task: words
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " {{word}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
FILTERED = """
task: filtered
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{word}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 2}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - name: strict # finds nothing
    filter: [{function: regex, regex_pattern: "(no such answer)", fallback: none}, {function: take_first}]
  - name: flexible
    filter: [{function: regex, regex_pattern: "(no such answer)", fallback: sat}, {function: take_first}]
"""


def _write_task(directory: Path, task: str) -> Path:
    """The file of a task about WORDS."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "words.jsonl").write_text("".join(f"{json.dumps(word)}\n" for word in WORDS))
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: words.jsonl}}\ntest_split: test\n"
    (directory / "task.yaml").write_text(data + task)
    return directory / "task.yaml"


def _records(directory: Path, specs: list[str], path: Path) -> Any:
    return measure_tasks({"student": directory}, specs, Layout(), path, precision="fp32")["student"]["tasks"]


@pytest.mark.slow
def test_scores_of_questions_are_kept_by_filter_and_only_where_the_metric_is_their_mean(
    tiny: TinyModel, theirs: HFLM, tmp_path: Path
) -> None:
    specs = [str(_write_task(tmp_path / str(number), task)) for number, task in enumerate((LIKELIHOODS, FILTERED))]
    found = run_distributed(1, _records, tiny.megatron, specs, tmp_path / "tasks.json")[0]
    pairs = [(word["text"], " " + word["word"]) for word in WORDS]
    values, greedy = zip(*theirs.loglikelihood(_instances("loglikelihood", pairs)), strict=True)
    assert found["words"]["metrics"]["perplexity"]["value"] == pytest.approx(exp(-np.mean(values)), rel=1e-3)
    assert found["words"]["by_question"] == {"acc": list(map(float, greedy))}
    assert found["filtered"]["by_question"] == {"exact_match@strict": [0, 1, 1], "exact_match@flexible": [1, 0, 0]}


SETTINGS = """
include: base.yaml
task: shots
num_fewshot: 1
fewshot_split: train
fewshot_config: {doc_to_text: !function helper.question}
doc_to_text: !function helper.question
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl, train: examples.jsonl}}
test_split: test
"""
PARTS = {
    "task.yaml": SETTINGS,
    "base.yaml": 'output_type: loglikelihood\ndoc_to_target: "{{word}}"\ndescription: Words.\n',
    "helper.py": "def asked(text):\n    return text\n\n\ndef question(doc):\n    return asked(doc['text'])\n",
    "words.jsonl": "".join(f"{json.dumps(word)}\n" for word in WORDS),
    "examples.jsonl": '{"text": "One", "word": "two"}\n{"text": "Three", "word": "four"}\n',
}
CHANGES = {
    "task.yaml": ("num_fewshot: 1", "num_fewshot: 2"),
    "base.yaml": ("Words.", "Some words."),
    "helper.py": ("return text", "return text.upper()"),  # not of the function that the task names
    "words.jsonl": ("The cat", "The dog"),
    "examples.jsonl": ("One", "Two"),
}


def _fingerprint(directory: Path, changed: str | None = None) -> str:
    """Of the task of PARTS in `directory`, one of them changed."""
    from minitron_nemo.evaluation.harness import open_harness_tasks

    directory.mkdir()
    for name, text in PARTS.items():
        old, new = CHANGES[name]
        assert old in text
        (directory / name).write_text(text.replace(old, new) if name == changed else text)
    return open_harness_tasks(str(directory / "task.yaml"))[0].fingerprint


@pytest.mark.slow
def test_a_fingerprint_is_of_all_that_decides_the_prompts_and_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _fingerprint(tmp_path / "first")
    assert run_distributed(1, _fingerprint, tmp_path / "other-process") == [first]
    changed = {name: _fingerprint(tmp_path / name, name) for name in PARTS}
    assert len({first, *changed.values()}) == 1 + len(changed), changed
    monkeypatch.setattr("minitron_nemo.evaluation.harness.version", lambda name: "0.0")
    assert _fingerprint(tmp_path / "upgraded") != first
