"""Second moments of what the tensors of a cut model read, and the least-squares maps that follow from them.

A `Place` is a tensor of the student whose columns are an axis that is cut. Its teacher's counterpart W reads x [n], it
will read y [k]: of linear_fc2, y are the kept entries of x; behind an RMSNorm, x is the normalised residual stream
before the gain and y the same of the kept channels alone. Wanted is the matrix M [n, k] for which W M y is nearest to W
x for every W: with A = sum y y^T, X = sum x y^T over tokens, S the selection [n, k] and c = <x[kept], y> / <y, y>,

    M = c S + (X - c S A) (A + ridge * mean(diag A) * I)^-1

A large ridge gives the plain cut, c S. One M serves all tensors that read the same x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, distributed, nn

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.axes import Indices
from minitron_nemo.arch.family import family
from minitron_nemo.errors import UserError
from minitron_nemo.importance.counted import Current, final_norm, layer_norms, norm_of, transformer_layers
from minitron_nemo.importance.scores import FINAL_NORM, LAYER_NORMS

SPAN_TOKENS = 2048  # multiplied at once, in fp32; spans are added up in fp64


@dataclass(frozen=True)
class Place:
    """Tensor `name` of the student, at source layer `layer` (num_layers: behind the last); the norm it reads or None.

    `kept` are the source's columns that stay.
    """

    name: str
    layer: int
    norm: str | None
    kept: Indices

    def rows(self, source: Architecture, tp_size: int) -> int:
        """Rows of the sums that a rank holds: y and x behind a norm, a tensor-parallel rank's slice of x otherwise."""
        if self.norm is not None:
            return len(self.kept) + source.hidden_size
        return source.ffn_hidden_size // tp_size


def places(plan: Plan, *, ffn: bool, hidden: bool) -> list[Place]:
    """Where `plan` cuts what is to be repaired, in the order of the forward pass. A tied output has no map."""
    found = []
    channels = plan.kept(None).get(Axis.HIDDEN)
    for layer, source in enumerate(plan.kept_layers):
        if hidden and channels is not None:
            for norm in (name.format(layer=layer) for name in LAYER_NORMS):
                found.append(Place(norm.replace(".layer_norm_weight", ".weight"), source, norm, channels))
        neurons = plan.kept(layer).get(Axis.FFN)
        if ffn and neurons is not None:
            found.append(Place(f"decoder.layers.{layer}.mlp.linear_fc2.weight", source, None, neurons))
    if hidden and channels is not None and not plan.source.share_embeddings_and_output_weights:
        found.append(Place("output_layer.weight", plan.source.num_layers, FINAL_NORM, channels))
    return found


