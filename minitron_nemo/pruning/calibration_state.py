"""A calibration pass that is interrupted: what each rank had measured, on disk.

    RUN/calibration/00000128-rank_3.pt   after 128 of its microbatches

All ranks save after the same microbatches. One may be killed before the others have: each keeps what it saved before
until all have saved, and a pass goes on with the newest that every rank has.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import minitron_nemo
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.errors import UserError
from minitron_nemo.importance.collect import Collector
from minitron_nemo.parallel import launch


class CalibrationState:
    """Saves every `interval` microbatches of a rank in `directory`, for a pass that `identity` describes in JSON.

    A pass of another identity, which includes the layout, the number of processes and the version of this package,
    starts again.
    """

    def __init__(self, directory: Path, interval: int, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        self.interval = interval
        content = {**identity, "processes": launch.world_size(), "version": minitron_nemo.__version__}
        self.identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def resume(self, collector: Collector) -> int:
        """Load what every rank has, and return the number of microbatches that are done. Collective."""
        saved = {file: self._load(file) for file in self._files()}
        mine = {state["done"]: state["sums"] for state in saved.values() if state["identity"] == self.identity}
        everyones: list[Any] = [None] * launch.world_size()
        distributed.all_gather_object(everyones, (sorted(mine), bool(saved)))
        done = max(set.intersection(*(set(found) for found, _ in everyones)), default=0)
        if done:
            collector.load_state(mine[done])
            self._say(f"goes on after {done} microbatches of each rank")
        elif any(found for _, found in everyones):
            self._say(f"{self.directory} is of another model, data, setting, layout or version: starts again")
        return done

    def save(self, collector: Collector, done: int) -> None:
        """Write what this rank has measured in `done` microbatches; what it saved before goes. Collective."""
        written = self.directory / f"{done:08}-rank_{launch.rank()}.pt"
        before = [file for file in self._files() if file != written]  # there if a job was killed in this very save
        self.directory.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save({"identity": self.identity, "done": done, "sums": collector.state()}, content)
        write_atomic(written, content.getvalue())
        launch.barrier()
        for file in before:
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob(f"*-rank_{launch.rank()}.pt"))

    def _load(self, file: Path) -> dict[str, Any]:
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(
                f"{file}: cannot be loaded ({reason}); remove {self.directory} and calibrate again"
            ) from None

    def _say(self, text: str) -> None:
        if launch.rank() == 0:
            print(f"[calibrate] {text}", flush=True)
