"""Intermediate-state loss fused with the map from the student's width to the teacher's, chunk by chunk.

    a chunk of tokens: y = x P^T in fp32 -> loss per token -> dy in y's place -> dx = dy P, dP += dy^T x

Formula: 2407.14679 section 3, which takes states after a norm and finds cosine best. Gradients are computed in the
forward pass and only scaled in the backward pass: 3 products, none repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels.backend import backend
from minitron_nemo.kernels.delivery import DeliverGradients

CHUNK_BYTES = 64 * 1024**2
EPS = 1e-8  # torch.nn.functional.cosine_similarity's


@dataclass(frozen=True)
class HiddenSums:
    """Sums over tokens, never means; detached scalars, the same on all ranks of `tp_group`."""

    loss: Tensor  # fp32: weight * loss
    tokens: Tensor  # int64: tokens whose weight is not 0
    weight: Tensor  # fp32: sum of weights
    nonfinite: Tensor  # int64: tokens whose loss is not finite; with any, sums and gradients are unusable


def linear_hidden_loss(
    student_hidden: Tensor,
    projection: Tensor | None,
    teacher_hidden: Tensor,
    token_weights: Tensor,
    *,
    kind: str = "cosine",
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, HiddenSums]:
    """Weighted sum over tokens of the distance between y = projection @ student state and the teacher's state t.

    cosine: 1 - <y, t> / (max(|y|, eps) max(|t|, eps)), eps = 1e-8 as in torch.nn.functional.cosine_similarity. A zero
        state has cosine 0 to everything, and the gradient that the formula says: at y = 0 its length is weight / eps.
    mse: mean over the channels of (y - t)^2, as in Model-Optimizer's MSELoss (which summed them at first).
    The map has no bias: the paper says a linear transformation.

    student_hidden: [tokens, h_s]; teacher_hidden: [tokens, h_t], takes no gradient; any float dtypes. With
        `sequence_parallel` [tokens/tp, h]: rank r of `tp_group` holds the r-th run of tokens. Without it all ranks
        hold all tokens and compute the same; nothing is communicated.
    projection: [h_t, h_s], whole on every rank; None for the identity, where the widths are equal.
    token_weights: fp32 [tokens], whole on every rank. Where it is 0 the states take no part, whatever they hold.
    chunk_bytes: of fp32 [n, h_t] held at once for both models.

    Returns the sum, a differentiable fp32 scalar, and HiddenSums; both the same on all ranks of `tp_group`. The
    gradient of student_hidden is of the states passed in. The gradient of `projection` goes to its `main_grad` where
    it has one (see `DeliverGradients`); with `sequence_parallel` it is of this rank's tokens, so that the parameter
    must be marked `sequence_parallel = True` for Megatron to sum it over the group. Both are held in fp32 until
    backward. Without gradients (no_grad, or nothing requires them) no gradient work is done.

    Raises ValueError for an unknown kind and for shapes or dtypes that do not fit.
    """
    if kind not in _DISTANCES:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(_DISTANCES)}")
    group = tp_group if sequence_parallel else None
    mine = _own_tokens(student_hidden, projection, teacher_hidden, token_weights, group)
    wants_grad = torch.is_grad_enabled()
    hidden_grad = projection_grad = None
    with torch.no_grad():
        if wants_grad and student_hidden.requires_grad:
            hidden_grad = torch.empty_like(student_hidden, dtype=torch.float32)
        if wants_grad and projection is not None and projection.requires_grad:
            projection_grad = torch.zeros_like(projection, dtype=torch.float32)
        partial = _accumulate(
            student_hidden,
            projection,
            teacher_hidden,
            token_weights[mine],
            _DISTANCES[kind],
            chunk_bytes,
            hidden_grad,
            projection_grad,
        )
        if group is not None:
            dist.all_reduce(partial, group=group)
        sums = HiddenSums(
            loss=partial[0].float(),
            tokens=(token_weights != 0).sum(),
            weight=token_weights.sum(),
            nonfinite=partial[1].long(),
        )
    if hidden_grad is None and projection_grad is None:
        return sums.loss, sums
    return DeliverGradients.apply(student_hidden, projection, sums.loss, hidden_grad, projection_grad), sums


def _own_tokens(
    student: Tensor, projection: Tensor | None, teacher: Tensor, token_weights: Tensor, group: dist.ProcessGroup | None
) -> slice:
    """Where in `token_weights` this rank's tokens are. Raises ValueError for what does not fit."""
    for name, states in (("student_hidden", student), ("teacher_hidden", teacher)):
        if states.dim() != 2:
            raise ValueError(f"{name}: shape {list(states.shape)}, must be [tokens, h]; flatten sequence and batch")
    count, width = student.shape
    if teacher.shape[0] != count:
        raise ValueError(f"teacher_hidden: {teacher.shape[0]} tokens, must be as many as student_hidden's {count}")
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    if token_weights.shape != (count * size,) or token_weights.dtype != torch.float32:
        found = f"{token_weights.dtype} {list(token_weights.shape)}"
        raise ValueError(f"token_weights: {found}, must be float32 [{count * size}], of all tokens of {size} rank(s)")
    if projection is None and teacher.shape[1] != width:
        raise ValueError(f"projection: None, must be [{teacher.shape[1]}, {width}] as the widths differ")
    if projection is not None and projection.shape != (teacher.shape[1], width):
        raise ValueError(f"projection: shape {list(projection.shape)}, must be {[teacher.shape[1], width]}")
    return slice(rank * count, (rank + 1) * count)


