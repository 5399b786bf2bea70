"""`Plan`: which entries of which axes a student keeps of its teacher, and how what stays makes up for what goes.

A Plan is a small file that a person can read and diff; its matrices, where it has any, are a safetensors file beside
it. Pruning makes one from Scores; `checkpoint.transform` carries it out, tensor by tensor, without building a model.
The identity Plan is a conversion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Axis, Indices, QKVDim
from minitron_nemo.arch.blocks import EMBEDDING
from minitron_nemo.arch.family import family
from minitron_nemo.arch.tensors import NamedTensor, tensors
from minitron_nemo.errors import UserError

FILE_NAME = "plan.json"  # in the directory of a checkpoint that a Plan made
MATRICES_NAME = "plan.safetensors"  # beside it
SCHEMA_VERSION = 4

REPLACE, ADD, GAIN = "replace", "add", "gain"


@dataclass(frozen=True)
class Matrix:
    """A dense map on the columns of one tensor of the student, or a gain; fp32 values are in the file beside the Plan.

    `replace` [n, k]: the student's tensor is the source's, with all its n columns, times the matrix. `add` [n - k, k]:
    it is the source's k kept columns plus the others, in their order, times the matrix. `gain` [1, k]: the student's
    norm, since the source's gain is part of the matrix of what reads it. `sha256` is of its bytes.
    """

    kind: str
    shape: tuple[int, int]
    sha256: str


@dataclass(frozen=True)
class Plan:
    """Selection of entries, from the `source` architecture to the `target` one.

    `kept_layers` are the source's layers that stay, ascending, 0-indexed. `kept_hidden` are the hidden channels that
    stay, or None for all. `kept_ffn[i]`, `kept_groups[i]` and `kept_heads[i]` belong to student layer i, which is
    source layer `kept_layers[i]`; None for all. Every kept group keeps equally many of its heads. `merged_heads[i]` are
    pairs (kept head, dropped head): the query of the kept one becomes twice its own less that of the dropped one. The
    same of a mixture of experts: `kept_experts[i]`, and `kept_moe_ffn[i][j]` of the student's expert j, which is source
    expert `kept_experts[i][j]`; `kept_shared_ffn[i]` are the neurons of the shared expert.

    Where `rotated`, the student's k hidden channels are no entries of the teacher's d but combinations of them, the
    same everywhere: with P [d, k], columns orthonormal, its residual stream is P^T times the teacher's. P is the matrix
    of the embedding; what writes the stream has its rows multiplied by P^T, and what reads it has matrices that undo P.

    `norm_scales` gives norms of the student, by name, a factor on their gains. `matrices` maps tensors of the student
    to what their columns are multiplied by, and norms to the gain that they get; `directory` is where their file lies.

    `gaps` records, per cut (`hidden_size`, `ffn_hidden_size/3`: of source layer 3), the relative difference between the
    worst score kept and the best score dropped: where it is below the accuracy of the Scores, another layout may choose
    otherwise. `provenance` holds fingerprints of the teacher and the Scores and the settings used.
    """

    source: Architecture
    target: Architecture
    kept_layers: tuple[int, ...]
    kept_hidden: tuple[int, ...] | None = None
    rotated: bool = False
    kept_ffn: tuple[tuple[int, ...], ...] | None = None
    kept_groups: tuple[tuple[int, ...], ...] | None = None
    kept_heads: tuple[tuple[int, ...], ...] | None = None
    merged_heads: tuple[tuple[tuple[int, int], ...], ...] | None = None
    kept_experts: tuple[tuple[int, ...], ...] | None = None
    kept_moe_ffn: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    kept_shared_ffn: tuple[tuple[int, ...], ...] | None = None
    norm_scales: Mapping[str, float] = field(default_factory=dict)
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    directory: Path | None = field(default=None, compare=False)
    gaps: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check("kept_layers", self.kept_layers, Axis.LAYERS)
        if self.kept_hidden is not None:
            self._check("kept_hidden", self.kept_hidden, Axis.HIDDEN)
        self._check_kept_per_layer()
        for axis, cut in (
            (Axis.HIDDEN, self.kept_hidden),
            (Axis.FFN, self.kept_ffn),
            (Axis.GROUPS, self.kept_groups),
            (Axis.HEADS, self.kept_heads),
            (Axis.EXPERTS, self.kept_experts),
            (Axis.MOE_FFN, self.kept_moe_ffn),
            (Axis.SHARED_FFN, self.kept_shared_ffn),
        ):
            rotated = axis == Axis.HIDDEN and self.rotated
            if cut is None and not rotated and self.source.size(axis) != self.target.size(axis):
                raise UserError(f"plan: {axis} shrinks but the plan does not say which entries are kept")
        for layer, kept in enumerate(self.kept_heads or ()):
            self._check_heads(layer, kept)
        if self.kept_groups is not None and self.kept_heads is None:
            raise UserError("plan: kept_groups without kept_heads; list the heads of the groups that stay")
        if self.merged_heads is not None:
            self._check_merges(self.merged_heads)
        self._check_repairs()
        self._check_output_and_rotation()

    def _check_kept_per_layer(self) -> None:
        for name, per_layer, axis in (
            ("kept_ffn", self.kept_ffn, Axis.FFN),
            ("kept_groups", self.kept_groups, Axis.GROUPS),
            ("kept_heads", self.kept_heads, Axis.HEADS),
            ("kept_experts", self.kept_experts, Axis.EXPERTS),
            ("kept_shared_ffn", self.kept_shared_ffn, Axis.SHARED_FFN),
        ):
            if per_layer is not None:
                self._check_layers(name, per_layer)
                for layer, kept in enumerate(per_layer):
                    self._check(f"{name}[{layer}]", kept, axis)
        self._check_layers("kept_moe_ffn", self.kept_moe_ffn or self.kept_layers)
        for layer, experts in enumerate(self.kept_moe_ffn or ()):
            if len(experts) != self.target.size(Axis.EXPERTS):
                raise UserError(
                    f"plan: kept_moe_ffn[{layer}] has {len(experts)} experts, the target {self.target.num_moe_experts}"
                )
            for expert, kept in enumerate(experts):
                self._check(f"kept_moe_ffn[{layer}][{expert}]", kept, Axis.MOE_FFN)

    def _check_layers(self, name: str, per_layer: Sequence[object]) -> None:
        if len(per_layer) != len(self.kept_layers):
            raise UserError(f"plan: {name} has {len(per_layer)} layers, kept_layers {len(self.kept_layers)}")

    def _check_heads(self, layer: int, kept: tuple[int, ...]) -> None:
        per_group = self.target.heads_per_group
        groups = np.bincount(np.array(kept) // self.source.heads_per_group, minlength=self.source.num_query_groups)
        wanted = np.full_like(groups, per_group)
        if self.kept_groups is not None:
            wanted[np.setdiff1d(np.arange(len(groups)), self.kept_groups[layer])] = 0
        if (groups != wanted).any():
            raise UserError(
                f"plan: kept_heads[{layer}] keeps {groups.tolist()} heads per query group, not {wanted.tolist()}"
            )

    def _check_merges(self, merged: tuple[tuple[tuple[int, int], ...], ...]) -> None:
        """Raise UserError unless pairs are of a kept and a dropped head of one query group, each head in one pair."""
        kept = self.kept_heads or ()
        if len(merged) != len(kept):
            raise UserError(f"plan: merged_heads has {len(merged)} layers, kept_heads {len(kept)}")
        for layer, pairs in enumerate(merged):
            heads = [head for pair in pairs for head in pair]
            if len(set(heads)) != len(heads) or not set(heads) <= set(range(self.source.num_attention_heads)):
                raise UserError(f"plan: merged_heads[{layer}]: a head is listed twice, or there is no such head")
            for stays, goes in pairs:
                same_group = stays // self.source.heads_per_group == goes // self.source.heads_per_group
                if stays not in kept[layer] or goes in kept[layer] or not same_group:
                    raise UserError(
                        f"plan: merged_heads[{layer}]: ({stays}, {goes}) is not a kept and a dropped head of one group"
                    )

    def _check_repairs(self) -> None:
        """Raise UserError for a norm or a matrix that does not fit the student."""
        if not (self.norm_scales or self.matrices):
            return
        gains = [name for name, matrix in self.matrices.items() if matrix.kind == GAIN]
        if (self.norm_scales or gains) and not family(self.source.family).rescales_norms:
            raise UserError(f"plan: norm_scales and gains are not for the norms of {self.source.family}")
        found = {tensor.name: tensor for tensor in tensors(self.target)}
        for name in (*self.norm_scales, *self.matrices):
            if name not in found:
                raise UserError(f"plan: the target has no tensor {name}")
        for name, factor in self.norm_scales.items():
            if found[name].spec.part != "norm" or not isfinite(factor) or factor <= 0:
                raise UserError(f"plan: norm_scales: {name}: {factor} is no factor on a norm's gain")
        for name in gains:
            wanted = (1, *found[name].spec.shape(self.target))
            if found[name].spec.part != "norm" or name in self.norm_scales or self.matrices[name].shape != wanted:
                raise UserError(
                    f"plan: matrices: {name}: not the gain of a norm, or of another size, or scaled as well"
                )
        for name, matrix in self.matrices.items():
            if name in gains:
                continue
            before, after = (found[name].spec.shape(model)[1:] for model in (self.source, self.target))
            rows = before[0] - after[0] if matrix.kind == ADD else before[0]
            cut = before != after or (self.rotated and before == (self.source.hidden_size,))
            if matrix.kind not in (REPLACE, ADD) or not cut or matrix.shape != (rows, *after):
                raise UserError(f"plan: matrices: {name}: {matrix.kind} {list(matrix.shape)} does not fit its columns")

    def _check_output_and_rotation(self) -> None:
        """Raise UserError for an output that cannot be tied, and where not all that has hidden channels is rotated."""
        if self.target.share_embeddings_and_output_weights and not self.source.share_embeddings_and_output_weights:
            raise UserError("plan: the target's output is its embedding, but the source's has a weight of its own")
        if not (self.rotated and self.matrices):
            return
        if self.kept_hidden is not None or self.target.share_embeddings_and_output_weights:
            raise UserError("plan: rotated, but it keeps hidden channels as they are, or a tied output")
        for name, spec, *_ in tensors(self.target):
            axes = [Axis.HIDDEN in dim.axes for dim in spec.dims]
            if axes == [True] and not self.has_gain(name):
                raise UserError(f"plan: rotated, but {name} keeps the source's gain")
            if axes == [False, True] and (name not in self.matrices or self.matrices[name].kind != REPLACE):
                raise UserError(f"plan: rotated, but {name} has no matrix in place of its columns")

    def has_gain(self, name: str) -> bool:
        """Whether a tensor of the target is a norm whose gain is in the file of matrices."""
        return name in self.matrices and self.matrices[name].kind == GAIN

    def writes_rotated(self, tensor: NamedTensor) -> bool:
        """Whether the rows of a tensor of the target are rotated: it is a matrix that writes the residual stream."""
        return self.rotated and len(tensor.spec.dims) > 1 and Axis.HIDDEN in tensor.spec.dims[0].axes

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

    def kept(self, layer: int | None, expert: int | None = None) -> dict[Axis, Indices]:
        """Kept source entries per cut axis, for tensors of student layer `layer` (None: outside the layers).

        `expert` is the student's; its neurons are left out for None.
        """
        entries: dict[Axis, Indices] = {}
        if self.kept_hidden is not None:
            entries[Axis.HIDDEN] = np.array(self.kept_hidden, dtype=np.int64)
        for axis, per_layer in (
            (Axis.FFN, self.kept_ffn),
            (Axis.HEADS, self.kept_heads),
            (Axis.GROUPS, self.kept_groups),
            (Axis.EXPERTS, self.kept_experts),
            (Axis.SHARED_FFN, self.kept_shared_ffn),
        ):
            if layer is not None and per_layer is not None:
                entries[axis] = np.array(per_layer[layer], dtype=np.int64)
        if layer is not None and expert is not None and self.kept_moe_ffn is not None:
            entries[Axis.MOE_FFN] = np.array(self.kept_moe_ffn[layer][expert], dtype=np.int64)
        return entries

    def source_name(self, tensor: NamedTensor) -> str:
        """Name in the source of a tensor of the student.

        Layers and experts are numbered anew, and an output of its own may come of the embedding that it was tied to.
        """
        if tensor.spec.part == "output" and self.source.share_embeddings_and_output_weights:
            return EMBEDDING
        if tensor.layer is None:
            return tensor.name
        expert = tensor.expert
        if expert is not None and self.kept_experts is not None:
            expert = self.kept_experts[tensor.layer][expert]
        return tensor.spec.name.format(layer=self.kept_layers[tensor.layer], expert=expert)

    def merged_rows(self, tensor: NamedTensor) -> dict[int, int]:
        """Rows of a tensor of the student that become twice themselves less a row of the source: {row: source row}."""
        dim = tensor.spec.dims[0]
        if self.merged_heads is None or tensor.layer is None or not isinstance(dim, QKVDim):
            return {}
        rows = dim.select(self.source, self.kept(tensor.layer))
        assert rows is not None  # heads are cut where they are merged
        merged: dict[int, int] = {}
        for stays, goes in self.merged_heads[tensor.layer]:
            places = np.searchsorted(rows, dim.query_rows(self.source, stays))
            merged |= dict(zip(places.tolist(), dim.query_rows(self.source, goes).tolist(), strict=True))
        return merged

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "kept_layers": self.kept_layers,
            "kept_hidden": self.kept_hidden,
            "rotated": self.rotated,
            "kept_ffn": self.kept_ffn,
            "kept_groups": self.kept_groups,
            "kept_heads": self.kept_heads,
            "merged_heads": self.merged_heads,
            "kept_experts": self.kept_experts,
            "kept_moe_ffn": self.kept_moe_ffn,
            "kept_shared_ffn": self.kept_shared_ffn,
            "norm_scales": dict(self.norm_scales),
            "matrices": {name: asdict(matrix) for name, matrix in self.matrices.items()},
            "gaps": dict(self.gaps),
            "provenance": dict(self.provenance),
        }

    def save(self, path: Path) -> None:
        """Write the Plan without its matrices' values."""
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
                rotated=bool(data["rotated"]),
                kept_ffn=_tuples(data["kept_ffn"]),
                kept_groups=_tuples(data["kept_groups"]),
                kept_heads=_tuples(data["kept_heads"]),
                merged_heads=_pairs(data["merged_heads"]),
                kept_experts=_tuples(data.get("kept_experts")),
                kept_moe_ffn=_per_expert(data.get("kept_moe_ffn")),
                kept_shared_ffn=_tuples(data.get("kept_shared_ffn")),
                norm_scales={name: float(factor) for name, factor in data["norm_scales"].items()},
                matrices={
                    name: Matrix(matrix["kind"], tuple(matrix["shape"]), matrix["sha256"])
                    for name, matrix in data["matrices"].items()
                },
                directory=path.parent,
                gaps=data["gaps"],
                provenance=data["provenance"],
            )
        except FileNotFoundError:
            raise UserError(f"{path}: no such plan") from None
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path}: not a plan: {error!r}") from None


def _tuple(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def _tuples(values: list[list[int]] | None) -> tuple[tuple[int, ...], ...] | None:
    return None if values is None else tuple(tuple(row) for row in values)


def _per_expert(values: list[list[list[int]]] | None) -> tuple[tuple[tuple[int, ...], ...], ...] | None:
    return None if values is None else tuple(tuple(tuple(row) for row in layer) for layer in values)


def _pairs(values: list[list[list[int]]] | None) -> tuple[tuple[tuple[int, int], ...], ...] | None:
    return None if values is None else tuple(tuple((stays, goes) for stays, goes in row) for row in values)
