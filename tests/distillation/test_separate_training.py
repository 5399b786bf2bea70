"""Trainings whose teacher is in a world of its own: as colocated, through stops, skipped updates and failures."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import IntermediateConfig, PhaseConfig
from minitron_nemo.distillation.serving import Server
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.parallel.worlds import Side
from tests.distillation.runs import Job, Result, assert_identical, run, teacher_pids
from tests.distillation.test_faults import poisoned, replaced
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.slow
PP2 = Layout(pipeline_model_parallel_size=2)
SP2 = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
PHASES = [
    PhaseConfig(steps=3),
    PhaseConfig(steps=3, sequence_length=32, micro_batch_size=2),
    PhaseConfig(global_batch_size=8),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student and teacher."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "student_hf", num_layers=2, hidden_size=48, ffn_hidden_size=64, tied=True, seed=1)
    write_tiny_llama(root / "teacher_hf", num_layers=2, seed=2)
    for name in ("student", "teacher"):
        convert(root / f"{name}_hf", root / name, "megatron")
    return root / "student", root / "teacher"


def separate(job: Job, directory: Path, layout: Layout, teachers: int) -> Job:
    return replace(job, directory=directory, teachers=teachers, teacher_layout=layout)


def assert_same_losses(one: list[Result], other: list[Result], rel: float = 1e-6) -> None:
    for mine, theirs in zip(one[0].reports, other[0].reports, strict=True):
        for name in ("loss", "logits", "hidden", "alpha", "grad_norm"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=rel), (mine.iteration, name)


@pytest.mark.parametrize("room", [2**30, 1])
def test_a_separate_run_is_a_colocated_one_through_phases_and_a_growing_batch(
    models: tuple[Path, Path], tmp_path: Path, room: int
) -> None:
    job = Job(*models, tmp_path / "colocated", config={"steps": 9, "phases": PHASES, "rampup_batch_size": [2, 2, 2]})
    whole = run_distributed(2, run, job)
    other = run_distributed(3, run, replace(separate(job, tmp_path / "separate", Layout(), 1), buffer_bytes=room))
    assert [result.outcome for result in other] == ["done"] * 3
    assert_same_losses(whole, other)


def interrupted(job: Job, at: int) -> list[Result]:
    """On a rank: a run whose teacher's last rank alone gets a signal during update `at`, and the run after it."""

    def interrupt() -> None:
        if launch.rank() == 0:
            os.kill(teacher_pids(job)[-1], signal.SIGTERM)

    return [run(job, {at: interrupt}), run(job)]


def test_a_signal_to_the_teacher_alone_stops_both_and_the_resumed_run_is_bit_identical(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """With the first alpha from a pass of its own: the batch is asked for twice."""
    job = Job(
        *models, tmp_path / "colocated", PP2, {"steps": 9}, intermediate=IntermediateConfig(pairs=[[-1, 1], [1, 0]])
    )
    colocated = run_distributed(2, run, job)
    job = separate(job, tmp_path / "whole", SP2, 2)
    whole = run_distributed(4, run, job)
    assert_same_losses(colocated, whole, rel=1e-5)  # the teacher's products are cut otherwise
    parts = run_distributed(4, interrupted, replace(job, directory=tmp_path / "parts"), 3)
    assert [first.outcome for first, _ in parts] == ["stopped"] * 4
    assert_identical(whole[:2], [second for _, second in parts[:2]])
    assert 1 <= len(parts[0][1].reports) <= 6


def test_skipped_updates_and_a_roll_back_are_those_of_a_colocated_run(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    config = {"steps": 8, "save_interval": 2, "max_nonfinite_steps": 2}
    job = Job(*models, tmp_path / "colocated", config=config)
    whole = run_distributed(1, poisoned, job, (4, 5), "loss")
    other = run_distributed(2, poisoned, separate(job, tmp_path / "separate", Layout(), 1), (4, 5), "loss")
    assert_same_losses(whole, other)
    assert_identical(whole, other[:1])


def failing(job: Job, error: Exception, where: str) -> str:
    """On a rank: what is raised when an error comes up on one side; `nowhere`: on the teacher's, which dies of it."""
    serve, count = Server._serve, []

    def fail(*arguments: Any) -> None:
        count.append(1)
        if len(count) == 3:
            if where == "nowhere":
                arguments[0].side.link = None  # its connections close, as those of a process that is gone
            raise error
        serve(*arguments)

    def stumble() -> None:
        if launch.rank() == 0:
            raise error
        launch.barrier()

    say = Side.fail if where != "nowhere" else lambda side, error: None
    try:
        with replaced(Server, "_serve", serve if where == "student" else fail), replaced(Side, "fail", say):
            run(job, {3: stumble} if where == "student" else {})
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    raise AssertionError("the failure was swallowed")


@pytest.mark.parametrize("where", ["teacher", "student"])
@pytest.mark.parametrize("error", [RuntimeError("fell over"), UserError("x.yaml: wrong")], ids=["error", "input"])
def test_an_error_on_one_side_ends_both_and_says_whose_it_was(
    models: tuple[Path, Path], tmp_path: Path, error: Exception, where: str
) -> None:
    job = separate(Job(*models, tmp_path), tmp_path, Layout(), 1)
    said = run_distributed(2, failing, job, error, where)
    own, other = said if where == "student" else said[::-1]
    assert own == f"{type(error).__name__}: {error}"
    kind = "SaidByRankZero" if isinstance(error, UserError) else "RuntimeError"
    assert other == f"{kind}: the {where}'s ranks ended: {own}"
    if where == "teacher":
        assert "the teacher's ranks ended" in json.loads((tmp_path / "status.json").read_text())["reason"]


def test_a_teacher_whose_connections_break_ends_the_student(models: tuple[Path, Path], tmp_path: Path) -> None:
    job = separate(Job(*models, tmp_path), tmp_path, Layout(), 1)
    said = run_distributed(2, failing, job, RuntimeError("fell over"), "nowhere")
    assert re.match("RuntimeError: lost rank 1 of the job: .*Connection closed by peer", said[0])


def frozen_teacher(job: Job, at: int) -> None:
    run(job, {at: lambda: os.kill(teacher_pids(job)[0], signal.SIGSTOP)})


def test_a_teacher_that_hangs_is_named(models: tuple[Path, Path], tmp_path: Path) -> None:
    job = separate(Job(*models, tmp_path, config={"hang_timeout": 4.0}), tmp_path, Layout(), 1)
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 1"):
        run_distributed(2, frozen_teacher, job, 3)
    reason = json.loads((tmp_path / "status.json").read_text())["reason"]
    assert re.search(r"no progress for 4 s at update \d: did not arrive: rank 1 \(gives no sign of life\)", reason)
