"""lm-evaluation-harness gets from our models what its own adapter gets from the exported ones, on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

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
