"""`Plan`: which entries of which axes a student keeps of its teacher.

A Plan is a small file that a person can read and diff. Pruning makes one from Scores; `checkpoint.transform` carries it
out, tensor by tensor, without building a model. The identity Plan is a conversion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Axis, Indices
from minitron_nemo.errors import UserError

FILE_NAME = "plan.json"  # in the directory of a checkpoint that a Plan made
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Selection of entries, from the `source` architecture to the `target` one.

    `kept_layers` are the source's layers that stay, ascending, 0-indexed. `kept_hidden` are the hidden channels that
    stay, or None for all. `kept_ffn[i]` and `kept_heads[i]` belong to student layer i, which is source layer
    `kept_layers[i]`; None for all. `gaps` records, per cut (`hidden_size`, `ffn_hidden_size/3`: of source layer 3), the
    relative difference between the worst score kept and the best score dropped: where it is below the accuracy of the
    Scores, another layout may choose otherwise. `provenance` holds fingerprints of the teacher and the Scores and the
    settings used.
    """

    source: Architecture
    target: Architecture
    kept_layers: tuple[int, ...]
    kept_hidden: tuple[int, ...] | None = None
    kept_ffn: tuple[tuple[int, ...], ...] | None = None
    kept_heads: tuple[tuple[int, ...], ...] | None = None
    gaps: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check("kept_layers", self.kept_layers, Axis.LAYERS)
        if self.kept_hidden is not None:
            self._check("kept_hidden", self.kept_hidden, Axis.HIDDEN)
        for name, per_layer, axis in (
            ("kept_ffn", self.kept_ffn, Axis.FFN),
            ("kept_heads", self.kept_heads, Axis.HEADS),
        ):
            if per_layer is not None:
                if len(per_layer) != len(self.kept_layers):
                    raise UserError(f"plan: {name} has {len(per_layer)} layers, kept_layers {len(self.kept_layers)}")
                for layer, kept in enumerate(per_layer):
                    self._check(f"{name}[{layer}]", kept, axis)
        for axis, cut in ((Axis.HIDDEN, self.kept_hidden), (Axis.FFN, self.kept_ffn), (Axis.HEADS, self.kept_heads)):
            if cut is None and self.source.size(axis) != self.target.size(axis):
                raise UserError(f"plan: {axis} shrinks but the plan does not say which entries are kept")
        if self.kept_heads is not None:
            per_group = self.target.heads_per_group
            for layer, kept in enumerate(self.kept_heads):
                groups = np.bincount(
                    np.array(kept) // self.source.heads_per_group, minlength=self.source.num_query_groups
                )
                if (groups != per_group).any():
                    raise UserError(
                        f"plan: kept_heads[{layer}] keeps {groups.tolist()} heads per query group, not {per_group} each"
                    )

    def _check(self, name: str, kept: tuple[int, ...], axis: Axis) -> None:
        if len(kept) != self.target.size(axis):
            raise UserError(f"plan: {name} keeps {len(kept)} entries, the target's {axis} is {self.target.size(axis)}")
        if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.source.size(axis):
            raise UserError(
                f"plan: {name} must be ascending, unique and within the source's {axis} {self.source.size(axis)}"
            )

    @staticmethod
    def identity(architecture: Architecture) -> Plan:
        """The Plan that keeps everything."""
        return Plan(architecture, architecture, tuple(range(architecture.num_layers)))

    def kept(self, layer: int | None) -> dict[Axis, Indices]:
        """Kept source entries per cut axis, for tensors of student layer `layer` (None: outside the layers)."""
        entries: dict[Axis, Indices] = {}
        if self.kept_hidden is not None:
            entries[Axis.HIDDEN] = np.array(self.kept_hidden, dtype=np.int64)
        if layer is not None and self.kept_ffn is not None:
            entries[Axis.FFN] = np.array(self.kept_ffn[layer], dtype=np.int64)
        if layer is not None and self.kept_heads is not None:
            entries[Axis.HEADS] = np.array(self.kept_heads[layer], dtype=np.int64)
        return entries

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "kept_layers": self.kept_layers,
            "kept_hidden": self.kept_hidden,
            "kept_ffn": self.kept_ffn,
            "kept_heads": self.kept_heads,
            "gaps": dict(self.gaps),
            "provenance": dict(self.provenance),
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict()) + "\n")

    @staticmethod
    def load(path: Path) -> Plan:
        """Read a Plan. Raises UserError, naming the file, for anything that is not one."""
        try:
            data = json.loads(path.read_text())
            if data["schema_version"] != SCHEMA_VERSION:
                raise UserError(f"{path}: schema_version {data['schema_version']} is not {SCHEMA_VERSION}")
            return Plan(
                source=Architecture.from_dict(data["source"], f"{path}: source"),
                target=Architecture.from_dict(data["target"], f"{path}: target"),
                kept_layers=tuple(data["kept_layers"]),
                kept_hidden=_tuple(data["kept_hidden"]),
                kept_ffn=_tuples(data["kept_ffn"]),
                kept_heads=_tuples(data["kept_heads"]),
                gaps=data["gaps"],
                provenance=data["provenance"],
            )
        except FileNotFoundError:
            raise UserError(f"{path}: no such plan") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a plan: {error}") from None


def _tuple(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def _tuples(values: list[list[int]] | None) -> tuple[tuple[int, ...], ...] | None:
    return None if values is None else tuple(tuple(row) for row in values)
