"""Activation functions of the MLP, by the names that families give them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0)^2`. Megatron-core's has a compiler run before its first use."""
    return functional.relu(x).square()


ACTIVATIONS = {"silu": functional.silu, "squared_relu": squared_relu}
