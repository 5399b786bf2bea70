"""Interrupted runs end where undisturbed ones do; what cannot be saved costs nothing but itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.distillation.state import SaveError
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.distillation.runs import Job, MadeUpSource, Result, assert_identical, run
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.slow
PIPELINE = Layout(pipeline_model_parallel_size=2)
# World size, layout, settings.
RUNS: dict[str, tuple[int, Layout, dict[str, Any]]] = {
    "one process": (1, Layout(), {}),
    "DP2": (2, Layout(), {}),
    "PP2": (2, PIPELINE, {}),
    "DP2 bf16 overlap": (2, Layout(), {"precision": "bf16", "overlap_param_gather": True}),
    "TP2 SP recompute": (2, Layout(tensor_model_parallel_size=2, sequence_parallel=True), {"recompute": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student and teacher."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "student_hf", num_layers=2, hidden_size=48, ffn_hidden_size=64, tied=True, seed=1)
    write_tiny_llama(root / "teacher_hf", num_layers=2, seed=2)
    for name in ("student", "teacher"):
        convert(root / f"{name}_hf", root / name, "megatron")
    return root / "student", root / "teacher"


def status(job: Job) -> dict:
    return json.loads((job.directory / "status.json").read_text())


def checkpoints(job: Job) -> list[str]:
    return sorted(path.name for path in (job.directory / "training").glob("iter_*"))


def terminated_then_resumed(job: Job, number: int, update: int) -> tuple[Result, dict, Result]:
    """A run to which the last rank alone gets signal `number` during `update`, its status, and the run after it."""

    def interrupt() -> None:
        if launch.rank() == launch.world_size() - 1:
            os.kill(os.getpid(), number)

    stopped = run(job, {update: interrupt})
    return stopped, settled_status(job), run(job)


def settled_status(job: Job) -> dict:
    """status.json between two runs: no rank reads it too early, or when another one has gone on."""
    launch.barrier()
    said = status(job)
    launch.barrier()
    return said


@pytest.mark.parametrize("name", RUNS)
def test_a_signal_saves_and_stops_and_the_next_run_ends_bit_for_bit_as_an_undisturbed_one(
    models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """Four updates after the resumption: the first alone would not show a damaged optimizer."""
    world_size, layout, config = RUNS[name]
    job = Job(*models, tmp_path / "whole", layout, {"steps": 7, **config})
    whole = run_distributed(world_size, run, job)
    interrupted = replace(job, directory=tmp_path / "interrupted")
    number = signal.SIGUSR1 if name == "DP2" else signal.SIGTERM
    outcomes = run_distributed(world_size, terminated_then_resumed, interrupted, number, 3)
    for stopped, said, resumed in outcomes:
        assert stopped.outcome == "stopped"
        assert (said["state"], said["step"], said["iteration"]) == ("stopped", "distill", 3)
        assert signal.Signals(number).name in said["reason"]
        assert resumed.outcome == "done"
        assert [report.iteration for report in resumed.reports] == [4, 5, 6, 7]
    assert_identical(whole, [resumed for _, _, resumed in outcomes])
    for one, (_, _, other) in zip(whole, outcomes, strict=True):
        assert [report.loss for report in one.reports[3:]] == [report.loss for report in other.reports]


def broken_then_resumed(job: Job, update: int) -> tuple[str, dict, Result]:
    def fail() -> None:
        raise RuntimeError("a rank fell over")

    try:
        run(job, {update: fail})
    except RuntimeError as error:
        return str(error), settled_status(job), run(job)
    raise AssertionError("the failure was swallowed")


@pytest.mark.parametrize("name", ["one process", "PP2"])
def test_a_failed_run_says_so_and_the_next_one_goes_on_from_its_last_checkpoint(
    models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    world_size, layout, _ = RUNS[name]
    job = Job(*models, tmp_path / "whole", layout)
    whole = run_distributed(world_size, run, job)
    broken = replace(job, directory=tmp_path / "broken", config={"save_interval": 2, "async_save": False})
    outcomes = run_distributed(world_size, broken_then_resumed, broken, 4)
    for error, said, resumed in outcomes:
        assert error == "a rank fell over"
        assert said["state"] == "failed"
        assert "a rank fell over" in said["reason"]
        assert [report.iteration for report in resumed.reports] == [3, 4, 5, 6]
    assert_identical(whole, [resumed for _, _, resumed in outcomes])


def test_a_run_on_another_layout_resumes_to_the_same_weights_within_rounding(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Saved with two data-parallel ranks, gone on with in one process."""
    job = Job(*models, tmp_path / "whole")
    [whole] = run_distributed(1, run, job)
    moved = replace(job, directory=tmp_path / "moved")
    run_distributed(2, stopped_by_signal, moved, 3)
    [resumed] = run_distributed(1, run, moved)
    for one, other in zip(whole.reports[3:], resumed.reports, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


def stopped_by_signal(job: Job, update: int) -> str:
    return run(job, {update: lambda: os.kill(os.getpid(), signal.SIGTERM)}).outcome


def test_the_last_checkpoints_are_kept_and_leftovers_removed(models: tuple[Path, Path], tmp_path: Path) -> None:
    job = Job(*models, tmp_path, config={"save_interval": 1, "keep_last": 2})
    leftover = tmp_path / "training" / "iter_0000009.partial"
    leftover.mkdir(parents=True)
    run_distributed(1, run, job)
    # The last update's weights go to the output directory instead.
    assert checkpoints(job) == ["iter_0000004", "iter_0000005"]
    assert (tmp_path / "training" / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    assert not list((tmp_path / "training").glob("*partial*"))


def test_a_checkpoint_of_another_run_is_refused_by_the_setting_that_differs(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    job = Job(*models, tmp_path)
    run_distributed(1, stopped_by_signal, job, 2)
    other = replace(job, config={"lr": 2e-2})
    with pytest.raises(UserError, match=r"training\.json: train\.lr was 0\.01 .* is 0\.02 now"):
        run_distributed(1, run, other)
    assert checkpoints(job) == ["iter_0000002"]


def test_a_checkpoint_that_is_not_there_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    job = Job(*models, tmp_path)
    run_distributed(1, stopped_by_signal, job, 2)
    shutil.rmtree(tmp_path / "training" / "iter_0000002")
    with pytest.raises(UserError, match="iter_0000002.*start over"):
        run_distributed(1, run, job)


def run_on_full_disk(job: Job, room: float) -> tuple[Result, dict[str, list[str]]]:
    """Before update 3 all but `room` x the size of a checkpoint is taken, before update 5 given back.

    Returns the directory's content as it was before updates 3 and 5, and at the end.
    """
    ballast = job.directory / "ballast"
    seen: dict[str, list[str]] = {}

    def listing(when: str) -> None:
        logs = ("tensorboard", "metrics.jsonl")
        seen[when] = sorted(path.name for path in (job.directory / "training").iterdir() if path.name not in logs)

    def fill() -> None:
        listing("before")
        if launch.rank() == 0:
            checkpoint = job.directory / "training" / "iter_0000002"
            size = sum(file.stat().st_size for file in checkpoint.iterdir())
            free = shutil.disk_usage(job.directory).free
            ballast.write_bytes(bytes(max(0, free - int(room * size))))
        launch.barrier()

    def clear() -> None:
        listing("full")
        if launch.rank() == 0:
            ballast.unlink()
        launch.barrier()

    result = run(job, {3: fill, 5: clear})
    listing("after")
    return result, seen


@pytest.mark.parametrize("room", [0.02, 0.5, 0.96])
@pytest.mark.parametrize("name", ["one process", "PP2"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_training_goes_on(
    models: tuple[Path, Path], tmp_path: Path, small_disk: Path, name: str, room: float
) -> None:
    world_size, layout, _ = RUNS[name]
    job = Job(
        *models, tmp_path / "undisturbed", layout, {"steps": 7, "save_interval": 2, "keep_last": 1, "async_save": False}
    )
    whole = run_distributed(world_size, run, job)
    tracker = "latest_checkpointed_iteration.txt"
    outcomes = run_distributed(world_size, run_on_full_disk, replace(job, directory=small_disk), room)
    for result, seen in outcomes:
        assert result.outcome == "done"
        assert seen["before"] == seen["full"] == ["iter_0000002", tracker]
        assert seen["after"] == ["iter_0000006", tracker]
    assert_identical(whole, [result for result, _ in outcomes])
    resumed = run_distributed(world_size, run, replace(job, directory=small_disk))
    assert_identical(whole, resumed)


def test_a_full_disk_ends_the_run_where_the_recipe_says_so(
    models: tuple[Path, Path], tmp_path: Path, small_disk: Path
) -> None:
    config = {"save_interval": 2, "fail_on_save_error": True, "async_save": False}
    job = Job(*models, small_disk, PIPELINE, config)
    with pytest.raises(SaveError, match="rank"):
        run_distributed(2, run_on_full_disk, job, 0.5)
    assert checkpoints(job) == ["iter_0000002"]


def test_gradients_that_are_not_finite_end_the_run_before_they_are_saved(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    job = Job(*models, tmp_path, config={"lr": 1e30, "min_lr": 0.0, "warmup_steps": 0, "save_interval": 1})
    with pytest.raises(FloatingPointError, match=r"5 updates up to 6 were not finite.*lower train\.lr"):
        run_distributed(1, run, job)
    assert status(job)["state"] == "failed"
    assert checkpoints(job) == ["iter_0000001"]


def test_training_on_labels_alone_lowers_their_cross_entropy(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Three times over the same 64 samples."""
    [result] = run_distributed(1, run, Job(models[1], None, tmp_path, config={"steps": 48, "log_interval": 16}))
    first, _, last = result.reports
    assert last.ce < first.ce - 0.5
    assert all(report.loss == report.ce and report.logits == 0 for report in result.reports)


def test_distillation_lowers_the_divergence_and_bf16_follows_fp32(models: tuple[Path, Path], tmp_path: Path) -> None:
    results = {}
    for precision in ("fp32", "bf16"):
        config = {"steps": 16, "precision": precision}
        [results[precision]] = run_distributed(1, run, Job(*models, tmp_path / precision, config=config))
    for result in results.values():
        assert result.reports[-1].logits < 0.7 * result.reports[0].logits
    for exact, rounded in zip(results["fp32"].reports, results["bf16"].reports, strict=True):
        assert rounded.loss == pytest.approx(exact.loss, rel=0.05)
    masters = [tensor for name, tensor in results["bf16"].tensors.items() if name.startswith("main.")]
    assert masters
    assert all(tensor.dtype == torch.float32 for tensor in masters)


def test_a_run_reports_itself_to_status_and_tensorboard(models: tuple[Path, Path], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = Job(*models, tmp_path, PIPELINE, {"log_interval": 4})
    first, last = run_distributed(2, run, job)
    for one, other in zip(first.reports, last.reports, strict=True):
        assert (one.loss, one.logits, one.ce, one.grad_norm) == (other.loss, other.logits, other.ce, other.grad_norm)
    assert [report.iteration for report in first.reports] == [4, 6]
    said = status(job)
    assert (said["state"], said["iteration"], said["steps"]) == ("running", 6, 6)
    events = EventAccumulator(str(tmp_path / "training" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 6]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([r.loss for r in first.reports])


def poisoned(job: Job) -> tuple[str, dict]:
    """What is raised when the embedding of one token is not a number, and status.json."""
    try:
        run(job)
    except FloatingPointError as error:
        return str(error), settled_status(job)
    raise AssertionError("a loss that is not a number went by")


@pytest.mark.parametrize("name", ["DP2", "PP2", "TP2 SP recompute"])
def test_a_loss_that_is_not_finite_ends_the_run_on_every_rank_and_names_the_samples(
    models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    world_size, layout, config = RUNS[name]
    token = 7
    write_tiny_llama(tmp_path / "hf", num_layers=2, hidden_size=48, ffn_hidden_size=64, seed=1)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "student", "megatron")
    job = Job(tmp_path / "student", models[1], tmp_path / "run", layout, {**config, "max_nonfinite_steps": 1})
    outcomes = run_distributed(world_size, poisoned, job)
    source = MadeUpSource()
    for said, left in outcomes:
        assert said == outcomes[0][0]
        assert left["state"] == "failed" and "the loss is not finite" in left["reason"]
        named = {int(sample) for sample in re.findall(r"samples (\d+)\)", said)}
        assert named and all(token in source.sample(sample)["tokens"] for sample in named)
