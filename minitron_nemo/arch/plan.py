"""`Plan`: which entries of which axes a student keeps of its teacher, and how what stays makes up for what goes.

A Plan is a small file that a person can read and diff; its matrices, where it has any, are a safetensors file beside
it. Pruning makes one from Scores; `checkpoint.transform` carries it out, tensor by tensor, without building a model.
The identity Plan is a conversion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Axis, Indices, QKVDim
from minitron_nemo.arch.blocks import EMBEDDING
from minitron_nemo.arch.entries import Entries, read_json, write_json
from minitron_nemo.arch.matrix import Matrix
from minitron_nemo.arch.plan_checks import check
from minitron_nemo.arch.tensors import NamedTensor, norm_readers
from minitron_nemo.errors import UserError

FILE_NAME = "plan.json"  # in the directory of a checkpoint that a Plan made
MATRICES_NAME = "plan.safetensors"  # beside it
SCHEMA_VERSION = 5
# Lists of entries, and how deep they are: one for the model, one of each layer, one of each expert of each layer.
KEPT = {"kept_layers": 0, "kept_hidden": 0, "kept_moe_ffn": 2}
KEPT |= dict.fromkeys(("kept_ffn", "kept_groups", "kept_heads", "kept_experts", "kept_shared_ffn"), 1)


@dataclass(frozen=True)
class Plan:
    """Selection of entries, from the `source` architecture to the `target` one. Lists of them are kept as `Entries`.

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
    to what their columns are multiplied by, and gains and biases of norms to what they become; `directory` is where
    their file lies. What reads the same norm, as a router and all experts do, is multiplied by one matrix, that of the
    first reader.

    `gaps` records, per cut (`hidden_size`, `ffn_hidden_size/3`: of source layer 3), the relative difference between the
    worst score kept and the best score dropped: where it is below the accuracy of the Scores, another layout may choose
    otherwise. `provenance` holds fingerprints of the teacher and the Scores and the settings used.
    """

    source: Architecture
    target: Architecture
    kept_layers: Sequence[int]
    kept_hidden: Sequence[int] | None = None
    rotated: bool = False
    kept_ffn: Sequence[Sequence[int]] | None = None
    kept_groups: Sequence[Sequence[int]] | None = None
    kept_heads: Sequence[Sequence[int]] | None = None
    merged_heads: Sequence[Sequence[tuple[int, int]]] | None = None
    kept_experts: Sequence[Sequence[int]] | None = None
    kept_moe_ffn: Sequence[Sequence[Sequence[int]]] | None = None
    kept_shared_ffn: Sequence[Sequence[int]] | None = None
    norm_scales: Mapping[str, float] = field(default_factory=dict)
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    directory: Path | None = field(default=None, compare=False)
    gaps: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, depth in KEPT.items():
            object.__setattr__(self, name, _entries(getattr(self, name), depth))
        check(self)

    def gives(self, name: str) -> bool:
        """Whether a tensor of the target, a norm's gain or bias, is itself in the file of matrices."""
        return name in self.matrices and self.matrices[name].of_norm

    def matrix_of(self, tensor: NamedTensor) -> str | None:
        """Name of the matrix by which the columns of a tensor of the target are multiplied; None for none."""
        first = self._first_readers.get(tensor.spec.name)
        name = tensor.name if first is None else first.format(layer=tensor.layer)
        return name if name in self.matrices and not self.gives(name) else None

    @cached_property
    def _first_readers(self) -> dict[str, str]:
        """For each line of the table that reads a norm, the first that reads the same one."""
        return {name: readers[0] for readers in norm_readers(self.target).values() for name in readers}

    def writes_rotated(self, tensor: NamedTensor) -> bool:
        """Whether the rows of a tensor of the target are rotated: it is a matrix that writes the residual stream."""
        return self.rotated and len(tensor.spec.dims) > 1 and Axis.HIDDEN in tensor.spec.dims[0].axes

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
            entries[Axis.HIDDEN] = np.asarray(self.kept_hidden)
        for axis, per_layer in (
            (Axis.FFN, self.kept_ffn),
            (Axis.HEADS, self.kept_heads),
            (Axis.GROUPS, self.kept_groups),
            (Axis.EXPERTS, self.kept_experts),
            (Axis.SHARED_FFN, self.kept_shared_ffn),
        ):
            if layer is not None and per_layer is not None:
                entries[axis] = np.asarray(per_layer[layer])
        if layer is not None and expert is not None and self.kept_moe_ffn is not None:
            entries[Axis.MOE_FFN] = np.asarray(self.kept_moe_ffn[layer][expert])
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

    def to_json(self) -> str:
        """The Plan as its file has it, without its matrices' values."""
        content = {
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
        return write_json(content)

    def save(self, path: Path) -> None:
        """Write `to_json`."""
        path.write_text(self.to_json() + "\n")

    @staticmethod
    def load(path: Path) -> Plan:
        """Read a Plan. Raises UserError, naming the file, for anything that is not one."""
        try:
            data = read_json(path.read_text())
            if data["schema_version"] != SCHEMA_VERSION:
                raise UserError(f"{path}: schema_version {data['schema_version']} is not {SCHEMA_VERSION}")
            return Plan(
                source=Architecture.from_dict(data["source"], f"{path}: source"),
                target=Architecture.from_dict(data["target"], f"{path}: target"),
                kept_layers=data["kept_layers"],
                kept_hidden=data["kept_hidden"],
                rotated=bool(data["rotated"]),
                kept_ffn=data["kept_ffn"],
                kept_groups=data["kept_groups"],
                kept_heads=data["kept_heads"],
                merged_heads=_pairs(data["merged_heads"]),
                kept_experts=data.get("kept_experts"),
                kept_moe_ffn=data.get("kept_moe_ffn"),
                kept_shared_ffn=data.get("kept_shared_ffn"),
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
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; give a plan.json") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path}: not a plan: {error!r}") from None


def _entries(kept: Any, depth: int) -> Any:
    """Lists of entries, `depth` deep in tuples."""
    if kept is None or depth == 0:
        return kept if kept is None or isinstance(kept, Entries) else Entries(kept)
    return tuple(_entries(inner, depth - 1) for inner in kept)


def _pairs(values: list[list[list[int]]] | None) -> Sequence[Sequence[tuple[int, int]]] | None:
    return None if values is None else tuple(tuple((stays, goes) for stays, goes in row) for row in values)
