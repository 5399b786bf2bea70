"""RMSNorm for machines without TransformerEngine: Megatron-core's own refuses sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim; computed in fp32, returned in the dtype of `x`.

    Under sequence parallelism every rank sees its part of the tokens only: the mark on the weight makes Megatron-core
    sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