# Takes y and t, fp32 [n, h_t], and the weights, fp32 [n, 1]; returns the loss per token, fp32 [n, 1], without weight.
# Overwrites y: with d(weight * loss) / dy if asked. t is not changed.
_Distance = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _accumulate(
    student_hidden: Tensor,
    projection: Tensor | None,
    teacher_hidden: Tensor,
    weights: Tensor,
    distance: _Distance,
    chunk_bytes: int,
    hidden_grad: Tensor | None,
    projection_grad: Tensor | None,
) -> Tensor:
    """Weighted loss and number of tokens without a finite one, fp64 [2]; writes `hidden_grad`, adds to the other."""
    products = backend(student_hidden.device).products
    count, width = teacher_hidden.shape
    size = min(count, max(1, chunk_bytes // (8 * width)))
    y_buffer, t_buffer = weights.new_empty(2, size, width)
    wants_grad = hidden_grad is not None or projection_grad is not None
    partial = weights.new_zeros(2, dtype=torch.float64)
    for start in range(0, count, max(1, size)):
        tokens = slice(start, min(start + size, count))
        y, t = y_buffer[: tokens.stop - start], t_buffer[: tokens.stop - start]
        weight = weights[tokens].unsqueeze(1)  # [n, 1]
        # Zero states in place of those without weight: 0 times theirs could be NaN.
        dropped = weight == 0
        x = student_hidden[tokens].masked_fill(dropped, 0)
        t.copy_(teacher_hidden[tokens]).masked_fill_(dropped, 0)
        if projection is None:
            y.copy_(x)
        else:
            products.logits(x, projection, y)
        loss = distance(y, t, weight, wants_grad)
        partial[0] += (loss.double() * weight).sum()
        partial[1] += (~loss.isfinite()).sum()
        if projection is not None and wants_grad:
            x_grad = None if hidden_grad is None else hidden_grad[tokens]
            products.gradients(y, t, x, projection, x_grad, projection_grad)
        elif hidden_grad is not None:
            hidden_grad[tokens] = y
    return partial


def _cosine(y: Tensor, t: Tensor, weight: Tensor, wants_grad: bool) -> Tensor:
    """1 - <a, b> = (|a - b|^2 + (1 - |a|^2) + (1 - |b|^2)) / 2 with a = y / max(|y|, eps), b = t / max(|t|, eps).

    The difference keeps its digits as the student nears the teacher, where 1 - cosine would lose them. |a| is exactly
    1 unless |y| is below eps, and NaN if |y| overflows.
    """
    y_length, t_length = (torch.linalg.vector_norm(states, dim=1, keepdim=True) for states in (y, t))
    y_divisor, t_divisor = y_length.clamp_min(EPS), t_length.clamp_min(EPS)
    difference = y.div_(y_divisor).addcmul_(t, t_divisor.reciprocal(), value=-1)
    shortfall = (1 - (y_length / y_divisor).square()) + (1 - (t_length / t_divisor).square())
    loss = (torch.linalg.vector_norm(difference, dim=1, keepdim=True).square() + shortfall) / 2
    if wants_grad:
        # dy = weight / |y| * (cosine * a - b); below eps the divisor is constant: dy = -weight / eps * b.
        cosine = torch.where(y_length < EPS, 0, 1 - loss)
        scale = weight / y_divisor
        difference.mul_(scale * cosine).addcmul_(t, scale * (1 - cosine) / t_divisor, value=-1)
    return loss


def _mse(y: Tensor, t: Tensor, weight: Tensor, wants_grad: bool) -> Tensor:
    difference = y.sub_(t)
    loss = torch.linalg.vector_norm(difference, dim=1, keepdim=True).square() / y.shape[1]
    if wants_grad:
        difference.mul_(weight * (2 / y.shape[1]))
    return loss


_DISTANCES: dict[str, _Distance] = {"cosine": _cosine, "mse": _mse}
