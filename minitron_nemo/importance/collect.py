"""Hooks on Megatron's transformer layers that measure every axis during one forward-only pass.

    layer input --+-- input norm --> attention --> (linear_proj's input: heads)
                  |
                  +-- + --> pre-MLP norm --> linear_fc1 --> (linear_fc2's input: ffn)
    layer input and output: block influence;  the two norms' outputs: hidden

TransformerEngine fuses a norm into the linear layer that follows, where no hook sees its output. So norms are measured
from their inputs, which both specs show: |norm(x)| is |gain| |x| / rms(x), and sums of it need no normalised tensor.

Sums over a sequence are complete before anything that is not linear happens to them: under sequence parallelism they
are all-reduced over the tensor-parallel group first. Moments over sequences stay on the rank that measured them until
`Collector.scores` adds up all ranks. Context parallelism is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, distributed, nn

from minitron_nemo.arch import Architecture
from minitron_nemo.importance.reduce import absolute_sums, cosines, head_norms, sequence_moments, token_norms
from minitron_nemo.importance.scores import AGGREGATIONS, Scores

MOMENTS = (2, len(AGGREGATIONS))


@dataclass
class LayerSums:
    """What one layer has measured on this rank; fp64. `heads` and `ffn` are this tensor-parallel rank's slice."""

    norms: Tensor  # [2, 3, 2 (input, pre-MLP), h]
    ffn: Tensor  # [2, 3, ffn/tp]
    heads: Tensor  # [2, 3, heads/tp]
    cosine: Tensor  # [], sum over this rank's tokens


@dataclass(frozen=True)
class Counted:
    """Which tokens of a microbatch count. Sequence-parallel ranks see their share of the norms' tokens."""

    mask: Tensor  # fp32 [b, s], 1 or 0
    local_mask: Tensor  # fp32 [b, s/tp] under sequence parallelism, else `mask`
    tokens: Tensor  # fp64 [b]


