"""Trainings that run at once on one machine share its GPUs out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from minitron_nemo.config import Recipe
from minitron_nemo.errors import UserError
from minitron_nemo.search.launchers import LocalProcesses, Task, gpu_shares


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


def _see(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    """A machine of 8 GPUs, of which the environment may name some."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    count = 8 if named is None else len(named.split(",")) if named else 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
