"""What measurements need of a model chunk: its layers and norms, and which tokens of its microbatch count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from minitron_nemo.arch.family import Family


@dataclass(frozen=True)
class Counted:
    """Which tokens of a microbatch count. Sequence-parallel ranks see their share of the norms' tokens."""

    mask: Tensor  # fp32 [b, s], 1 or 0
    local_mask: Tensor  # fp32 [b, s/tp] under sequence parallelism, else `mask`
    tokens: Tensor  # fp64 [b]


class Current:
    """The tokens that count in the microbatch that is in a model chunk: set whenever one enters the first of `layers`.

    `microbatches` are this data-parallel rank's, in the order in which Megatron's schedule runs them; of each, only
    `token_weights` [b, s] is read. A run of the schedule is of those in `span`, by default of all; microbatches that it
    runs beyond them do not count. `on_microbatch` is called for each of the others.
    """

    counted: Counted
    span: tuple[int, int] | None = None

    def __init__(
        self,
        layers: Sequence[TransformerLayer],
        microbatches: Sequence[Mapping[str, Any]],
        *,
        sequence_parallel: bool,
        on_microbatch: Callable[[], None] | None,
    ) -> None:
        self.first = layers[0]
        self.microbatches = microbatches
        self.sequence_parallel = sequence_parallel
        self.on_microbatch = on_microbatch
        self.handle = self.first.register_forward_pre_hook(self._enter)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Megatron's schedules number the microbatches on the layers, chunk by chunk, from 0 in every run.
        start, stop = self.span or (0, len(self.microbatches))
        microbatch = start + self.first.current_microbatch
        fills = microbatch >= stop
        weights = self.microbatches[-1 if fills else microbatch]["token_weights"]  # [b, s]
        mask = torch.zeros_like(weights) if fills else (weights != 0).float()
        local = mask
        if self.sequence_parallel:
            parts = mask.chunk(parallel_state.get_tensor_model_parallel_world_size(), dim=1)
            local = parts[parallel_state.get_tensor_model_parallel_rank()]
        self.counted = Counted(mask, local, mask.sum(dim=1, dtype=torch.float64))
        if self.on_microbatch is not None and not fills:
            self.on_microbatch()


def transformer_layers(chunk: nn.Module) -> list[TransformerLayer]:
    """The layers of a model chunk in order; `layer_number` counts from 1 over the whole model."""
    return [module for module in chunk.modules() if isinstance(module, TransformerLayer)]


def final_norm(chunk: nn.Module) -> nn.Module | None:
    """The norm behind the last layer, where the chunk ends with it."""
    (block,) = [module for module in chunk.modules() if isinstance(module, TransformerBlock)]
    norm: nn.Module | None = block.final_layernorm
    return norm


class Norm(NamedTuple):
    """Gain and bias [h] of a norm; an RMSNorm has no bias."""

    gain: Tensor
    bias: Tensor | None


def norm_of(norm: nn.Module, fused: nn.Module | None, traits: Family) -> Norm:
    """The parameters of a norm: its own, or those of the linear layer that TransformerEngine fused it into.

    A gain that is stored minus one is fp32, as its sum with one is no number of a shorter type.
    """
    module, prefix = (norm, "") if hasattr(norm, "weight") else (fused, "layer_norm_")
    gain = getattr(module, prefix + "weight").detach()
    bias = getattr(module, prefix + "bias").detach() if traits.normalization == "LayerNorm" else None
    return Norm(gain.float() + 1 if traits.layernorm_zero_centered_gamma else gain, bias)


def layer_norms(layer: TransformerLayer, traits: Family) -> tuple[Norm, Norm]:
    """The input norm and the pre-MLP norm."""
    attention = norm_of(layer.input_layernorm, layer.self_attention.linear_qkv, traits)
    # A mixture of experts has no linear layer that the norm could be fused into.
    return attention, norm_of(layer.pre_mlp_layernorm, getattr(layer.mlp, "linear_fc1", None), traits)
