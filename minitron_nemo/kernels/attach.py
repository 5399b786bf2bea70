"""An auxiliary loss riding on a tensor that flows on through the pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attach_loss(hidden: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """`hidden` as it is, sharing its memory; when its gradient passes back, `loss` gets `scale` as its gradient.

    loss: a scalar. scale: a scalar of the loss's dtype and device, read during backward, so that one tensor set once
    per step serves all microbatches. Nothing of `hidden` is saved, and the result is no view of it to autograd:
    Megatron may free the data of a stage's output. If nothing downstream needs the result, the loss has no effect.
    """
    return _AttachLoss.apply(hidden, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return hidden.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.scale, None
