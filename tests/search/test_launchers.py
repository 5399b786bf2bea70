"""Trainings that run at once on one machine share its GPUs out; a job that is in the queue is waited for."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minitron_nemo.config import Recipe
from minitron_nemo.errors import Failed, UserError
from minitron_nemo.search import driver, launchers
from minitron_nemo.search.launchers import LocalProcesses, SlurmJobs, Task, gpu_shares
from minitron_nemo.search.trials import mark


@pytest.mark.parametrize(
    ("named", "jobs", "processes", "shares"),
    [
        (None, 4, 2, ["0,1", "2,3", "4,5", "6,7"]),
        (None, 2, 3, ["0,1,2", "3,4,5"]),
        ("7,GPU-1f,5,MIG-2e", 2, 2, ["7,GPU-1f", "5,MIG-2e"]),
        (None, 1, 16, [None]),  # alone, it finds them itself
        ("", 3, 2, [None, None, None]),
    ],
)
def test_every_training_has_gpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch, named: str | None, jobs: int, processes: int, shares: list[str | None]
) -> None:
    _see(monkeypatch, named)
    assert gpu_shares(jobs, processes) == shares


def test_more_trainings_than_there_are_gpus_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _see(monkeypatch, None)
    with pytest.raises(
        UserError, match=r"^search\.jobs: 3 trainings .* of 4 .* need 12 GPUs, and there are 8; .* to 2$"
    ):
        gpu_shares(3, 4)


@pytest.mark.slow
def test_a_share_of_the_gpus_goes_from_one_training_to_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Processes that say what they see; each holds a directory that another one with its GPUs could not make."""
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\ncd {tmp_path}; mkdir "$CUDA_VISIBLE_DEVICES" && echo "$CUDA_VISIBLE_DEVICES"\n')
    with program.open("a") as file:
        file.write('sleep 0.3; rmdir "$CUDA_VISIBLE_DEVICES"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    tasks = [Task(f"{number}", "run", (), Recipe(), tmp_path / f"{number}.log") for number in range(5)]
    assert sorted(LocalProcesses(["0,1", "2,3"]).run(tasks)) == [task.name for task in tasks]
    said = [task.log.read_text() for task in tasks]
    assert set(said) == {"0,1\n", "2,3\n"}


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("serves", [True, False])
def test_a_first_job_of_earlier_settings_is_followed_by_one_of_these(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, queued: bool, serves: bool
) -> None:
    """A queue whose jobs end while the search sleeps; only one that it submits itself can make what is missing."""
    name = f"tiny-search-{mark(tmp_path, None)}"
    queue, submissions = {name} if queued else set[str](), list[str]()
    monkeypatch.setattr(launchers, "queued_names", lambda: set(queue))
    monkeypatch.setattr(launchers, "_submit", lambda task: submissions.append(task.name))
    monkeypatch.setattr(driver, "trial_of", lambda *_: None)
    monkeypatch.setattr(driver, "known", lambda _: True if serves and submissions else None)
    monkeypatch.setattr(time, "sleep", lambda _: queue.clear())
    plan = SimpleNamespace(recipe=Recipe(name="tiny", run_dir=str(tmp_path)), candidates=[None])
    with nullcontext() if serves else pytest.raises(Failed, match=f"^{name}, the cuts of all candidates: "):
        driver._first_outside(plan, SlurmJobs(jobs=1, patience=0.0), tmp_path / "tiny.yaml", ())
    assert submissions == [name]


def _see(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    """A machine of 8 GPUs, of which the environment may name some."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    count = 8 if named is None else len(named.split(",")) if named else 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
