"""`DepthScores`: what models without some of the layers lose, sequence by sequence, and its file.

Kept are sums for each sequence: any comparison of two models is paired over sequences, a task is scored anew under
other rules, and a measurement that was interrupted goes on behind the last sequence that it has. A model once measured
serves every method and every target that asks for it.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.data.choices import Choices
from minitron_nemo.errors import UserError
from minitron_nemo.models.branches import Branch

SCHEMA_VERSION = 1

Array = NDArray[np.float64]
Cost = tuple[float, ...]  # of leaving layers out; compared from the left


@dataclass(eq=False)
class DepthScores:
    """Sums of one model on one set of sequences: of its text, or of the choices of a task.

    `weights` [sequences] are sums of token weights, and `sums` has for each branch sums of weight * cross-entropy
    [sequences], fp64, NaN where not measured yet. `identity` is all that decides them: fingerprints, settings, version.
    """

    architecture: Architecture
    identity: Mapping[str, Any]
    weights: Array
    choices: Choices | None = None
    sums: dict[Branch, Array] = field(default_factory=dict)

    def missing(self, branch: Branch) -> NDArray[np.bool_]:
        """Which sequences are still to be measured, [sequences]."""
        return np.isnan(self.sums[branch]) if branch in self.sums else np.ones(len(self.weights), bool)

    def add(self, branch: Branch, sequences: Sequence[int], sums: Array) -> None:
        """Raises UserError where a sum is not finite."""
        if not np.isfinite(sums).all():
            left_out = f"without layers {sorted(branch)}" if branch else "of the whole model"
            raise UserError(f"score-depth: the loss {left_out} is not finite; does the model give finite logits?")
        self.sums.setdefault(branch, np.full(len(self.weights), np.nan))[list(sequences)] = sums

    def loss(self, branch: Branch) -> float:
        """Mean over tokens, in nats."""
        return float(self.sums[branch].sum() / self.weights.sum())

    def increase(self, branch: Branch) -> tuple[float, float]:
        """Loss minus that of the whole model, and its standard error over sequences, whose weights may differ."""
        differences = self.sums[branch] - self.sums[Branch()]
        mean = differences.sum() / self.weights.sum()
        count = len(differences)
        residuals = differences - mean * self.weights
        error = sqrt(count / max(count - 1, 1) * np.square(residuals).sum()) / self.weights.sum()
        return float(mean), float(error)

    def cost(self, branch: Branch, normalize: bool = False) -> Cost:
        """(loss) on text; on a task (-accuracy, -margin), scored with or without `normalize`."""
        if self.choices is None:
            return (self.loss(branch),)
        accuracy, margin = self.choices.score(-self.sums[branch], normalize)
        return -accuracy, -margin

    def save(self, path: Path) -> None:
        """Write one .npz file, atomically: the arrays, and `metadata`, which is JSON."""
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "architecture": self.architecture.to_dict(),
            "identity": dict(self.identity),
        }
        left_out = np.zeros((len(self.sums), self.architecture.num_layers), bool)
        for row, branch in enumerate(self.sums):
            left_out[row, sorted(branch)] = True
        sums = np.array(list(self.sums.values())).reshape(len(self.sums), len(self.weights))
        task = {} if self.choices is None else vars(self.choices)
        file = io.BytesIO()
        np.savez(
            file, metadata=np.array(json.dumps(metadata)), left_out=left_out, sums=sums, weights=self.weights, **task
        )
        write_atomic(path, file.getvalue())

    @staticmethod
    def load(path: Path) -> DepthScores:
        """Read what `save` wrote. Raises UserError, naming the file, for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                metadata = json.loads(str(file["metadata"]))
                if metadata["schema_version"] != SCHEMA_VERSION:
                    raise UserError(
                        f"{path}: schema_version {metadata['schema_version']} is not {SCHEMA_VERSION}; remove it"
                    )
                task = {name: file[name] for name in ("counts", "answers", "characters") if name in file}
                branches = [Branch(np.flatnonzero(row).tolist()) for row in file["left_out"]]
                return DepthScores(
                    architecture=Architecture.from_dict(metadata["architecture"], f"{path}: architecture"),
                    identity=dict(metadata["identity"]),
                    weights=file["weights"],
                    choices=Choices(**task) if task else None,
                    sums=dict(zip(branches, file["sums"], strict=True)),
                )
        except FileNotFoundError:
            raise UserError(f"{path}: not there; run `minitron score-depth` first") from None
        # numpy reports a file that is no .npz as any of these.
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not depth scores ({' '.join(str(error).split())}); remove it") from None
