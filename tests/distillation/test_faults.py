"""What a cluster does to a run: killed while it saves, damaged files, numbers that are not finite, ranks that hang."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.distillation import background, optimizer, trainer
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.progress import Progress
from minitron_nemo.distillation.step import Step
from minitron_nemo.distillation.watchdog import Beat, diagnosis
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.distillation import runs
from tests.distillation.runs import Job, Result, assert_identical, run
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

PIPELINE = Layout(pipeline_model_parallel_size=2)
# The pipeline shows most; the others run in the soak.
MOSTLY_PIPELINE = [pytest.param(name, marks=pytest.mark.soak) for name in ("one process", "DP2")] + ["PP2"]
LAYOUTS = {"one process": (1, Layout()), "DP2": (2, Layout()), "PP2": (2, PIPELINE)}


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


def listing(job: Job) -> list[str]:
    return sorted(path.name for path in (job.directory / "training").glob("iter_*"))


class replaced:
    """Context manager: `owner.name` is `value`; on a rank there is no monkeypatch."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.original = getattr(owner, name)

    def __enter__(self) -> None:
        setattr(self.owner, self.name, self.value)

    def __exit__(self, *error: object) -> None:
        setattr(self.owner, self.name, self.original)


def listened(function: Callable[..., Result], *args: Any) -> tuple[Result, list[str]]:
    """On a rank: the result of a run, and the lines it says."""
    lines: list[str] = []
    with replaced(Progress, "say", lambda self, message: lines.append(message)):
        return function(*args), lines


# --- asynchronous saves ---------------------------------------------------------------------------------------------


def slow_write(delay: float) -> Callable[[Any], background.Part]:
    """A background thread that starts late: training has changed everything it may change by then."""
    original = background.BackgroundWrite._run

    def run_late(self: Any) -> background.Part:
        time.sleep(delay)
        return original(self)

    return run_late


def saved_late_then_stopped(job: Job, delay: float, update: int) -> Result:
    """A run whose files are written `delay` seconds late, stopped by SIGTERM in `update`."""
    with replaced(background.BackgroundWrite, "_run", slow_write(delay)):
        return run(job, {update: lambda: os.kill(os.getpid(), signal.SIGTERM)})


