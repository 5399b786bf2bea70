"""Softmax statistics, divergences and logit gradients of rows of fp32 logits, in place, on one vocabulary shard.

Per row a shard yields a few numbers (`shard_statistics`); gathered from every shard they give the row's divergence and
cross-entropy (`merge`), and the factors that turn what `shard_statistics` left in the buffers into gradients
(`logit_gradients`). With x = student/T - its shard maximum and y the same for the teacher, the buffers then hold
exp(x) and, for forward KL, exp(y), for reverse KL, x - y: no exponential is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl")

# Columns of the statistics of one shard, fp32. Maxima, labels: of logits / temperature. CROSS: the sum of
# exp(y) (y - x) for forward KL, of exp(x) (x - y) for reverse KL. UNSCALED_SUM: sum of exp at temperature 1.
STUDENT_MAX, STUDENT_SUM, UNSCALED_SUM, LABEL, STUDENT_BEST, TEACHER_MAX, TEACHER_SUM, CROSS, TEACHER_BEST = range(9)
_STUDENT_COLUMNS, _ALL_COLUMNS = 5, 9

# Of a shard without the label, or without any real vocabulary row: finite, so that 0 * x stays 0.
_ABSENT = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Objective:
    """What is minimised: logits_weight * [T^2] * divergence(T) + ce_weight * cross-entropy, per token."""

    divergence: str = "forward_kl"
    temperature: float = 1.0
    temperature_squared: bool = True
    logits_weight: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence {self.divergence!r}: expected one of {', '.join(DIVERGENCES)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: must be positive")

    @property
    def divergence_scale(self) -> float:
        return self.temperature**2 if self.temperature_squared else 1.0


@dataclass(frozen=True)
class Rows:
    """One value per row, fp64, the same on every shard but for the last four, which belong to this shard's buffers."""

    divergence: Tensor | None  # at the temperature, without its square
    ce: Tensor
    student_scale: Tensor  # exp(x) * student_scale = p_student(T)
    unscaled_scale: Tensor  # exp(x)^T * unscaled_scale = p_student(1)
    teacher_scale: Tensor | None  # exp(y) * teacher_scale = p_teacher(T)
    log_ratio_offset: Tensor | None  # x - y + log_ratio_offset = log p_student(T) - log p_teacher(T)


def row_blocks(rows: int, columns: int, block_bytes: int) -> Iterator[slice]:
    """Blocks of rows of at most `block_bytes` of fp32 each."""
    step = max(1, block_bytes // (4 * max(1, columns)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def shard_statistics(
    student: Tensor,  # [n, v] logits, overwritten
    teacher: Tensor | None,  # [n, v] logits, overwritten
    labels: Tensor,  # [n] in this shard's numbering; elsewhere: outside [0, v)
    first_row: int | None,  # of the vocabulary, on this shard, for `agreement`; None: the *_BEST columns stay 0
    objective: Objective,
    block_bytes: int,
) -> Tensor:
    """Statistics of this shard, fp32 [n, 5] without a teacher, [n, 9] with one (columns: see above)."""
    rows, columns = student.shape
    statistics = student.new_zeros(rows, _STUDENT_COLUMNS if teacher is None else _ALL_COLUMNS)
    if columns == 0:  # every vocabulary row of this shard is padding
        statistics[:, [STUDENT_MAX, LABEL]] = _ABSENT
        if teacher is not None:
            statistics[:, TEACHER_MAX] = _ABSENT
        return statistics
    inverse_temperature = 1.0 / objective.temperature
    blocks = list(row_blocks(rows, columns, block_bytes))
    scratch = torch.empty_like(student[blocks[0]])
    for block in blocks:
        x, out = student[block], statistics[block]
        _scale(x, inverse_temperature)
        owned = (labels[block] >= 0) & (labels[block] < columns)
        label_logits = x.gather(1, torch.where(owned, labels[block], 0).unsqueeze(1)).squeeze(1)
        out[:, LABEL] = torch.where(owned, label_logits, _ABSENT)
        _subtract_maximum(x, out, STUDENT_MAX, STUDENT_BEST, first_row)
        if teacher is None:
            x.exp_()
        elif objective.divergence == "forward_kl":
            y = teacher[block]
            _scale(y, inverse_temperature)
            _subtract_maximum(y, out, TEACHER_MAX, TEACHER_BEST, first_row)
            difference = torch.sub(y, x, out=scratch[: len(x)])
            out[:, TEACHER_SUM] = y.exp_().sum(1)
            out[:, CROSS] = difference.mul_(y).sum(1)
            x.exp_()
        else:
            y = teacher[block]
            _scale(y, inverse_temperature)
            _subtract_maximum(y, out, TEACHER_MAX, TEACHER_BEST, first_row)
            out[:, TEACHER_SUM] = torch.exp(y, out=scratch[: len(x)]).sum(1)
            torch.sub(x, y, out=y)
            x.exp_()
            out[:, CROSS] = torch.mul(x, y, out=scratch[: len(x)]).sum(1)
        out[:, STUDENT_SUM] = x.sum(1)
        out[:, UNSCALED_SUM] = out[:, STUDENT_SUM] if objective.temperature == 1.0 else _unscaled(x, objective).sum(1)
    return statistics


