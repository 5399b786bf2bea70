"""The table that describes every weight tensor of a family, and what is read off it.

Canonical names are the ones Megatron-core stores: norms under their TransformerEngine names, one entry per layer
(`decoder.layers.3.mlp.linear_fc1.weight`) and expert (`decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight`), no
prefix. A checkpoint may stack the layers and experts of a tensor or prefix its name; that is the reader's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Axis, AxisDim, Dim
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

    `name` and the Hugging Face names contain `{layer}` where the tensor exists per layer, `{expert}` as well where it
    exists per expert. `tp_dim` is the dim that Megatron-core splits over tensor-parallel ranks, None where every rank
    holds the whole tensor. `hf_pieces` lists, for given architecture, which rows of which Hugging Face tensors make up
    this one, in ascending order of `start`.
    """

    name: str
    dims: tuple[Dim, ...]
    tp_dim: int | None
    hf_pieces: Callable[[Architecture], list[Piece]]
    part: str

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.name

    @property
    def stacked_name(self) -> str:
        """The name under which Megatron-core stacks the tensors of all layers and experts."""
        return self.name.replace("{layer}.", "").replace("{expert}.", "")

    def stacked_shape(self, architecture: Architecture) -> tuple[int, ...]:
        """Shape of the stack: of all layers, of each its experts."""
        layers = (architecture.num_layers,) if self.per_layer else ()
        experts = (architecture.size(Axis.EXPERTS),) if self.per_expert else ()
        return (*layers, *experts, *self.shape(architecture))

    def shape(self, architecture: Architecture) -> tuple[int, ...]:
        return tuple(dim.size(architecture) for dim in self.dims)


class NamedTensor(NamedTuple):
    """A tensor of one concrete model: its canonical name, its line in the table, its layer and expert or None."""

    name: str
    spec: TensorSpec
    layer: int | None
    expert: int | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """Where it is in the stack of all layers and experts."""
        return tuple(index for index in (self.layer, self.expert) if index is not None)

    def hf_pieces(self, architecture: Architecture) -> list[Piece]:
        """`spec.hf_pieces` with layer and expert filled in."""
        return [
            piece._replace(hf_name=piece.hf_name.format(layer=self.layer, expert=self.expert))
            for piece in self.spec.hf_pieces(architecture)
        ]


def table(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """The table of the architecture's family; the output layer is absent where it is tied to the embedding."""
    return family(architecture.family).table(architecture)


def norm_readers(architecture: Architecture) -> dict[str, list[str]]:
    """The lines of the table that read each norm of the residual stream, by the name of the norm's gain.

    Both in their order; names of a layer contain `{layer}`. Nothing reads the final norm where the output is tied.
    """
    stream = AxisDim(Axis.HIDDEN)
    found: dict[str, list[str]] = {}
    for spec in table(architecture):
        if spec.dims == (stream,) and spec.name.endswith("weight"):
            readers = found[spec.name] = []
        elif found and len(spec.dims) > 1 and spec.dims[1] == stream:
            readers.append(spec.name)
    return found


def residual_norms(architecture: Architecture) -> list[str]:
    """Names of the gains of the norms of the residual stream, in their order; a layer's contain `{layer}`."""
    return list(norm_readers(architecture))


def bias_of(norm: str) -> str:
    """Name of the bias of the norm whose gain is called `norm`."""
    return norm.removesuffix("weight") + "bias"


def tensors(architecture: Architecture) -> Iterator[NamedTensor]:
    """Every tensor of the model, in the order of the forward pass."""
    specs = table(architecture)
    first_layer = next(index for index, spec in enumerate(specs) if spec.per_layer)
    per_layer = [spec for spec in specs if spec.per_layer]
    for spec in specs[:first_layer]:
        yield NamedTensor(spec.name, spec, None)
    for layer in range(architecture.num_layers):
        for spec in per_layer:
            for expert in range(architecture.size(Axis.EXPERTS)) if spec.per_expert else (None,):
                yield NamedTensor(spec.name.format(layer=layer, expert=expert), spec, layer, expert)
    for spec in specs[first_layer:]:
        if not spec.per_layer:
            yield NamedTensor(spec.name, spec, None)
