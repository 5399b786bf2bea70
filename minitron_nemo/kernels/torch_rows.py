"""`RowKernels` in plain torch, in place, on fp32 buffers; blocks of rows small enough to stay in cache.

After `statistics` the buffers hold exp(x) and, for forward KL and JSD, exp(y), for reverse KL, x - y; `mixture`
turns the teacher's into log(m / q). No exponential is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.rows import (
    ABSENT,
    ALL_COLUMNS,
    CROSS,
    LABEL,
    STUDENT_BEST,
    STUDENT_COLUMNS,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_BEST,
    TEACHER_MAX,
    TEACHER_SUM,
    UNSCALED_SUM,
    Rows,
)

_BLOCK_BYTES = 512 * 1024  # of fp32 rows: a block's student, teacher and scratch stay in a core's cache
_PARTS = 64  # of a row, each summed in fp32: costs 0.5% of the matrix products, makes sums 6 times as exact


def statistics(
    student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective, first_row: int | None
) -> Tensor:
    """See `RowKernels`; fp64. Buffers must be fp32 and finite."""
    rows, columns = student.shape
    result = student.new_zeros(rows, STUDENT_COLUMNS if teacher is None else ALL_COLUMNS, dtype=torch.float64)
    if columns == 0:
        result[:, [STUDENT_MAX, LABEL]] = ABSENT
        if teacher is not None:
            result[:, TEACHER_MAX] = ABSENT
        return result
    temperature = objective.temperature
    held, row = _held(labels, columns)
    result[:, LABEL] = torch.where(held, student.gather(1, row).double() / temperature, ABSENT).squeeze(1)
    if first_row is not None:
        result[:, STUDENT_BEST] = student.argmax(1) + first_row
        if teacher is not None:
            result[:, TEACHER_BEST] = teacher.argmax(1) + first_row
    student_max, teacher_max = student.new_empty(2, rows, 1)
    student_sums, unscaled_sums, teacher_sums, cross_sums = _part_sums(student, 4)
    for scratch, x, y, x_max, y_max, x_sums, unscaled, y_sums, cross in _blocks(
        student, teacher, student_max, teacher_max, student_sums, unscaled_sums, teacher_sums, cross_sums
    ):
        _centre(x, temperature, x_max)
        if temperature != 1.0:
            _sum(torch.mul(x, temperature, out=scratch).exp_(), unscaled)
        if teacher is None:
            x.exp_()
        else:
            _centre(y, temperature, y_max)
            _compare(x, y, scratch, objective.divergence, y_sums, cross)
        _sum(x, x_sums)
    result[:, STUDENT_MAX] = student_max.squeeze(1)
    result[:, STUDENT_SUM] = student_sums.double().sum(1)
    result[:, UNSCALED_SUM] = result[:, STUDENT_SUM] if temperature == 1.0 else unscaled_sums.double().sum(1)
    if teacher is not None:
        result[:, TEACHER_MAX] = teacher_max.squeeze(1)
        result[:, TEACHER_SUM] = teacher_sums.double().sum(1)
        if objective.divergence != "jsd":
            result[:, CROSS] = cross_sums.double().sum(1)
    return result


def _compare(x: Tensor, y: Tensor, scratch: Tensor, divergence: str, teacher_sums: Tensor, cross_sums: Tensor) -> None:
    """Leave in x and y what the later passes need of them, and the sums of exp(y) and of the divergence."""
    if divergence == "reverse_kl":
        _sum(torch.exp(y, out=scratch), teacher_sums)
        torch.sub(x, y, out=y)
        _sum(torch.mul(x.exp_(), y, out=scratch), cross_sums)
        return
    if divergence == "forward_kl":
        torch.sub(y, x, out=scratch)
    _sum(y.exp_(), teacher_sums)
    if divergence == "forward_kl":
        _sum(scratch.mul_(y), cross_sums)
    x.exp_()


def mixture(student: Tensor, teacher: Tensor, rows: Rows, objective: Objective) -> Tensor:
    """See `RowKernels`; fp64. log(m / q) = log1p(beta (p - q) / q) is exact to fp32's relative precision as q nears p,
    and to its absolute precision where one of them vanishes."""
    assert rows.teacher_scale is not None
    if student.shape[1] == 0:
        return student.new_zeros(student.shape[0], 2, dtype=torch.float64)
    beta, tiny = objective.jsd_beta, torch.finfo(torch.float32).tiny
    student_scale, teacher_scale = _column(rows.student_scale), _column(rows.teacher_scale)
    teacher_sums, student_sums = _part_sums(student, 2)
    second, third = (torch.empty_like(student[: _rows_per_block(student)]) for _ in range(2))
    for scratch, x, y, x_scale, y_scale, x_sums, y_sums in _blocks(
        student, teacher, student_scale, teacher_scale, student_sums, teacher_sums
    ):
        q = torch.mul(x, x_scale, out=scratch).clamp_min_(tiny)
        p = y.mul_(y_scale).clamp_min_(tiny)
        difference = torch.sub(p, q, out=second[: len(q)])
        log_m_over_p = torch.div(difference, p, out=third[: len(q)]).mul_(beta - 1).log1p_()
        _sum(log_m_over_p.mul_(p), y_sums)
        log_m_over_q = torch.div(difference, q, out=y).mul_(beta).log1p_()
        _sum(q.mul_(log_m_over_q), x_sums)
    return torch.stack([-teacher_sums.double().sum(1), -student_sums.double().sum(1)], 1)


def gradients(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    divergence_weights: Tensor,
    ce_weights: Tensor,
    rows: Rows,
    objective: Objective,
) -> None:
    """See `RowKernels`."""
    columns = student.shape[1]
    if columns == 0:
        return
    # At temperature 1 the cross-entropy's softmax is the divergence's, and rides along.
    unscaled = objective.ce_weight != 0 and objective.temperature != 1.0
    ce_factor = _column(ce_weights * rows.unscaled_scale)
    student_factor = _column(divergence_weights * rows.student_scale)
    softmax_factor = torch.zeros_like(ce_factor) if unscaled else ce_factor
    teacher_term = None
    if teacher is None or objective.divergence == "forward_kl":
        student_factor = student_factor + softmax_factor
        if teacher is not None:
            assert rows.teacher_scale is not None
            teacher_term = _column(-divergence_weights * rows.teacher_scale)
    else:
        mean, share = _log_ratio_mean(rows, objective)
        teacher_term, student_factor = _column(mean), student_factor * share
    for scratch, x, y, factor, term, softmax, ce in _blocks(
        student, teacher, student_factor, teacher_term, softmax_factor, ce_factor
    ):
        if unscaled:
            torch.pow(x, objective.temperature, out=scratch)
        if teacher is None:
            x.mul_(factor)
        elif objective.divergence == "forward_kl":
            x.mul_(factor).addcmul_(y, term)
        else:
            x.mul_(y.sub_(term).mul_(factor).add_(softmax))
        if unscaled:
            x.addcmul_(scratch, ce)
    if objective.ce_weight:
        held, row = _held(labels, columns)
        student.scatter_add_(1, row, torch.where(held, _column(-ce_weights), 0.0))


def _log_ratio_mean(rows: Rows, objective: Objective) -> tuple[Tensor, float]:
    """d divergence / d s = share * q * (what the teacher's buffer holds - its mean under q): the mean and the share."""
    if objective.divergence == "jsd":
        assert rows.student_mixture_kl is not None
        return -rows.student_mixture_kl, objective.jsd_beta - 1
    assert rows.divergence is not None and rows.log_ratio_offset is not None
    return rows.divergence - rows.log_ratio_offset, 1.0


def _rows_per_block(buffer: Tensor) -> int:
    return max(1, _BLOCK_BYTES // (4 * max(1, buffer.shape[1])))


def _blocks(buffer: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Blocks of rows of all of them, None for None, after scratch of the shape of the first one's block."""
    step = _rows_per_block(buffer)
    scratch = torch.empty_like(buffer[:step])
    views = (repeat(None) if tensor is None else tensor.split(step) for tensor in (buffer, *others))
    for block in zip(*views, strict=False):  # repeat() has no end
        yield scratch[: len(block[0])], *block


def _held(labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in [0, columns), and the label, 0 where it does not; [n, 1] each."""
    held = ((labels >= 0) & (labels < columns)).unsqueeze(1)
    return held, torch.where(held, labels.unsqueeze(1), 0)


def _centre(logits: Tensor, temperature: float, maximum: Tensor) -> None:
    """Divide by the temperature and subtract each row's maximum, which is left in `maximum`; in place."""
    if temperature != 1.0:
        logits.mul_(1.0 / temperature)
    torch.amax(logits, 1, keepdim=True, out=maximum)
    logits.sub_(maximum)


def _part_sums(buffer: Tensor, count: int) -> tuple[Tensor, ...]:
    """Room for `count` fp32 sums of each row, part by part: a small divergence is a difference of their fp64 sums."""
    rest = buffer.shape[1] % _PARTS > 0
    return buffer.new_empty(count, buffer.shape[0], _PARTS + rest).unbind()


def _sum(values: Tensor, out: Tensor) -> None:
    """Sums of [n, v] over `_PARTS` equal parts of each row, and over what is left of it in one more, into `out`."""
    width, rest = divmod(values.shape[1], _PARTS)
    if rest:
        torch.sum(values[:, width * _PARTS :], 1, out=out[:, _PARTS])
        values, out = values[:, : width * _PARTS], out[:, :_PARTS]
    torch.sum(values.view(len(values), _PARTS, width), 2, out=out)


def _column(values: Tensor) -> Tensor:
    return values.float().unsqueeze(1)