def merge(shards: Tensor, shard: int, objective: Objective) -> Rows:
    """Combine the statistics of all vocabulary shards, [shards, n, columns], as seen from shard number `shard`."""
    shards = shards.double()
    student_max, student_rescale, student_sum = _log_sum_exp_parts(shards, STUDENT_MAX, STUDENT_SUM)
    unscaled_rescale = student_rescale**objective.temperature
    unscaled_sum = (unscaled_rescale * shards[:, :, UNSCALED_SUM]).sum(0)
    label = shards[:, :, LABEL].amax(0)
    ce = unscaled_sum.log() + (student_max - label) * objective.temperature
    student_scale, unscaled_scale = student_rescale[shard] / student_sum, unscaled_rescale[shard] / unscaled_sum
    if shards.shape[2] == _STUDENT_COLUMNS:
        return Rows(None, ce, student_scale, unscaled_scale, None, None)
    teacher_max, teacher_rescale, teacher_sum = _log_sum_exp_parts(shards, TEACHER_MAX, TEACHER_SUM)
    # x - y of each shard is relative to the shard's own maxima; this makes it relative to the global ones.
    shift = (shards[:, :, STUDENT_MAX] - student_max) - (shards[:, :, TEACHER_MAX] - teacher_max)
    log_sum_ratio = teacher_sum.log() - student_sum.log()
    if objective.divergence == "forward_kl":
        cross = (teacher_rescale * (shards[:, :, CROSS] - shards[:, :, TEACHER_SUM] * shift)).sum(0)
        divergence = cross / teacher_sum - log_sum_ratio
    else:
        cross = (student_rescale * (shards[:, :, CROSS] + shards[:, :, STUDENT_SUM] * shift)).sum(0)
        divergence = cross / student_sum + log_sum_ratio
    return Rows(
        divergence=divergence,
        ce=ce,
        student_scale=student_scale,
        unscaled_scale=unscaled_scale,
        teacher_scale=teacher_rescale[shard] / teacher_sum,
        log_ratio_offset=shift[shard] + log_sum_ratio,
    )


def agreement(shards: Tensor) -> Tensor:
    """Whether both models' most likely token is the same, bool [n], from the statistics of all vocabulary shards."""
    return _best(shards, STUDENT_MAX, STUDENT_BEST) == _best(shards, TEACHER_MAX, TEACHER_BEST)


def logit_gradients(
    student: Tensor,  # [n, v] as left by shard_statistics; overwritten by the gradient
    teacher: Tensor | None,  # [n, v] as left by shard_statistics; overwritten
    labels: Tensor,  # [n] in this shard's numbering
    token_weights: Tensor,  # [n] fp32
    rows: Rows,
    objective: Objective,
    block_bytes: int,
) -> None:
    """Overwrite `student` with d(sum over tokens of weight * objective) / d(student logits) of this shard."""
    count, columns = student.shape
    if columns == 0:
        return
    weights = token_weights.double()
    kd_weight = weights * (objective.logits_weight * objective.divergence_scale / objective.temperature)
    ce_weight = weights * objective.ce_weight
    for block in row_blocks(count, columns, block_bytes):
        p = student[block]
        ce_scale = _column(ce_weight[block] * rows.unscaled_scale[block])
        kd_scale = kd_weight[block] * rows.student_scale[block]
        unscaled = None
        if objective.ce_weight and objective.temperature != 1.0:
            unscaled = _unscaled(p, objective)
        if teacher is None:
            p.mul_(ce_scale if unscaled is None else 0.0)
        elif objective.divergence == "forward_kl":
            assert rows.teacher_scale is not None
            p.mul_(_column(kd_scale) + (ce_scale if unscaled is None else 0.0))
            p.addcmul_(teacher[block], _column(-kd_weight[block] * rows.teacher_scale[block]))
        else:
            assert rows.log_ratio_offset is not None and rows.divergence is not None
            log_ratio = teacher[block]
            log_ratio.add_(_column(rows.log_ratio_offset[block] - rows.divergence[block])).mul_(_column(kd_scale))
            p.mul_(log_ratio.add_(ce_scale) if unscaled is None else log_ratio)
        if unscaled is not None:
            p.addcmul_(unscaled, ce_scale)
        owned = (labels[block] >= 0) & (labels[block] < columns)
        at_label = torch.where(owned, -ce_weight[block], 0.0).float().unsqueeze(1)
        p.scatter_add_(1, torch.where(owned, labels[block], 0).unsqueeze(1), at_label)


def _scale(logits: Tensor, factor: float) -> None:
    if factor != 1.0:
        logits.mul_(factor)


def _unscaled(exponentials: Tensor, objective: Objective) -> Tensor:
    """exp((s - max) / T)^T: what underflows at T is far below fp32's resolution at 1, and the reverse."""
    return exponentials.pow(objective.temperature)


def _column(values: Tensor) -> Tensor:
    return values.float().unsqueeze(1)


def _subtract_maximum(logits: Tensor, out: Tensor, maximum: int, best: int, first_row: int | None) -> None:
    out[:, maximum] = logits.amax(1)
    if first_row is not None:
        out[:, best] = logits.argmax(1) + first_row  # exact in fp32 up to 2^24
    logits.sub_(out[:, maximum].unsqueeze(1))


def _log_sum_exp_parts(shards: Tensor, maximum: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Global maximum [n], the factor from each shard's exponentials to the global ones [shards, n], global sum [n]."""
    highest = shards[:, :, maximum].amax(0)
    rescale = (shards[:, :, maximum] - highest).exp()
    return highest, rescale, (rescale * shards[:, :, total]).sum(0)


def _best(shards: Tensor, maximum: int, best: int) -> Tensor:
    return shards[:, :, best].gather(0, shards[:, :, maximum].argmax(0, keepdim=True)).squeeze(0)
