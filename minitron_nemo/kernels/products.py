"""The loss's matrix products, per device: logits in fp32 whatever the operands' dtype, the weight's gradient in fp32.

Rounding logits to bf16 costs up to 22% of a distillation gradient, because student and teacher probabilities cancel as
the student converges. So both kinds multiply 16-bit operands exactly and write fp32:
CUDA has products with `out_dtype`; elsewhere blocks of the weight are upcast, and oneDNN is told that multiplying
bf16 operands held in fp32 may use bf16 instructions (AMX, AVX512-BF16), which is exact for the logits. Rounding what
comes after the difference, the logits' gradient, costs 0.15%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

UPCAST_BYTES = 8 * 1024**2  # of a weight block in fp32: stays small beside the chunk buffers, large enough for a GEMM


@dataclass(frozen=True)
class Products:
    """`logits(hidden, weight, out)` writes hidden @ weight.T to `out`, fp32 [n, vocab].

    `gradients(grad, scratch, hidden, weight, hidden_grad, weight_grad)` takes the logits' gradient, fp32 [n, vocab],
    overwrites `hidden_grad` [n, h], fp32 or in bf16 as both operands, and adds to `weight_grad` fp32 [vocab, h], or
    overwrites that too where `accumulate` is False; either may be None. `scratch` is an fp32 [n, vocab] buffer that may
    be overwritten, or None.
    """

    logits: Callable[[Tensor, Tensor, Tensor], None]
    gradients: _Gradients


class _Gradients(Protocol):
    def __call__(
        self,
        grad: Tensor,
        scratch: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        hidden_grad: Tensor | None,
        weight_grad: Tensor | None,
        *,
        accumulate: bool = True,
    ) -> None: ...


def products(device: torch.device) -> Products:
    """The products for tensors on `device`."""
    return _CUDA if device.type == "cuda" else _UPCAST


@contextmanager
def _onednn_precision(*operands: Tensor) -> Iterator[None]:
    """Allow bf16 instructions for fp32 products while every operand holds bf16 values or is a gradient of such."""
    if any(operand.dtype != torch.bfloat16 for operand in operands):
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _weight_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of the weight in fp32; the next block overwrites this one."""
    count = weight.shape[0]
    if weight.dtype == torch.float32:
        yield slice(0, count), weight
        return
    rows = max(1, min(count, UPCAST_BYTES // (4 * weight.shape[1])))  # a shard of padding alone has none
    buffer = torch.empty(rows, weight.shape[1], dtype=torch.float32, device=weight.device)
    for start in range(0, count, rows):
        block = slice(start, min(start + rows, count))
        yield block, buffer[: block.stop - start].copy_(weight[block])


def _upcast_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    with _onednn_precision(hidden, weight):
        hidden = hidden.float()
        for columns, block in _weight_blocks(weight):
            torch.mm(hidden, block.t(), out=out[:, columns])


def _upcast_gradients(
    grad: Tensor,
    scratch: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    *,
    accumulate: bool = True,
) -> None:
    with _onednn_precision(hidden, weight):
        if weight_grad is not None:
            # With beta 0 what the memory held does not count, NaN included.
            weight_grad.addmm_(grad.t(), hidden.float(), beta=int(accumulate))
        if hidden_grad is not None and hidden_grad.dtype == weight.dtype == torch.bfloat16:
            torch.mm(_rounded(grad, scratch, weight.dtype), weight, out=hidden_grad)
        elif hidden_grad is not None:
            hidden_grad.zero_()
            for columns, block in _weight_blocks(weight):
                hidden_grad.addmm_(grad[:, columns], block)


def _cuda_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    hidden, weight = _common_dtype(hidden, weight)
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)


def _cuda_gradients(
    grad: Tensor,
    scratch: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    *,
    accumulate: bool = True,
) -> None:
    hidden, weight = _common_dtype(hidden, weight)
    if hidden.dtype == torch.float32:
        if weight_grad is not None:
            weight_grad.addmm_(grad.t(), hidden, beta=int(accumulate))
        if hidden_grad is not None:
            torch.mm(grad, weight, out=hidden_grad)
        return
    grad = _rounded(grad, scratch, hidden.dtype)
    if weight_grad is not None:
        beta = int(accumulate)
        torch.addmm(weight_grad, grad.t(), hidden, out_dtype=torch.float32, beta=beta, out=weight_grad)
    if hidden_grad is not None:
        if hidden_grad.dtype == hidden.dtype:
            torch.mm(grad, weight, out=hidden_grad)
        else:
            torch.mm(grad, weight, out_dtype=torch.float32, out=hidden_grad)


def _rounded(grad: Tensor, scratch: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In 16 bits, in scratch's memory if given. Costs a finished gradient 0.15%, unlike the logits it comes from."""
    if scratch is None:
        return grad.to(dtype)
    return scratch.view(dtype).flatten()[: grad.numel()].view_as(grad).copy_(grad)


def _common_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = hidden.dtype if hidden.dtype == weight.dtype else torch.float32
    return hidden.to(dtype), weight.to(dtype)


_UPCAST = Products(_upcast_logits, _upcast_gradients)
_CUDA = Products(_cuda_logits, _cuda_gradients)