@pytest.mark.slow
@pytest.mark.parametrize("name", MOSTLY_PIPELINE)
def test_what_is_written_late_is_the_state_at_the_save_and_sigterm_waits_for_it(
    models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """The save after update 2 is under way until the signal in update 3, whose own save comes on top."""
    world_size, layout = LAYOUTS[name]
    job = Job(*models, tmp_path / "whole", layout)
    whole = run_distributed(world_size, run, job)
    late = replace(job, directory=tmp_path / "late", config={"save_interval": 2})
    for stopped in run_distributed(world_size, saved_late_then_stopped, late, 0.5, 3):
        assert stopped.outcome == "stopped"
    assert listing(late) == ["iter_0000002", "iter_0000003"]
    again = replace(late, config={})
    # Copied before update 3, written after it.
    (tmp_path / "late" / "training" / "latest_checkpointed_iteration.txt").write_text("2\n")
    assert_identical(whole, run_distributed(world_size, run, again))
    (tmp_path / "late" / "training" / "latest_checkpointed_iteration.txt").write_text("3\n")
    resumed = run_distributed(world_size, run, again)
    assert [report.iteration for report in resumed[0].reports] == [4, 5, 6]
    assert_identical(whole, resumed)


def killed_while_writing(job: Job) -> None:
    """Rank 0 is killed when half of its tensors of the save after update 4 are on the disk."""
    original = background.BackgroundWrite._run

    def run_half(self: Any) -> background.Part:
        if "0000004" in self.directory.name and launch.rank() == 0:
            found, resolve = [], self._planner.resolve_data

            def resolve_half(item: Any) -> Any:
                found.append(item)
                if len(found) > len(self._plan.items) // 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return resolve(item)

            self._planner.resolve_data = resolve_half
        return original(self)

    with replaced(background.BackgroundWrite, "_run", run_half):
        run(job)


@pytest.mark.slow
@pytest.mark.parametrize("name", MOSTLY_PIPELINE[1:])
def test_a_rank_killed_while_it_writes_costs_that_checkpoint_alone(
    models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    world_size, layout = LAYOUTS[name]
    job = Job(*models, tmp_path / "whole", layout)
    whole = run_distributed(world_size, run, job)
    killed = replace(job, directory=tmp_path / "killed", config={"save_interval": 2})
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_distributed(world_size, killed_while_writing, killed)
    assert listing(killed) == ["iter_0000002", "iter_0000004.partial"]
    resumed = run_distributed(world_size, run, killed)
    assert [report.iteration for report in resumed[0].reports] == [3, 4, 5, 6]
    assert_identical(whole, resumed)


def full_while_writing(job: Job) -> tuple[Result, list[tuple[str, list[str]]]]:
    """Rank 0's part of the save after update 4 finds room for half of a checkpoint; what is said, and what is there."""
    original = background.BackgroundWrite._run
    ballast = job.directory / "ballast"

    def run_full(self: Any) -> background.Part:
        if "0000004" not in self.directory.name or launch.rank() != 0:
            return original(self)
        size = sum(file.stat().st_size for file in (job.directory / "training" / "iter_0000002").iterdir())
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(job.directory).free - size // 2)))
        try:
            return original(self)
        finally:
            ballast.unlink()

    said: list[tuple[str, list[str]]] = []
    with (
        replaced(background.BackgroundWrite, "_run", run_full),
        replaced(Progress, "say", lambda self, message: said.append((message, listing(job)))),
    ):
        return run(job), said


@pytest.mark.slow
@pytest.mark.parametrize("name", MOSTLY_PIPELINE)
def test_a_disk_that_fills_up_behind_the_training_leaves_the_previous_checkpoint(
    models: tuple[Path, Path], tmp_path: Path, small_disk: Path, name: str
) -> None:
    world_size, layout = LAYOUTS[name]
    job = Job(*models, tmp_path / "whole", layout, {"steps": 7, "save_interval": 2, "keep_last": 1})
    whole = run_distributed(world_size, run, job)
    outcomes = run_distributed(world_size, full_while_writing, replace(job, directory=small_disk))
    for _, said in outcomes:
        [(line, left)] = [entry for entry in said if "could not be written" in entry[0]]
        assert re.match(r"the checkpoint after update 4 could not be written: rank 0: .*; training goes on", line)
        assert left == ["iter_0000002"]
    assert listing(replace(job, directory=small_disk)) == ["iter_0000006"]
    assert_identical(whole, [result for result, _ in outcomes])


# --- damaged checkpoints --------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated": ("__0_0.distcp", truncate, r"__0_0\.distcp: \d+ bytes, \d+ were written"),
    "one bit": ("__0_0.distcp", flip, r"distcp: its bytes are not those that were written"),
    "metadata": (".metadata", Path.unlink, r"\.metadata: is missing"),
    "training.json": ("training.json", flip, r"training\.json: its bytes are not"),
    "no checksums": ("checksums.json", Path.unlink, r"iter_0000004: has no checksums\.json"),
    "half of the checksums": ("checksums.json", truncate, r"checksums\.json: not readable"),
}


def saved_twice(job: Job) -> str:
    return run(job, {5: lambda: os.kill(os.getpid(), signal.SIGTERM)}).outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DP2", pytest.param("PP2", marks=pytest.mark.soak)])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """Every kind of damage, to the checkpoint after update 4 of a run whose other one is of update 2."""
    world_size, layout = LAYOUTS[name]
    whole = run_distributed(world_size, run, Job(*models, tmp_path / "whole", layout, {"steps": 5}))
    saved = Job(*models, tmp_path / "saved", layout, {"steps": 5, "save_interval": 2})
    run_distributed(world_size, run, saved)
    assert listing(saved) == ["iter_0000002", "iter_0000004"]
    kinds = DAMAGE if name == "DP2" else {"truncated": DAMAGE["truncated"]}
    for file, damage, expected in kinds.values():
        newest = saved.directory / "training" / "iter_0000004"
        kept = {path.name: path.read_bytes() for path in newest.iterdir()}
        damage(newest / file)
        again = replace(saved, config={**saved.config, "save_interval": 100})
        outcomes = run_distributed(world_size, listened, run, again)
        resumed = [result for result, _ in outcomes]
        for _, lines in outcomes:
            assert re.match(rf"CHECKPOINT DAMAGED, falling back to the one before: .*{expected}", lines[0])
        assert [report.iteration for report in resumed[0].reports] == [3, 4, 5]
        assert_identical(whole, resumed)
        assert listing(saved) == ["iter_0000002", "iter_0000004"], "nothing is deleted"
        for path, content in kept.items():
            (newest / path).write_bytes(content)


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_names_them(models: tuple[Path, Path], tmp_path: Path) -> None:
    job = Job(*models, tmp_path, config={"save_interval": 2})
    run_distributed(1, saved_twice, job)
    for iteration in (4, 5):
        truncate(tmp_path / "training" / f"iter_{iteration:07d}" / "common.pt")
    with pytest.raises(UserError, match=r"iter_0000005.*iter_0000004.*no other checkpoint.*start over"):
        run_distributed(1, run, job)


# --- numbers that are not finite ------------------------------------------------------------------------------------


class Poison:
    """Makes chosen updates of a run not finite: their losses, or the norm of their gradients alone."""

    def __init__(self, updates: tuple[int, ...], what: str) -> None:
        self.updates, self.what = updates, what

    def run(self, job: Job) -> Result:
        calls = []
        step, update, loss = Step.__call__, optimizer.update, DistillationObjective.loss

        def counted_step(self_: Any, batches: Any) -> torch.Tensor:
            calls.append(len(calls) + 1)
            return step(self_, batches)

        def poisoned_loss(self_: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            factor = float("nan") if self.what == "loss" and calls[-1] in self.updates else 1.0
            return loss(self_, hidden * factor, *args, **kwargs)

        def poisoned_update(chained: Any) -> float:
            if self.what == "gradient" and calls[-1] in self.updates:
                for buffer in chained.chained_optimizers[0].buffers:
                    buffer.grad_data.fill_(float("inf"))
            return update(chained)

        with (
            replaced(Step, "__call__", counted_step),
            replaced(DistillationObjective, "loss", poisoned_loss),
            replaced(trainer, "update", poisoned_update),
        ):
            return run(job)


def poisoned(job: Job, updates: tuple[int, ...], what: str) -> Result:
    return Poison(updates, what).run(job)


def leaving_out(job: Job, batch: int, updates: int) -> Result:
    """`updates` updates of a run whose sampler passes over the batch of update `batch`."""

    class Leaving(runs.EventfulSampler):
        def next_batch(self, size: int) -> Any:
            if self.consumed_samples == (batch - 1) * size:
                super().next_batch(size)
            return super().next_batch(size)

    # Events are counted in batches, one of which is left out.
    with replaced(runs, "EventfulSampler", Leaving):
        return run(job, {updates + 1: lambda: os.kill(os.getpid(), signal.SIGTERM)})


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("name", "config"),
    [("DP2", {"precision": "bf16", "overlap_param_gather": True}), ("PP2", {})],
    ids=["DP2 bf16 overlap", "PP2"],
)
def test_a_skipped_update_leaves_the_run_as_if_its_batch_had_not_been(
    models: tuple[Path, Path], tmp_path: Path, name: str, config: dict, what: str
) -> None:
    """Parameters, moments, step counters; the learning rate's schedule counts the updates that happened."""
    world_size, layout = LAYOUTS[name]
    job = Job(*models, tmp_path / "without", layout, {"steps": 7, **config})
    without = run_distributed(world_size, leaving_out, job, 3, 6)
    other = replace(job, directory=tmp_path / "skipped")
    outcomes = run_distributed(world_size, listened, poisoned, other, (3,), what)
    skipped = [result for result, _ in outcomes]
    assert [report.iteration for report in skipped[0].reports] == [1, 2, 4, 5, 6, 7]
    assert [report.loss for report in skipped[0].reports] == [report.loss for report in without[0].reports]
    assert_identical(without, skipped)
    for _, lines in outcomes:
        [line] = [line for line in lines if "did not happen: " in line]
        assert re.match(r"update 3 .*data-parallel rank 0, microbatch 0 \(samples \d+\)", line)


@pytest.mark.slow
def test_counters_are_training_state_and_logged(models: tuple[Path, Path], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = Job(*models, tmp_path, config={"steps": 5, "save_interval": 4})
    run_distributed(1, poisoned, job, (2, 3), "loss")
    saved = json.loads((tmp_path / "training" / "iter_0000004" / "training.json").read_text())
    assert saved["skips"] == {"skipped": 2, "in_a_row": 0, "roll_backs": 0}
    events = EventAccumulator(str(tmp_path / "training" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/skipped")] == [(2, 1.0), (3, 2.0)]
    assert [event.step for event in events.Scalars("checkpoint/stall_seconds")] == [4]


@pytest.mark.slow
@pytest.mark.parametrize("name", MOSTLY_PIPELINE)
def test_too_many_in_a_row_go_back_to_the_last_good_checkpoint_and_on_with_other_data(
    models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """Saved after 2, not finite in 4 and 5, back: 6 to 8 follow update 2, as in a run without batches 3 to 5."""
    world_size, layout = LAYOUTS[name]
    config = {"steps": 8, "save_interval": 2, "max_nonfinite_steps": 2}
    job = Job(*models, tmp_path / "back", layout, config)
    outcomes = run_distributed(world_size, poisoned, job, (4, 5), "loss")
    saved = json.loads((job.directory / "training" / "iter_0000006" / "training.json").read_text())
    assert saved["skips"] == {"skipped": 3, "in_a_row": 0, "roll_backs": 1}
    expected = replace(job, directory=tmp_path / "expected")
    assert_identical(run_distributed(world_size, without_batches_3_to_5, expected), outcomes)


def without_batches_3_to_5(job: Job) -> Result:
    class Leaving(runs.EventfulSampler):
        def next_batch(self, size: int) -> Any:
            if self.consumed_samples == 2 * size:
                self.consumed_samples = 5 * size
            return super().next_batch(size)

    with replaced(runs, "EventfulSampler", Leaving):
        return run(job, {8: lambda: os.kill(os.getpid(), signal.SIGTERM)})


@pytest.mark.slow
def test_a_run_that_no_checkpoint_helps_fails_and_says_so(models: tuple[Path, Path], tmp_path: Path) -> None:
    job = Job(*models, tmp_path, config={"steps": 12, "save_interval": 1, "max_nonfinite_steps": 2})
    with pytest.raises(
        FloatingPointError, match=r"updates up to 9 were not finite.*no checkpoint.*samples .*lower train\.lr"
    ):
        run_distributed(1, poisoned, job, tuple(range(4, 13)), "loss")
    assert status(job)["state"] == "failed"
    assert listing(job) == ["iter_0000002", "iter_0000003"]


# --- ranks that hang ------------------------------------------------------------------------------------------------


def asleep(job: Job, where: str) -> None:
    """The last rank sleeps for ever in update 3."""

    def sleep() -> None:
        if launch.rank() == launch.world_size() - 1:
            time.sleep(3600)

    if where == "reading":
        run(job, {3: sleep})
        return
    loss, calls = Step._forward_step, []

    def sleeping_forward(self: Any, items: Any, chunk: Any) -> Any:
        calls.append(None)
        if len(calls) > 2 * 2:
            sleep()
        return loss(self, items, chunk)

    with replaced(Step, "_forward_step", sleeping_forward):
        run(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where"), [pytest.param("DP2", "reading", marks=pytest.mark.soak), ("PP2", "computing")]
)
def test_a_rank_that_sleeps_for_ever_is_named_and_the_job_ends(
    models: tuple[Path, Path], tmp_path: Path, name: str, where: str
) -> None:
    world_size, layout = LAYOUTS[name]
    job = Job(*models, tmp_path, layout, {"hang_timeout": 4.0, "micro_batch_size": 2})
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="died with exit code 1|did not arrive"):
        run_distributed(world_size, asleep, job, where)
    assert time.monotonic() - start < 60
    said = status(job)
    assert said["state"] == "failed"
    assert re.search(r"no progress for 4 s at update \d: did not arrive: rank 1 \(update \d, .*sleep", said["reason"])
    assert "rank 0" not in said["reason"]
    stacks = "".join(path.read_text() for path in (tmp_path / "heartbeats").glob("stacks_*"))
    assert "sleep" in stacks or "all_reduce" in stacks


def slow_but_alive(job: Job, pause: float) -> Result:
    """A first step, and checkpoints, that take longer than the watchdog waits."""
    with replaced(background.BackgroundWrite, "_run", slow_write(pause)):
        return run(job, {1: lambda: time.sleep(pause)})


@pytest.mark.slow
def test_slow_saves_and_a_slow_first_step_are_no_hang(models: tuple[Path, Path], tmp_path: Path) -> None:
    config = {"steps": 4, "save_interval": 2, "async_save": False, "hang_timeout": 1.0}
    job = Job(*models, tmp_path, config=config)
    for result in run_distributed(2, slow_but_alive, job, 3.0):
        assert result.outcome == "done"
    assert not (tmp_path / "heartbeats" / "verdict.txt").exists()


def beat(tick: int, iteration: int, point: int, waits: bool = True) -> Beat:
    return Beat(tick, iteration, point, False, waits, "all_reduce (distributed_c10d.py:1)")


def of_teacher(iteration: int, waits: bool = False, idle: bool = False) -> Beat:
    return beat(3, iteration, 1, waits)._replace(teacher=True, idle=idle)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ({0: beat(3, 5, 1), 1: beat(1, 5, 1), 2: beat(3, 5, 1)}, r"arrive: rank 1 \(gives no sign of life\)$"),
        ({0: beat(3, 5, 1), 2: beat(3, 5, 1)}, r"arrive: rank 1 \(gives no sign of life\)$"),
        ({0: beat(3, 5, 1), 1: beat(3, 5, 1), 2: beat(3, 5, 0)}, r"arrive: rank 2 \(update 6, reading its batch, in"),
        ({0: beat(3, 5, 1, False), 1: beat(3, 5, 1), 2: beat(3, 5, 1)}, r"arrive: rank 0 \(update 6, computing, in"),
        ({0: beat(3, 5, 1), 1: beat(3, 5, 1), 2: beat(3, 5, 1)}, r"no rank stands out among 3; rank 0: update 6"),
        # A teacher's rank that is idle, or ahead, holds nobody up; one that owes this update's states does.
        ({0: beat(3, 5, 1), 1: beat(3, 5, 1, False), 2: of_teacher(3, idle=True)}, r"arrive: rank 1 \(update 6, comp"),
        ({0: beat(3, 5, 1), 1: beat(3, 5, 1, False), 2: of_teacher(6)}, r"arrive: rank 1 \(update 6, comp[^;]*$"),
        ({0: beat(3, 5, 1), 1: beat(3, 5, 1), 2: of_teacher(5)}, r"arrive: rank 2 \(of the teacher, update 6, comp"),
        ({0: beat(3, 5, 1), 1: beat(3, 5, 1), 2: of_teacher(4, True)}, r"arrive: rank 2 \(of the teacher, update 5, "),
    ],
)
def test_the_rank_that_holds_the_others_up_is_found(later: dict[int, Beat], expected: str) -> None:
    earlier = {rank: beat(1, 5, 1) for rank in range(3)}
    assert re.search(expected, diagnosis(earlier, later, 3, 600))


# --- another number of ranks, another layout ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [("DP2", "one process"), pytest.param("one process", "PP2", marks=pytest.mark.soak), ("PP2", "DP2")],
)
def test_a_run_resumes_on_another_layout(models: tuple[Path, Path], tmp_path: Path, before: str, after: str) -> None:
    """The first five updates after the resumption agree with those of the undisturbed run within 1e-5 in fp32."""
    world_size, layout = LAYOUTS[before]
    job = Job(*models, tmp_path / "whole", layout, {"steps": 10})
    whole = run_distributed(world_size, run, job)
    moved = replace(job, directory=tmp_path / "moved")
    run_distributed(world_size, saved_twice, moved)
    world_size, layout = LAYOUTS[after]
    resumed = run_distributed(world_size, run, replace(moved, layout=layout))
    for one, other in zip(whole[0].reports[5:], resumed[0].reports, strict=True):
        assert other.iteration == one.iteration
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
