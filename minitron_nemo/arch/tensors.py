"""The table that describes every weight tensor of a family, and what is read off it.

Canonical names are the ones Megatron-core stores: norms under their TransformerEngine names, one entry per layer
(`decoder.layers.3.mlp.linear_fc1.weight`), no prefix. A checkpoint may stack the layers of a tensor or prefix its
name; that is the reader's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Dim
from minitron_nemo.arch.family import family


class Piece(NamedTuple):
    """`length` rows of a Hugging Face tensor from `hf_start` that are our rows from `start`."""

    hf_name: str
    hf_start: int
    start: int
    length: int


@dataclass(frozen=True)
class TensorSpec:
    """One line of a family's table.

    `name` and the Hugging Face names contain `{layer}` where the tensor exists per layer. `tp_dim` is the dim that
    Megatron-core splits over tensor-parallel ranks, None where every rank holds the whole tensor. `hf_pieces` lists,
    for given architecture, which rows of which Hugging Face tensors make up this one, in ascending order of `start`.
    """

    name: str
    dims: tuple[Dim, ...]
    tp_dim: int | None
    hf_pieces: Callable[[Architecture], list[Piece]]
    part: str

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def shape(self, architecture: Architecture) -> tuple[int, ...]:
        return tuple(dim.size(architecture) for dim in self.dims)


class NamedTensor(NamedTuple):
    """A tensor of one concrete model: its canonical name, its line in the table, its layer or None."""

    name: str
    spec: TensorSpec
    layer: int | None

    def hf_pieces(self, architecture: Architecture) -> list[Piece]:
        """`spec.hf_pieces` with the layer filled in."""
        return [
            piece._replace(hf_name=piece.hf_name.format(layer=self.layer))
            for piece in self.spec.hf_pieces(architecture)
        ]


def table(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """The table of the architecture's family; the output layer is absent where it is tied to the embedding."""
    return family(architecture.family).table(architecture)


def tensors(architecture: Architecture) -> Iterator[NamedTensor]:
    """Every tensor of the model, in the order of the forward pass."""
    specs = table(architecture)
    first_layer = next(index for index, spec in enumerate(specs) if spec.per_layer)
    per_layer = [spec for spec in specs if spec.per_layer]
    for spec in specs[:first_layer]:
        yield NamedTensor(spec.name, spec, None)
    for layer in range(architecture.num_layers):
        for spec in per_layer:
            yield NamedTensor(spec.name.format(layer=layer), spec, layer)
    for spec in specs[first_layer:]:
        if not spec.per_layer:
            yield NamedTensor(spec.name, spec, None)