class Collector:
    """Measures while it is entered: attaches hooks to the layers of this rank's model chunks, and removes them.

    `microbatches` are this data-parallel rank's, in the order in which Megatron's schedule runs them; of each, only
    `token_weights` [b, s] is read. Microbatches that the schedule runs beyond them do not count. `on_microbatch` is
    called whenever the rank's first layer has seen one.
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
        self.device = next(chunks[0].parameters()).device
        self.sums = {layer.layer_number: self._layer_sums() for layers in self.chunks for layer in layers}
        self.handles: list[Any] = []

    def __enter__(self) -> Collector:
        for layers in self.chunks:
            norms: list[tuple[Tensor, Tensor]] = []  # of this microbatch: where moments go, sums of this rank's tokens
            for layer in layers:
                self._attach(layer, norms, last=layer is layers[-1])
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def scores(self, *, model_fingerprint: str, data_fingerprint: str, settings: Mapping[str, Any]) -> Scores:
        """Everything that all ranks measured. Collective over the whole job; every rank gets the same Scores."""
        shape = self.architecture
        layers = shape.num_layers
        hidden = self._zeros(*MOMENTS, layers, 2, shape.hidden_size)
        ffn = self._zeros(*MOMENTS, layers, shape.ffn_hidden_size)
        heads = self._zeros(*MOMENTS, layers, shape.num_attention_heads)
        cosine = self._zeros(layers)
        counts = self._zeros(2)  # sequences, tokens
        for number, sums in self.sums.items():
            layer = number - 1
            ffn[:, :, layer, self._slice(shape.ffn_hidden_size)] = sums.ffn
            heads[:, :, layer, self._slice(shape.num_attention_heads)] = sums.heads
            # What all tensor-parallel ranks hold alike is given by the first; cosines of other tokens by each.
            if self.tp_rank == 0:
                hidden[:, :, layer] = sums.norms
            if self.tp_rank == 0 or self.sequence_parallel:
                cosine[layer] = sums.cosine
        if self.tp_rank == 0 and parallel_state.get_pipeline_model_parallel_rank() == 0:
            for microbatch in self.microbatches:
                tokens = (microbatch["token_weights"] != 0).sum(dim=1)
                counts += torch.stack([(tokens > 0).sum(), tokens.sum()])
        for array in (hidden, ffn, heads, cosine, counts):
            distributed.all_reduce(array)  # over all ranks: each entry has one contributor per data-parallel replica
        sequences, tokens = counts.tolist()
        return Scores(
            architecture=shape,
            hidden=hidden.flatten(2, 3).cpu().numpy(),
            ffn=ffn.cpu().numpy(),
            heads=heads.cpu().numpy(),
            block_influence=(1 - cosine / tokens).cpu().numpy(),
            sequences=int(sequences),
            tokens=int(tokens),
            model_fingerprint=model_fingerprint,
            data_fingerprint=data_fingerprint,
            settings=settings,
        )

    def _attach(self, layer: TransformerLayer, norms: list[tuple[Tensor, Tensor]], last: bool) -> None:
        sums = self.sums[layer.layer_number]
        counted: list[Counted] = []  # of the microbatch that is in the layer

        def on_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Megatron's schedules number the microbatches on the layers, chunk by chunk.
            counted[:] = [self._counted(layer.current_microbatch)]

        def on_heads(module: nn.Module, args: tuple[Any, ...]) -> None:
            lengths = head_norms(args[0], self.architecture.kv_channels)  # [s, b, heads/tp]
            sums.heads += sequence_moments(absolute_sums(lengths, counted[0].mask), counted[0].tokens)

        def on_pre_mlp(module: nn.Module, args: tuple[Any, ...]) -> None:
            gain = _gain(layer.pre_mlp_layernorm, layer.mlp.linear_fc1)
            norms.append((sums.norms[:, :, 1], self._norm_sums(args[0], token_norms(args[0]), gain, counted[0])))

        def on_ffn(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums.ffn += sequence_moments(absolute_sums(args[0], counted[0].mask), counted[0].tokens)

        def on_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states, result = kwargs["hidden_states"], output[0]  # [s(/tp), b, h]
            lengths = token_norms(states)
            gain = _gain(layer.input_layernorm, layer.self_attention.linear_qkv)
            norms.append((sums.norms[:, :, 0], self._norm_sums(states, lengths, gain, counted[0])))
            cosine = cosines(states, result, lengths) * counted[0].local_mask.t()
            sums.cosine += cosine.sum(dtype=torch.float64)
            if last:
                self._finish_norms(norms, counted[0])
            if layer is self.chunks[0][0] and layer.current_microbatch < len(self.microbatches):
                self.on_microbatch()

        self.handles += [
            layer.register_forward_pre_hook(on_input),
            layer.self_attention.linear_proj.register_forward_pre_hook(on_heads),
            layer.pre_mlp_layernorm.register_forward_pre_hook(on_pre_mlp),
            layer.mlp.linear_fc2.register_forward_pre_hook(on_ffn),
            layer.register_forward_hook(on_output, with_kwargs=True),
        ]

    def _norm_sums(self, states: Tensor, lengths: Tensor, gain: Tensor, counted: Counted) -> Tensor:
        """`absolute_sums` of RMSNorm(states) over this rank's tokens: [2, b, h]."""
        scale = torch.rsqrt(lengths.square() / states.shape[-1] + self.architecture.layernorm_epsilon)  # [s, b]
        size = gain.detach().double().abs()
        return absolute_sums(states, counted.local_mask * scale.t()) * torch.stack([size, size**2])[:, None]

    def _finish_norms(self, norms: list[tuple[Tensor, Tensor]], counted: Counted) -> None:
        """Complete the sums over sequences, then add their moments. One all-reduce a chunk and microbatch."""
        stacked = torch.stack([sums for _, sums in norms])  # [2 x layers of the chunk, 2, b, h]
        if self.sequence_parallel:
            distributed.all_reduce(stacked, group=self.tp_group)
        for (moments, _), sums in zip(norms, stacked, strict=True):
            moments += sequence_moments(sums, counted.tokens)
        norms.clear()

    def _counted(self, microbatch: int) -> Counted:
        fills = microbatch >= len(self.microbatches)
        weights = self.microbatches[-1 if fills else microbatch]["token_weights"]  # [b, s]
        mask = torch.zeros_like(weights) if fills else (weights != 0).float()
        local = mask.chunk(self.tp_size, dim=1)[self.tp_rank] if self.sequence_parallel else mask
        return Counted(mask, local, mask.sum(dim=1, dtype=torch.float64))

    def _layer_sums(self) -> LayerSums:
        shape = self.architecture
        return LayerSums(
            norms=self._zeros(*MOMENTS, 2, shape.hidden_size),
            ffn=self._zeros(*MOMENTS, shape.ffn_hidden_size // self.tp_size),
            heads=self._zeros(*MOMENTS, shape.num_attention_heads // self.tp_size),
            cosine=self._zeros(),
        )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _slice(self, size: int) -> slice:
        """This tensor-parallel rank's share of an axis: ranks hold contiguous, equal parts."""
        return slice(self.tp_rank * size // self.tp_size, (self.tp_rank + 1) * size // self.tp_size)


def _gain(norm: nn.Module, fused: nn.Module) -> Tensor:
    """A norm's gain: its own weight, or that of the linear layer that TransformerEngine fused it into."""
    return norm.weight if hasattr(norm, "weight") else fused.layer_norm_weight
