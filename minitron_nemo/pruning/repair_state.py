"""A repair that is interrupted: the maps that were fitted, on disk.

    RUN/plan.partial/plan.safetensors       room for all matrices
    RUN/plan.partial/.fitted/identity       what is fitted to what
    RUN/plan.partial/.fitted/NAME.json      the matrices of place NAME are on the disk: their hashes

Each rank records the places that it fits, after their bytes are on the disk. The next start goes on if it is to fit
the same to the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import minitron_nemo
from minitron_nemo.arch.matrix import Matrix
from minitron_nemo.checkpoint.dense import MatrixFile
from minitron_nemo.checkpoint.files import fsync, make_partial, partial_path, read_json, write_atomic
from minitron_nemo.parallel import launch

RECORDS = ".fitted"


class RepairState:
    """The file of a repair's matrices, of these `shapes`, beside `directory`, and which of them it holds.

    A repair of another identity, which is JSON and includes the layout, the number of processes and the version of this
    package, starts again.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, int]], identity: Mapping[str, Any]) -> None:
        self.directory = directory
        self.partial = partial_path(directory)
        self.records = self.partial / RECORDS
        self.file = MatrixFile(self.partial, shapes)
        self.count = len(shapes)
        content = {**identity, "shapes": shapes, "processes": launch.world_size(), "version": minitron_nemo.__version__}
        self.identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.fitted: dict[str, Matrix] = {}  # of all ranks before the start, of this one since
        self.found: dict[str, float] = {}

    def resume(self) -> None:
        """Take up what is on the disk, or make room for all matrices. Collective."""
        self.fitted, self.found = launch.from_rank_0(self._resume)

    def record(self, place: str, matrices: Mapping[str, Matrix], found: Mapping[str, float] | None = None) -> None:
        """Keep what `file` has written of a place, and what was found out with it."""
        self.fitted |= matrices
        self.found |= found or {}
        content = {"matrices": {name: asdict(matrix) for name, matrix in matrices.items()}, "found": found or {}}
        write_atomic(self.records / f"{place}.json", json.dumps(content))

    def end(self) -> None:
        """Remove the records, first the one without which the others say nothing; on one process."""
        (self.records / "identity").unlink()
        shutil.rmtree(self.records)

    def _resume(self) -> tuple[dict[str, Matrix], dict[str, float]]:
        left = self.partial.exists()
        fitted, found = self._recorded()
        if fitted and all(self.file.holds(name, matrix) for name, matrix in fitted.items()):
            print(f"[repair] goes on: {len(fitted)} of {self.count} matrices are there", flush=True)
            return fitted, found
        if left:
            print(f"[repair] {self.partial} has nothing to go on with: starts again", flush=True)
        make_partial(self.directory)
        self.file.prepare()
        self.records.mkdir()
        fsync(self.partial)
        write_atomic(self.records / "identity", self.identity)
        return {}, {}

    def _recorded(self) -> tuple[dict[str, Matrix], dict[str, float]]:
        """What the records say, if they are of this repair."""
        identity = self.records / "identity"
        fitted: dict[str, Matrix] = {}
        found: dict[str, float] = {}
        if identity.is_file() and identity.read_text() == self.identity:
            for file in self.records.glob("*.json"):
                record = read_json(file, f"remove {self.partial} and repair again")
                found |= record["found"]
                for name, entry in record["matrices"].items():
                    fitted[name] = Matrix(entry["kind"], tuple(entry["shape"]), entry["sha256"])
        return fitted, found
