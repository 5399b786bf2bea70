"""A loss whose gradients are already known, up to the upstream scalar, as a node of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeliverGradients(torch.autograd.Function):
    """`total` as a function of `hidden` and `weight`; the gradients are scaled and delivered by the backward pass.

    Where `weight` has a `main_grad` (Megatron's DDP) its gradient is added there, in fp32, `grad_added_to_main_grad` is
    set, and autograd gets something of its shape, so that DDP's hook fires, which drops it. With `zero_out_wgrad` (set
    by Megatron on an embedding that is also the output weight on one stage) these are zeros, since the hook adds them
    with what the embedding contributed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        total: Tensor,
        hidden_grad: Tensor | None,
        weight_grad: Tensor | None,
    ) -> Tensor:
        ctx.hidden_dtype, ctx.weight = hidden.dtype, weight
        ctx.gradients = hidden_grad, weight_grad
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("backward a second time: the loss's gradients are released by the first")
        hidden_grad, weight_grad = ctx.gradients
        weight, ctx.gradients, ctx.weight = ctx.weight, None, None
        if hidden_grad is not None:
            hidden_grad = _scale(hidden_grad, upstream).to(ctx.hidden_dtype)
        if weight_grad is not None:
            weight_grad = _deliver_weight_grad(weight, weight_grad, upstream)
        return hidden_grad, weight_grad, None, None, None


def _deliver_weight_grad(weight: Tensor, grad: Tensor, upstream: Tensor) -> Tensor:
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return _scale(grad, upstream).to(weight.dtype)
    main_grad.addcmul_(grad, upstream)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight, "zero_out_wgrad", False):
        return weight.new_zeros(()).expand_as(weight)
    # Never read, so never filled: on a CPU it takes no memory. What is expanded, autograd would fill and keep.
    return torch.empty_like(weight)


def _scale(grad: Tensor, upstream: Tensor) -> Tensor:
    """In place. A CPU saves the pass where the factor is 1; a GPU would have to be waited for to know it."""
    return grad if grad.device.type == "cpu" and upstream.item() == 1.0 else grad.mul_(upstream)
