"""RMSNorm and LayerNorm for machines without TransformerEngine: Megatron-core's own refuse sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional


class Norm(nn.Module):
    """`normalize` with parameters of its own, which are undefined until they are loaded; `eps` is the config's.

    Under sequence parallelism every rank sees its part of the tokens only: the mark on the parameters makes
    Megatron-core sum their gradients over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        size = {"size": (hidden_size,), "device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.weight = nn.Parameter(torch.empty(**size))
        self.bias = nn.Parameter(torch.empty(**size)) if config.normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.config)


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, config: TransformerConfig) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * gain`, or `(x - mean(x)) / sqrt(var(x) + eps) * gain + bias`, over the last dim.

    Which of the two says `config.normalization`. The gain is `weight`, or `weight + 1` under
    `config.layernorm_zero_centered_gamma`. Computed in fp32, returned in the dtype of `x`.
    """
    gain = weight + 1 if config.layernorm_zero_centered_gamma else weight
    if config.normalization == "RMSNorm":
        return functional.rms_norm(x, weight.shape, gain, config.layernorm_epsilon)
    return functional.layer_norm(x, weight.shape, gain, bias, config.layernorm_epsilon)
