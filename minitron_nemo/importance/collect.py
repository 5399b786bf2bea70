"""Hooks on Megatron's transformer layers that measure every axis during one forward-only pass.

    layer input --+-- input norm --> attention --> (linear_proj's input: heads)
                  |
                  +-- + --> pre-MLP norm --> linear_fc1 --> (linear_fc2's input: ffn)
    layer input and output: block influence;  the two norms' outputs: hidden

TransformerEngine fuses a norm into the linear layer that follows, where no hook sees its output. So norms are measured
from their inputs, which both specs show: |RMSNorm(x)| is |gain| |x| / rms(x), and sums of it need no normalised tensor.
LayerNorm's mean and bias cannot be taken out of the sums like that: it is computed again, span by span.

Sums over a sequence are complete before anything that is not linear happens to them: under sequence parallelism they
are all-reduced over the tensor-parallel group first. Moments over sequences stay on the rank that measured them until
`Collector.scores` adds up all ranks. Context parallelism is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, distributed, nn
from torch.nn import functional

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.family import Family, family
from minitron_nemo.importance.reduce import Reducer, head_sums, sequence_moments, token_norms
from minitron_nemo.importance.scores import AGGREGATIONS, Scores


@dataclass(frozen=True)
class Counted:
    """Which tokens of a microbatch count. Sequence-parallel ranks see their share of the norms' tokens."""

    mask: Tensor  # fp32 [b, s], 1 or 0
    local_mask: Tensor  # fp32 [b, s/tp] under sequence parallelism, else `mask`
    tokens: Tensor  # fp64 [b]


class Norm(NamedTuple):
    """Gain and bias [h] of a norm; an RMSNorm has no bias."""

    gain: Tensor
    bias: Tensor | None


