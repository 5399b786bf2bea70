"""Training where the tensor-parallel size does not divide the query groups: interrupted, on this layout and others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import IntermediateConfig
from minitron_nemo.parallel.layout import Layout
from tests.distillation.runs import Job, assert_identical, run
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.slow
PAIRS = IntermediateConfig(pairs=[[0, 0], [-1, -1]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student of three query groups, teacher of five."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"num_layers": 2, "ffn_hidden_size": 72, "kv_channels": 8}
    write_tiny_llama(root / "student_hf", hidden_size=48, num_attention_heads=6, num_query_groups=3, seed=1, **sizes)
    write_tiny_llama(root / "teacher_hf", num_attention_heads=10, num_query_groups=5, seed=2, **sizes)
    for name in ("student", "teacher"):
        convert(root / f"{name}_hf", root / name, "megatron")
    return root / "student", root / "teacher"


@pytest.mark.parametrize("size", [2, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(models: tuple[Path, Path], tmp_path: Path, size: int) -> None:
    """Bit for bit on the same layout; on others, which have other zeros or none, in the losses."""
    from megatron.core import dist_checkpointing

    def job(name: str, tp: int, teacher: Path | None = models[1]) -> Job:
        layout = Layout(tensor_model_parallel_size=tp)
        return Job(models[0], teacher, tmp_path / name, layout, {"save_interval": 3}, intermediate=PAIRS)

    straight = run_distributed(size, run, job("straight", size))
    saved = tmp_path / "straight" / "training"
    assert [path.name for path in saved.glob("iter_*")] == ["iter_0000003"]
    stored = dist_checkpointing.load_tensors_metadata(str(saved / "iter_0000003"))
    for key in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.state.param."):
        for name, shape in (("linear_qkv", (2, (6 + 2 * 3) * 8, 48)), ("linear_proj", (2, 48, 6 * 8))):
            [tensor] = [stored[found] for found in stored if found.startswith(f"{key}decoder") and name + ".w" in found]
            assert tensor.global_shape == shape, (key, name)
    for name, tp in (("again", size), ("one", 1)):
        shutil.copytree(saved, tmp_path / name / "training")
        resumed = run_distributed(tp, run, job(name, tp))
        assert [report.iteration for report in resumed[0].reports] == [4, 5, 6]
        if tp == size:
            assert_identical(straight, resumed)
        losses = [[report.loss for report in each[-1].reports[-3:]] for each in (resumed, straight)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_layout_may_change_to_one_that_divides(models: tuple[Path, Path], tmp_path: Path) -> None:
    """From TP2 with a group of zeros to TP3 without, and back; cross-entropy, since 3 does not divide the sequence."""

    def job(name: str, tp: int) -> Job:
        return Job(models[0], None, tmp_path / name, Layout(tensor_model_parallel_size=tp), {"save_interval": 3})

    for first, second in ((2, 3), (3, 2)):
        straight = run_distributed(first, run, job(f"straight {first}", first))
        shutil.copytree(tmp_path / f"straight {first}" / "training", tmp_path / f"from {first}" / "training")
        resumed = run_distributed(second, run, job(f"from {first}", second))
        losses = [[report.loss for report in each[-1].reports[-3:]] for each in (resumed, straight)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
