"""Which tokens of a microbatch count in a measurement, and the hooks that tell a model chunk's other hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


@dataclass(frozen=True)
class Counted:
    """Which tokens of a microbatch count. Sequence-parallel ranks see their share of the norms' tokens."""

    mask: Tensor  # fp32 [b, s], 1 or 0
    local_mask: Tensor  # fp32 [b, s/tp] under sequence parallelism, else `mask`
    tokens: Tensor  # fp64 [b]


class Current:
    """The tokens that count in the microbatch that is in a model chunk: set whenever one enters the first of `layers`.

    `microbatches` are this data-parallel rank's, in the order in which Megatron's schedule runs them; of each, only
    `token_weights` [b, s] is read. Microbatches that the schedule runs beyond them do not count. `on_microbatch` is
    called for each of the others.
    """

    counted: Counted

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
        # Megatron's schedules number the microbatches on the layers, chunk by chunk.
        microbatch = self.first.current_microbatch
        fills = microbatch >= len(self.microbatches)
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


def gain(norm: nn.Module, fused: nn.Module | None = None) -> Tensor:
    """A norm's gain [h]: its own weight, or that of the linear layer that TransformerEngine fused it into."""
    weight: Any = norm.weight if hasattr(norm, "weight") else fused.layer_norm_weight  # type: ignore[union-attr]
    detached: Tensor = weight.detach()
    return detached
