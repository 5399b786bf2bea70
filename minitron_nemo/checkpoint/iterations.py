"""Directories of checkpoints as Megatron trainers keep them: `iter_0000100/` and a file that names the newest."""

from __future__ import annotations

from pathlib import Path

import torch

from minitron_nemo.checkpoint.safe_pickle import MALFORMED
from minitron_nemo.errors import UserError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
STATE_FILE = "latest_train_state.pt"


def newest_iteration(path: Path) -> Path | None:
    """The subdirectory that the trackers name, else the one of the highest iteration; None where there is none.

    Raises UserError for a tracker that is malformed or names what is not there.
    """
    tracker, state = path / TRACKER_FILE, path / STATE_FILE
    if tracker.is_file():
        return _existing(tracker, tracker.read_text(errors="replace").strip())
    if state.is_file():
        try:
            step = torch.load(state, map_location="cpu", weights_only=True)["step"]
            return _existing(state, str(int(step)))
        except (*MALFORMED, RuntimeError) as error:
            raise UserError(f"{state}: refused: {' '.join(str(error).split())[:200]}") from None
    found = [(int(entry.name[5:]), entry) for entry in path.glob("iter_*") if entry.name[5:].isdecimal()]
    return max(found)[1] if found else None


def iteration_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _existing(tracker: Path, content: str) -> Path:
    if not (content.isdecimal() or content == "release"):
        raise UserError(f"{tracker}: {content[:40]!r} is neither an iteration nor 'release'")
    directory = tracker.parent / (content if content == "release" else iteration_name(int(content)))
    if not directory.is_dir():
        raise UserError(f"{tracker}: names {directory.name}, which is not there; copy it, or correct the tracker")
    return directory
