"""Where a cut model is repaired: the tensors whose columns are fitted, in the Plan, and what holds them in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.axes import Indices
from minitron_nemo.arch.family import family
from minitron_nemo.arch.tensors import norm_readers
from minitron_nemo.importance.counted import Norm, final_norm, layer_norms, norm_of, transformer_layers
from minitron_nemo.importance.scores import FINAL_NORM

Cut = Indices | Tensor  # the kept columns of a selection [k], or the columns of a rotation [n, k]


@dataclass(frozen=True)
class Place:
    """Tensor `name` of the student, at source layer `layer` (num_layers: behind the last); the norm it reads or None.

    `cut` makes the student's columns of the source's, which are entries of `axis`; `expert` is the source's. What reads
    the same norm has one place, of the first reader's name.
    """

    name: str
    layer: int
    norm: str | None
    cut: Cut
    axis: Axis
    expert: int | None = None

    @property
    def columns(self) -> int:
        return self.cut.shape[-1]

    @property
    def before_mlp(self) -> bool:
        """Whether it is behind the norm between a layer's attention and its MLP."""
        return self.norm is not None and ".mlp." in self.name

    def rows(self, source: Architecture, tp_size: int) -> int:
        """Rows of the sums that a rank holds: y and x behind a norm, a tensor-parallel rank's slice of x otherwise.

        Those of the 1 behind a LayerNorm are left out.
        """
        if self.norm is not None:
            return self.columns + source.hidden_size
        return source.size(self.axis) // tp_size


def has_means(architecture: Architecture) -> bool:
    """Whether its norms are LayerNorms, so that the sums behind them have a 1 behind x and y."""
    return family(architecture.family).normalization == "LayerNorm"


def places(plan: Plan, *, ffn: bool, hidden: bool, rotation: Tensor | None = None) -> list[Place]:
    """Where `plan` cuts what is to be repaired, in the order of the forward pass. A tied output has no map.

    `rotation` [h, k] is that of a rotated plan, fp32 with orthonormal columns.
    """
    found = []
    channels: Cut | None = plan.kept(None).get(Axis.HIDDEN) if rotation is None else rotation
    *of_layer, (final, outputs) = norm_readers(plan.target).items()
    for layer, source in enumerate(plan.kept_layers):
        if hidden and channels is not None:
            for norm, (first, *_) in of_layer:
                found.append(Place(first.format(layer=layer), source, norm.format(layer=layer), channels, Axis.HIDDEN))
        found += _down_projections(plan, layer) if ffn else []
    if hidden and channels is not None and outputs:
        found.append(Place(outputs[0], plan.source.num_layers, final, channels, Axis.HIDDEN))
    return found


def _down_projections(plan: Plan, layer: int) -> list[Place]:
    """The linear_fc2 of student layer `layer` that lose columns: of its MLP, or of its experts and a shared one."""
    prefix, source = f"decoder.layers.{layer}.mlp.", plan.kept_layers[layer]
    found = []
    for axis, mlp in ((Axis.FFN, ""), (Axis.SHARED_FFN, "shared_experts.")):
        if (neurons := plan.kept(layer).get(axis)) is not None:
            found.append(Place(f"{prefix}{mlp}linear_fc2.weight", source, None, neurons, axis))
    experts: Sequence[int] = range(plan.source.size(Axis.EXPERTS))
    for number, expert in enumerate(experts if plan.kept_experts is None else plan.kept_experts[layer]):
        if (neurons := plan.kept(layer, number).get(Axis.MOE_FFN)) is not None:
            name = f"{prefix}experts.experts.{number}.linear_fc2.weight"
            found.append(Place(name, source, None, neurons, Axis.MOE_FFN, expert))
    return found


def owners(chunk: nn.Module, architecture: Architecture) -> dict[int, Any]:
    """What holds the places of a model chunk, by their layer: its layers, and the final norm where it is there."""
    found: dict[int, Any] = {layer.layer_number - 1: layer for layer in transformer_layers(chunk)}
    last = final_norm(chunk)
    return found if last is None else found | {architecture.num_layers: last}


def norm_read(place: Place, chunks: Sequence[nn.Module], architecture: Architecture) -> Norm:
    """The norm that a place of this rank reads."""
    (module,) = [found[place.layer] for chunk in chunks if place.layer in (found := owners(chunk, architecture))]
    traits = family(architecture.family)
    if place.norm == FINAL_NORM:
        return norm_of(module, None, traits)
    input_norm, pre_mlp_norm = layer_norms(module, traits)
    return pre_mlp_norm if place.before_mlp else input_norm
