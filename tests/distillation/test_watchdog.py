"""The watchdog's clock, without waiting; what it says of jobs that hang is in test_faults.py."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_nemo.distillation.watchdog import Watchdog


@pytest.mark.parametrize(
    ("waits", "gives_up"),
    [
        ([25.0] * 4, 0),
        ([25.0] * 5, 1),
        ([25.0, 4000.0, 25.0, 25.0, 25.0], 0),  # as by `scontrol suspend`, or a laptop that slept
        ([4000.0, *[25.0] * 5], 1),
    ],
)
def test_time_in_which_the_process_was_suspended_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], gives_up: int
) -> None:
    clock, left, given_up = [0.0], list(waits), []

    def wait(interval: float) -> bool:
        """Whether the training has ended meanwhile."""
        if not left:
            return True
        clock[0] += left.pop(0)
        return False

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog = Watchdog(tmp_path, 100.0, print)
    dog.beat(0, 0)
    dog.beat(1, 0)  # a first update may take as long as it likes
    monkeypatch.setattr(dog, "_ended", SimpleNamespace(wait=wait))
    monkeypatch.setattr(dog, "_write", lambda tick: None)
    monkeypatch.setattr(dog, "_give_up", given_up.append)
    dog._watch()
    assert len(given_up) == gives_up