class Moments:
    """Sums of A and X over the tokens of a pass, fp64, while it is entered, at those `places` that are on this rank.

    `sums[name]` is [rows, k]: [A; X] of a norm over this rank's tokens, X of linear_fc2 over this rank's rows. All
    ranks of a tensor-parallel group take part in every token; those of a data-parallel group each have their own.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        architecture: Architecture,
        microbatches: Sequence[Mapping[str, Any]],
        places: Sequence[Place],
        *,
        sequence_parallel: bool,
        on_microbatch: Callable[[], None],
    ) -> None:
        self.chunks = chunks
        self.architecture = architecture
        self.microbatches = microbatches
        self.sequence_parallel = sequence_parallel
        self.on_microbatch = on_microbatch
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.tp_rank, self.tp_size = self.tp_group.rank(), self.tp_group.size()
        self.device = next(chunks[0].parameters()).device
        self.places = places
        self.sums = {
            place.name: torch.zeros(
                place.rows(architecture, self.tp_size), len(place.kept), dtype=torch.float64, device=self.device
            )
            for place in places
        }
        self.handles: list[Any] = []

    def __enter__(self) -> Moments:
        for chunk in self.chunks:
            layers = transformer_layers(chunk)
            current = Current(
                layers,
                self.microbatches,
                sequence_parallel=self.sequence_parallel,
                on_microbatch=self.on_microbatch if chunk is self.chunks[0] else None,
            )
            self.handles.append(current.handle)
            modules = owners(chunk, self.architecture)
            for place in self.places:
                if place.layer in modules:
                    self._attach(place, modules[place.layer], current)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _attach(self, place: Place, module: nn.Module, current: Current) -> None:
        def on_ffn(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._add_ffn(place, args[0][current.counted.mask.t() != 0])

        def on_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]  # [s(/tp), b, h]
            tokens = states[current.counted.local_mask.t() != 0]
            # Without sequence parallelism all tensor-parallel ranks hold the same tokens: each takes its share.
            self._add_norm(place, tokens if self.sequence_parallel else tokens[self.tp_rank :: self.tp_size])

        if place.norm is None:
            assert isinstance(module, TransformerLayer)
            handle = module.mlp.linear_fc2.register_forward_pre_hook(on_ffn)
        else:
            reads_mlp = place.name.endswith("linear_fc1.weight")
            watched: nn.Module = module.pre_mlp_layernorm if reads_mlp else module  # type: ignore[assignment]
            handle = watched.register_forward_pre_hook(on_norm, with_kwargs=True)
        self.handles.append(handle)

    def _add_ffn(self, place: Place, tokens: Tensor) -> None:
        kept = torch.from_numpy(place.kept).to(self.device)
        for part in _spans(tokens):  # [t, f/tp]
            shards = [torch.empty_like(part) for _ in range(self.tp_size)]
            distributed.all_gather(shards, part.contiguous(), group=self.tp_group)
            whole = torch.cat(shards, dim=1).float()  # [t, f]
            self.sums[place.name] += part.float().t() @ whole[:, kept]

    def _add_norm(self, place: Place, tokens: Tensor) -> None:
        kept = torch.from_numpy(place.kept).to(self.device)
        for part in _spans(tokens):  # [t, h]
            states = part.float()
            few = self._normalised(states[:, kept])
            both = torch.cat([few, self._normalised(states)], dim=1)  # [t, k + h]
            self.sums[place.name] += both.t() @ few

    def _normalised(self, states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + self.architecture.layernorm_epsilon)

    def totals(self) -> Iterator[tuple[Place, Tensor]]:
        """This rank's share of the stage's places, each with its sums over all tokens and rows; `sums` is consumed.

        [A; X] of a norm, [k + h, k], X [f, k] of linear_fc2, whose rows `kept` are A. Collective over the tensor- and
        data-parallel ranks of the stage, which get the places in turn.
        """
        group = parallel_state.get_tensor_and_data_parallel_group()
        for number, place in enumerate(self.places):
            mine = self.sums.pop(place.name)
            if place.norm is None:
                whole = mine.new_zeros(self.architecture.ffn_hidden_size, mine.shape[1])
                whole[self.tp_rank * len(mine) : (self.tp_rank + 1) * len(mine)] = mine
                mine = whole
            owner = number % group.size()
            distributed.reduce(mine, dst=distributed.get_global_rank(group, owner), group=group)
            if group.rank() == owner:
                yield place, mine


def fit(place: Place, totals: Tensor, ridge: float) -> Tensor:
    """The map M [n, k], fp64, of a place with its `Moments.totals`. Raises UserError where they are not finite."""
    if not bool(totals.isfinite().all()):
        raise UserError(f"repair: what {place.name} reads is not finite everywhere; does the model give finite logits?")
    if place.norm is None:
        return least_squares(totals, totals[torch.from_numpy(place.kept)], place.kept, ridge)
    count = len(place.kept)
    return least_squares(totals[count:], totals[:count], place.kept, ridge)


def least_squares(cross: Tensor, second: Tensor, kept: Indices, ridge: float) -> Tensor:
    """M [n, k] of the formula above from X [n, k] and A [k, k], fp64. Without any signal the plain cut."""
    rows = torch.from_numpy(np.ascontiguousarray(kept)).to(cross.device)
    identity = torch.eye(len(kept), dtype=cross.dtype, device=cross.device)
    size = second.diagonal().mean()
    if size == 0:
        return torch.zeros_like(cross).index_copy_(0, rows, identity)
    scale = cross[rows].diagonal().mean() / size
    rest = cross.index_add(0, rows, second, alpha=-float(scale))
    factor = torch.linalg.cholesky(second + ridge * size * identity)
    fitted = torch.cholesky_solve(rest.t(), factor).t()
    return fitted.index_add(0, rows, identity, alpha=float(scale))


def owners(chunk: nn.Module, architecture: Architecture) -> dict[int, Any]:
    """What holds the places of a model chunk, by their layer: its layers, and the final norm where it is there."""
    found: dict[int, Any] = {layer.layer_number - 1: layer for layer in transformer_layers(chunk)}
    last = final_norm(chunk)
    return found if last is None else found | {architecture.num_layers: last}


def gain_of(place: Place, chunks: Sequence[nn.Module], architecture: Architecture) -> Tensor:
    """The gain [h] of the norm that a place of this rank reads."""
    (module,) = [found[place.layer] for chunk in chunks if place.layer in (found := owners(chunk, architecture))]
    traits = family(architecture.family)
    if place.norm == FINAL_NORM:
        return norm_of(module, None, traits).gain
    input_norm, pre_mlp_norm = layer_norms(module, traits)
    return pre_mlp_norm.gain if place.name.endswith("linear_fc1.weight") else input_norm.gain


def _spans(tokens: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(tokens), SPAN_TOKENS):
        yield tokens[start : start + SPAN_TOKENS]
