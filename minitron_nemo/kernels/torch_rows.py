"""`RowKernels` in plain torch, in place, on fp32 buffers; blocks of rows small enough to stay in cache.

After `statistics` the buffers hold exp(x) and, for forward KL and JSD, exp(y), for reverse KL, x - y; `mixture`
turns the teacher's into log(q / m). No exponential is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator

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
_LEAST_LOG = -100.0  # of probability ratios: exp of it is far below fp32's resolution, and 0 * it is 0


def statistics(
    student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective, first_row: int | None
) -> Tensor:
    """See `RowKernels`. Buffers must be fp32 and finite."""
    rows, columns = student.shape
    result = student.new_zeros(rows, STUDENT_COLUMNS if teacher is None else ALL_COLUMNS, dtype=torch.float64)
    if columns == 0:
        result[:, [STUDENT_MAX, LABEL]] = ABSENT
        if teacher is not None:
            result[:, TEACHER_MAX] = ABSENT
        return result
    for block, scratch in _blocks(student):
        x, out = student[block], result[block]
        _scale(x, 1.0 / objective.temperature)
        owned = (labels[block] >= 0) & (labels[block] < columns)
        label_logits = x.gather(1, torch.where(owned, labels[block], 0).unsqueeze(1)).squeeze(1)
        out[:, LABEL] = torch.where(owned, label_logits, ABSENT)
        _subtract_maximum(x, out, STUDENT_MAX, STUDENT_BEST, first_row)
        if objective.temperature != 1.0:
            out[:, UNSCALED_SUM] = _sum(torch.mul(x, objective.temperature, out=scratch).exp_())
        if teacher is not None:
            y = teacher[block]
            _scale(y, 1.0 / objective.temperature)
            _subtract_maximum(y, out, TEACHER_MAX, TEACHER_BEST, first_row)
        if teacher is None:
            x.exp_()
        elif objective.divergence == "reverse_kl":
            out[:, TEACHER_SUM] = _sum(torch.exp(y, out=scratch))
            torch.sub(x, y, out=y)
            x.exp_()
            out[:, CROSS] = _sum(torch.mul(x, y, out=scratch))
        else:
            if objective.divergence == "forward_kl":
                difference = torch.sub(y, x, out=scratch)
            out[:, TEACHER_SUM] = _sum(y.exp_())
            if objective.divergence == "forward_kl":
                out[:, CROSS] = _sum(difference.mul_(y))
            x.exp_()
        out[:, STUDENT_SUM] = _sum(x)
        if objective.temperature == 1.0:
            out[:, UNSCALED_SUM] = out[:, STUDENT_SUM]
    return result


def mixture(student: Tensor, teacher: Tensor, rows: Rows, objective: Objective) -> Tensor:
    """See `RowKernels`. log(q / m) = log1p(beta (q - p) / m), which stays exact as q nears p."""
    assert rows.teacher_scale is not None
    result = student.new_zeros(student.shape[0], 2, dtype=torch.float64)
    if student.shape[1] == 0:
        return result
    beta = objective.jsd_beta
    second, third = (torch.empty_like(student[: _rows_per_block(student)]) for _ in range(2))
    for block, scratch in _blocks(student):
        q = torch.mul(student[block], _column(rows.student_scale[block]), out=scratch)
        p = teacher[block].mul_(_column(rows.teacher_scale[block]))
        m = torch.lerp(q, p, beta, out=second[: len(q)]).clamp_min_(torch.finfo(torch.float32).tiny)
        ratio = torch.sub(q, p, out=third[: len(q)]).div_(m)
        log_p_over_m = torch.mul(ratio, beta - 1, out=m).log1p_().clamp_min_(_LEAST_LOG)
        result[block, 0] = _sum(log_p_over_m.mul_(p))
        log_q_over_m = torch.mul(ratio, beta, out=p).log1p_().clamp_min_(_LEAST_LOG)
        result[block, 1] = _sum(q.mul_(log_q_over_m))
    return result


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
    for block, scratch in _blocks(student):
        x = student[block]
        ce_factor = _column(ce_weights[block] * rows.unscaled_scale[block])
        # At temperature 1 the cross-entropy's softmax is the divergence's, and rides along.
        unscaled = None
        if objective.ce_weight and objective.temperature != 1.0:
            unscaled = torch.pow(x, objective.temperature, out=scratch)
        factor = _column(divergence_weights[block] * rows.student_scale[block])
        softmax_factor = ce_factor if unscaled is None else torch.zeros_like(ce_factor)
        if teacher is None:
            x.mul_(factor + softmax_factor)
        elif objective.divergence == "forward_kl":
            assert rows.teacher_scale is not None
            x.mul_(factor + softmax_factor)
            x.addcmul_(teacher[block], _column(-divergence_weights[block] * rows.teacher_scale[block]))
        else:
            mean, share = _log_ratio_mean(rows, objective)
            x.mul_(teacher[block].sub_(_column(mean[block])).mul_(factor * share).add_(softmax_factor))
        if unscaled is not None:
            x.addcmul_(unscaled, ce_factor)
        owned = (labels[block] >= 0) & (labels[block] < columns)
        at_label = torch.where(owned, -ce_weights[block], 0.0).float().unsqueeze(1)
        x.scatter_add_(1, torch.where(owned, labels[block], 0).unsqueeze(1), at_label)


def _log_ratio_mean(rows: Rows, objective: Objective) -> tuple[Tensor, float]:
    """d divergence / d s = share * q * (what the teacher's buffer holds - its mean under q)."""
    if objective.divergence == "jsd":
        assert rows.student_mixture_kl is not None
        return rows.student_mixture_kl, 1 - objective.jsd_beta
    assert rows.divergence is not None and rows.log_ratio_offset is not None
    return rows.divergence - rows.log_ratio_offset, 1.0


def _rows_per_block(buffer: Tensor) -> int:
    return max(1, _BLOCK_BYTES // (4 * max(1, buffer.shape[1])))


def _blocks(buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, each with scratch of its shape."""
    step = _rows_per_block(buffer)
    scratch = torch.empty_like(buffer[:step])
    for start in range(0, buffer.shape[0], step):
        block = slice(start, min(start + step, buffer.shape[0]))
        yield block, scratch[: block.stop - start]


def _sum(values: Tensor) -> Tensor:
    """Row sums, fp64, of fp32 sums over parts of the row: a small divergence is a difference of such sums."""
    even = values.shape[1] // _PARTS * _PARTS
    total = values[:, :even].unflatten(1, (_PARTS, -1)).sum(2).sum(1, dtype=torch.float64)
    return total if even == values.shape[1] else total + values[:, even:].sum(1)


def _scale(logits: Tensor, factor: float) -> None:
    if factor != 1.0:
        logits.mul_(factor)


def _column(values: Tensor) -> Tensor:
    return values.float().unsqueeze(1)


def _subtract_maximum(logits: Tensor, out: Tensor, maximum: int, best: int, first_row: int | None) -> None:
    out[:, maximum] = logits.amax(1)
    if first_row is not None:
        out[:, best] = logits.argmax(1) + first_row
    logits.sub_(_column(out[:, maximum]))
