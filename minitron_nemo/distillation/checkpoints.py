"""The checkpoints in a training's directory: which there are, which may be loaded, which stay.

DIR/latest_checkpointed_iteration.txt   "10", written last: what it names is complete
DIR/iter_0000010/                       what `state` writes
DIR/best_checkpoint.json                which of them had the lowest validation loss
DIR/iter_0000020.partial/               being written, or what a killed job left; never read, removed at the start
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import torch

from minitron_nemo.checkpoint.files import partial_path, write_atomic
from minitron_nemo.distillation.integrity import find_damage
from minitron_nemo.parallel import launch

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpoint.json"


class Checkpoints:
    """Those in `directory`; the best and the last `keep_last` of them stay."""

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self.best = BestCheckpoint(directory)

    def of(self, iteration: int) -> Path:
        """The directory of the one after this update."""
        return self.directory / f"iter_{iteration:07d}"

    def clean(self) -> None:
        """Make the directory, and remove what a killed save left in it. On rank 0."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for partial in self.directory.glob("*.partial"):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()

    def candidates(self) -> list[Path]:
        """Checkpoints to load from, newest first: what the tracker names, and those before. Collective.

        Without a readable tracker all count: a job may have been killed, or the disk full, between the two renames.
        """

        def find() -> list[Path]:
            present = self._present()
            try:
                newest = int((self.directory / TRACKER).read_text())
                present[newest] = self.of(newest)
            except (FileNotFoundError, ValueError):
                newest = max(present, default=0)
            return [present[iteration] for iteration in sorted(present, reverse=True) if iteration <= newest]

        return launch.from_rank_0(find)

    def published(self, iteration: int) -> None:
        """Name the one after this update, which is complete, in the tracker; remove those that do not stay. On rank 0.

        Later ones are of an abandoned future.
        """
        write_atomic(self.directory / TRACKER, f"{iteration}\n")
        found = self._present()
        last = sorted(each for each in found if each <= iteration)[-self.keep_last :]
        kept = {*last, self.best.published(iteration)}
        for each, path in found.items():
            if each not in kept:
                # Renamed first: a removal that is interrupted must not look like a checkpoint.
                os.rename(path, partial_path(path))
                shutil.rmtree(partial_path(path))

    def _present(self) -> dict[int, Path]:
        names = [path.name for path in self.directory.iterdir() if re.fullmatch(r"iter_\d{7,}", path.name)]
        return {iteration_of(Path(name)): self.directory / name for name in names}


class BestCheckpoint:
    """Which checkpoint had the lowest validation loss: best_checkpoint.json beside the checkpoints. Rank 0 alone.

    A checkpoint is judged by the validation after its own update; one that had none is never the best.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._losses: dict[int, float] = {}

    def measured(self, iteration: int, loss: float) -> None:
        """The loss after update `iteration`, of which a checkpoint may or may not be made."""
        self._losses[iteration] = loss

    def published(self, newest: int) -> int | None:
        """The best of the checkpoints up to the one after update `newest`, which is there now; None if unknown.

        May run in a thread of its own, beside `measured` of later updates.
        """
        best = self._recorded(newest)
        loss = self._losses.get(newest)
        if loss is not None and math.isfinite(loss) and (best is None or loss < best[1]):
            best = newest, loss
            record = {"checkpoint": f"iter_{newest:07d}", "iteration": newest, "validation_loss": loss}
            write_atomic(self.directory / BEST, json.dumps(record) + "\n")
        for iteration in [*self._losses]:  # a copy in one step: training may be measuring meanwhile
            if iteration <= newest:
                del self._losses[iteration]
        return None if best is None else best[0]

    def _recorded(self, newest: int) -> tuple[int, float] | None:
        """What the file says, unless that checkpoint is gone or of updates that are made again."""
        path = self.directory / BEST
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        if record["iteration"] > newest or not (self.directory / record["checkpoint"]).is_dir():
            return None
        return record["iteration"], record["validation_loss"]


def iteration_of(checkpoint: Path) -> int:
    """The update after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("iter_"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, the same on every rank; each reads a part of them. Collective."""
    found: list[str | None] = [None] * launch.world_size()
    torch.distributed.all_gather_object(found, find_damage(checkpoint, launch.rank(), launch.world_size()))
    return next((problem for problem in found if problem), None)