class ChunkSums:
    """What the layers of one model chunk measure on this rank; fp64.

    `totals` has moments over the sequences so far: `norms` [2, 3, 2 x layers, h], input and pre-MLP norm in turn; `ffn`
    [2, 3, layers, ffn/tp] and `heads` [2, 3, layers, heads/tp], this tensor-parallel rank's slices; and `cosines`
    [layers], summed over this rank's tokens. `current` lists the same of the microbatch that is in the chunk, layer by
    layer, before any aggregation: sums [2, b, n] of each sequence.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.current: dict[str, list[Tensor]] = {"norms": [], "ffn": [], "heads": [], "cosines": []}

    def finish_microbatch(self, tokens: Tensor, shards: distributed.ProcessGroup | None) -> None:
        """Move `current` to `totals`; `tokens` [b] counts. Sums of norms are completed over the group `shards`."""
        sums = {name: torch.stack(by_layer) for name, by_layer in self.current.items()}
        if shards is not None:
            distributed.all_reduce(sums["norms"], group=shards)
        for name, measured in sums.items():
            added = measured if name == "cosines" else sequence_moments(measured, tokens)
            self.totals[name] = self.totals[name].add_(added) if name in self.totals else added
            self.current[name].clear()


class Collector:
    """Measures while it is entered: attaches hooks to the layers of this rank's model chunks, and removes them.

    `microbatches` are this data-parallel rank's, in the order in which Megatron's schedule runs them; of each, only
    `token_weights` [b, s] is read. Microbatches that the schedule runs beyond them do not count. `on_microbatch` is
    called whenever one enters the rank's first layer.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        architecture: Architecture,
        microbatches: Sequence[Mapping[str, Any]],
        *,
        sequence_parallel: bool,
        on_microbatch: Callable[[], None],
    ) -> None:
        self.architecture = architecture
        self.microbatches = microbatches
        self.sequence_parallel = sequence_parallel
        self.on_microbatch = on_microbatch
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.chunks = [[m for m in chunk.modules() if isinstance(m, TransformerLayer)] for chunk in chunks]
        self.sums = [ChunkSums() for _ in chunks]
        self.device = next(chunks[0].parameters()).device
        self.reducer = Reducer(self.device)
        self.handles: list[Any] = []

    def __enter__(self) -> Collector:
        for layers, sums in zip(self.chunks, self.sums, strict=True):
            self._attach_chunk(layers, sums)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def scores(self, *, model_fingerprint: str, data_fingerprint: str, settings: Mapping[str, Any]) -> Scores:
        """Everything that all ranks measured. Collective over the whole job; every rank gets the same Scores."""
        shape, moments = self.architecture, (2, len(AGGREGATIONS))
        layers = shape.num_layers
        norms = self._zeros(*moments, layers, 2, shape.hidden_size)
        ffn = self._zeros(*moments, layers, shape.ffn_hidden_size)
        heads = self._zeros(*moments, layers, shape.num_attention_heads)
        cosines = self._zeros(layers)
        counts = self._zeros(2)  # sequences, tokens
        for chunk, sums in zip(self.chunks, self.sums, strict=True):
            mine = [layer.layer_number - 1 for layer in chunk]
            ffn[:, :, mine, self._slice(shape.ffn_hidden_size)] = sums.totals["ffn"]
            heads[:, :, mine, self._slice(shape.num_attention_heads)] = sums.totals["heads"]
            # What all tensor-parallel ranks hold alike is given by the first; cosines of other tokens by each.
            if self.tp_rank == 0:
                norms[:, :, mine] = sums.totals["norms"].unflatten(2, (len(mine), 2))
            if self.tp_rank == 0 or self.sequence_parallel:
                cosines[mine] = sums.totals["cosines"]
        if self.tp_rank == 0 and parallel_state.get_pipeline_model_parallel_rank() == 0:
            for microbatch in self.microbatches:
                tokens = (microbatch["token_weights"] != 0).sum(dim=1)
                counts += torch.stack([(tokens > 0).sum(), tokens.sum()])
        for array in (norms, ffn, heads, cosines, counts):
            distributed.all_reduce(array)  # over all ranks: each entry has one contributor per data-parallel replica
        sequences, tokens = counts.tolist()
        return Scores(
            architecture=shape,
            hidden=norms.flatten(2, 3).cpu().numpy(),
            ffn=ffn.cpu().numpy(),
            heads=heads.cpu().numpy(),
            block_influence=(1 - cosines / tokens).cpu().numpy(),
            sequences=int(sequences),
            tokens=int(tokens),
            model_fingerprint=model_fingerprint,
            data_fingerprint=data_fingerprint,
            settings=settings,
        )

    def _attach_chunk(self, layers: list[TransformerLayer], sums: ChunkSums) -> None:
        counted: list[Counted] = []  # of the microbatch that is in the chunk

        def on_microbatch(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Megatron's schedules number the microbatches on the layers, chunk by chunk.
            microbatch = layers[0].current_microbatch
            counted[:] = [self._counted(microbatch)]
            if layers is self.chunks[0] and microbatch < len(self.microbatches):
                self.on_microbatch()

        def after_microbatch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            sums.finish_microbatch(counted[0].tokens, self.tp_group if self.sequence_parallel else None)

        self.handles.append(layers[0].register_forward_pre_hook(on_microbatch))
        for layer in layers:
            self._attach(layer, sums, counted)
        self.handles.append(layers[-1].register_forward_hook(after_microbatch))

    def _attach(self, layer: TransformerLayer, sums: ChunkSums, counted: list[Counted]) -> None:
        def on_heads(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums.current["heads"].append(head_sums(args[0], counted[0].mask, self.architecture.kv_channels))

        def on_pre_mlp(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums.current["norms"].append(self._norm_sums(args[0], token_norms(args[0]), pre_mlp_norm, counted[0]))

        def on_ffn(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums.current["ffn"].append(self.reducer.absolute_sums(args[0], counted[0].mask))

        def on_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states, result = kwargs["hidden_states"], output[0]  # [s(/tp), b, h]
            lengths = token_norms(states)
            cosines = self.reducer.cosines(states, result, lengths) * counted[0].local_mask.t()
            sums.current["cosines"].append(cosines.sum(dtype=torch.float64))
            # Its norm comes first, but the length of its input is needed here anyway.
            sums.current["norms"].insert(-1, self._norm_sums(states, lengths, input_norm, counted[0]))

        traits = family(self.architecture.family)
        input_norm = _norm(layer.input_layernorm, layer.self_attention.linear_qkv, traits)
        pre_mlp_norm = _norm(layer.pre_mlp_layernorm, layer.mlp.linear_fc1, traits)
        self.handles += [
            layer.self_attention.linear_proj.register_forward_pre_hook(on_heads),
            layer.pre_mlp_layernorm.register_forward_pre_hook(on_pre_mlp),
            layer.mlp.linear_fc2.register_forward_pre_hook(on_ffn),
            layer.register_forward_hook(on_output, with_kwargs=True),
        ]

    def _norm_sums(self, states: Tensor, lengths: Tensor, norm: Norm, counted: Counted) -> Tensor:
        """`absolute_sums` of the normed states over this rank's tokens: [2, b, h]. `lengths` are the states' norms."""
        epsilon = self.architecture.layernorm_epsilon
        if norm.bias is not None:
            gain, bias = norm.gain.float(), norm.bias.float()
            return self.reducer.absolute_sums(
                states,
                counted.local_mask,
                lambda span: functional.layer_norm(span, span.shape[-1:], gain, bias, epsilon),
            )
        scale = torch.rsqrt(lengths.square() / states.shape[-1] + epsilon)  # [s, b]
        size = norm.gain.double().abs()
        of_both_sums = torch.stack([size, size.square()])[:, None]  # [2, 1, h]
        return self.reducer.absolute_sums(states, counted.local_mask * scale.t()).mul_(of_both_sums)

    def _counted(self, microbatch: int) -> Counted:
        fills = microbatch >= len(self.microbatches)
        weights = self.microbatches[-1 if fills else microbatch]["token_weights"]  # [b, s]
        mask = torch.zeros_like(weights) if fills else (weights != 0).float()
        local = mask.chunk(self.tp_size, dim=1)[self.tp_rank] if self.sequence_parallel else mask
        return Counted(mask, local, mask.sum(dim=1, dtype=torch.float64))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _slice(self, size: int) -> slice:
        """This tensor-parallel rank's share of an axis: ranks hold contiguous, equal parts."""
        return slice(self.tp_rank * size // self.tp_size, (self.tp_rank + 1) * size // self.tp_size)


def _norm(norm: nn.Module, fused: nn.Module, traits: Family) -> Norm:
    """The parameters of a norm: its own, or those of the linear layer that TransformerEngine fused it into."""
    module, prefix = (norm, "") if hasattr(norm, "weight") else (fused, "layer_norm_")
    gain = getattr(module, prefix + "weight").detach()
    bias = getattr(module, prefix + "bias").detach() if traits.normalization == "LayerNorm" else None
    return Norm(gain + 1 if traits.layernorm_zero_centered_gamma else gain, bias)
