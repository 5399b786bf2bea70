"""The passes over the vocabulary in Triton; `triton_rows` launches them and says what they do together."""

# Parameters of kernels carry no types: Triton evaluates what stands there.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minitron_nemo.kernels import rows as layout

_ABSENT = tl.constexpr(layout.ABSENT)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_STUDENT_MAX, _STUDENT_SUM = tl.constexpr(layout.STUDENT_MAX), tl.constexpr(layout.STUDENT_SUM)
_TEACHER_MAX, _TEACHER_SUM = tl.constexpr(layout.TEACHER_MAX), tl.constexpr(layout.TEACHER_SUM)
_STUDENT_BEST, _TEACHER_BEST = tl.constexpr(layout.STUDENT_BEST), tl.constexpr(layout.TEACHER_BEST)
_UNSCALED_SUM, _LABEL, _CROSS = (
    tl.constexpr(layout.UNSCALED_SUM),
    tl.constexpr(layout.LABEL),
    tl.constexpr(layout.CROSS),
)
_STUDENT_COLUMNS, _ALL_COLUMNS = tl.constexpr(layout.STUDENT_COLUMNS), tl.constexpr(layout.ALL_COLUMNS)


@triton.jit(do_not_specialize=["first_row"])
def statistics_kernel(
    student,
    teacher,
    labels,
    out,
    student_stride,
    teacher_stride,
    columns,
    temperature,
    inverse_temperature,
    first_row,
    DIVERGENCE: tl.constexpr,  # none: there is no teacher
    UNSCALED: tl.constexpr,  # the temperature is not 1: UNSCALED_SUM takes exponentials of its own
    BEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per row. Lane i meets entries i, i + BLOCK, ... with running maxima; lanes are joined at the end."""
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 2^31
    student += row * student_stride
    lanes = tl.arange(0, BLOCK)
    student_max = tl.full([BLOCK], _ABSENT, tl.float32)
    student_sum = tl.zeros([BLOCK], tl.float32)
    student_best = tl.zeros([BLOCK], tl.int32)
    unscaled_sum = tl.zeros([BLOCK], tl.float32)
    teacher_max = tl.full([BLOCK], _ABSENT, tl.float32)
    teacher_sum = tl.zeros([BLOCK], tl.float32)
    teacher_best = tl.zeros([BLOCK], tl.int32)
    cross = tl.zeros([BLOCK], tl.float32)
    if DIVERGENCE != "none":
        teacher += row * teacher_stride
    whole = columns // BLOCK * BLOCK
    for MASKED in tl.static_range(2):  # whole blocks, then the rest: masks of ragged rows would break up their loads
        for start in range(whole * MASKED, whole + (columns - whole) * MASKED, BLOCK):
            offsets = start + lanes
            s = _load(student, offsets, columns, MASKED) * inverse_temperature
            x, grown, old, new = _advance(s, student_max)
            if UNSCALED:
                other = tl.exp(-tl.abs(x) * temperature)
                unscaled_sum = tl.where(grown, unscaled_sum * other + 1.0, unscaled_sum + other)
            if DIVERGENCE != "none":
                t = _load(teacher, offsets, columns, MASKED) * inverse_temperature
                y, teacher_grown, teacher_old, teacher_new = _advance(t, teacher_max)
                if DIVERGENCE == "forward_kl":
                    cross = _advance_cross(cross, teacher_sum, teacher_old, teacher_new, y, x)
                if DIVERGENCE == "reverse_kl":
                    cross = _advance_cross(cross, student_sum, old, new, x, y)
                teacher_sum = teacher_sum * teacher_old + teacher_new
                teacher_max = tl.where(teacher_grown, t, teacher_max)
                teacher_best = tl.where(teacher_grown, offsets, teacher_best)
            student_sum = student_sum * old + new
            student_max = tl.where(grown, s, student_max)
            student_best = tl.where(grown, offsets, student_best)

    out += row * (_STUDENT_COLUMNS if DIVERGENCE == "none" else _ALL_COLUMNS)
    _store_label(out + _LABEL, student, tl.load(labels + row), columns, inverse_temperature)
    x, factor, total = _store_joined(out + _STUDENT_MAX, out + _STUDENT_SUM, student_max, student_sum)
    if UNSCALED:
        total = _sum(unscaled_sum * tl.exp(x * temperature))
    tl.store(out + _UNSCALED_SUM, total)
    _store_best(out + _STUDENT_BEST, student_best, x, first_row, BEST)
    if DIVERGENCE != "none":
        y, teacher_factor, _ = _store_joined(out + _TEACHER_MAX, out + _TEACHER_SUM, teacher_max, teacher_sum)
        if DIVERGENCE == "forward_kl":
            tl.store(out + _CROSS, _sum(_shift_cross(cross, teacher_sum, teacher_factor, y - x)))
        if DIVERGENCE == "reverse_kl":
            tl.store(out + _CROSS, _sum(_shift_cross(cross, student_sum, factor, x - y)))
        _store_best(out + _TEACHER_BEST, teacher_best, y, first_row, BEST)


@triton.jit
def _store_label(out, student, label, columns, inverse_temperature):
    owned = (label >= 0) & (label < columns)
    logit = tl.load(student + label, mask=owned, other=0.0).to(tl.float32) * inverse_temperature
    tl.store(out, tl.where(owned, logit, _ABSENT))


@triton.jit
def _store_joined(out_maximum, out_sum, maximum, total):
    """The row's maximum and sum; returns each lane's maximum less the row's, exp of that, and the sum."""
    highest = tl.max(maximum)
    difference = maximum - highest
    factor = tl.exp(difference)
    joined = _sum(total * factor)
    tl.store(out_maximum, highest)
    tl.store(out_sum, joined)
    return difference, factor, joined


@triton.jit
def _store_best(out, ids, difference, first_row, BEST: tl.constexpr):
    """The lowest id among lanes whose maximum is the row's."""
    if BEST:
        tl.store(out, first_row + tl.min(tl.where(difference == 0.0, ids, 2147483647)))


@triton.jit
def mixture_kernel(
    student,
    teacher,
    scalars,  # fp32 [n, 4]: student_max, student_scale, teacher_max, teacher_scale
    out,
    student_stride,
    teacher_stride,
    columns,
    inverse_temperature,
    beta,
    BLOCK: tl.constexpr,
):
    """A program per row."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    scalars += row * 4
    student_max, student_scale = tl.load(scalars), tl.load(scalars + 1)
    teacher_max, teacher_scale = tl.load(scalars + 2), tl.load(scalars + 3)
    lanes = tl.arange(0, BLOCK)
    teacher_kl = tl.zeros([BLOCK], tl.float32)
    student_kl = tl.zeros([BLOCK], tl.float32)
    whole = columns // BLOCK * BLOCK
    for MASKED in tl.static_range(2):
        for start in range(whole * MASKED, whole + (columns - whole) * MASKED, BLOCK):
            offsets = start + lanes
            x = _load(student, offsets, columns, MASKED) * inverse_temperature - student_max
            y = _load(teacher, offsets, columns, MASKED) * inverse_temperature - teacher_max
            q, p = tl.exp(x) * student_scale, tl.exp(y) * teacher_scale
            inverse = _inverse_mixture(q, p, beta)
            teacher_kl += p * _log_over_mixture(p, (1.0 - beta) * (p - q), inverse)
            student_kl += q * _log_over_mixture(q, beta * (q - p), inverse)
    tl.store(out + row * 2, _sum(teacher_kl))
    tl.store(out + row * 2 + 1, _sum(student_kl))


@triton.jit
def gradients_kernel(
    student,
    teacher,
    labels,
    scalars,  # fp32 [n, 5]: student_max, student_scale, unscaled_scale and the two weights; with a teacher [n, 8]:
    # also teacher_max, teacher_scale and the mean of the log ratio
    student_stride,
    teacher_stride,
    columns,
    temperature,
    inverse_temperature,
    beta,
    DIVERGENCE: tl.constexpr,
    UNSCALED: tl.constexpr,  # cross-entropy is wanted and the temperature is not 1
    BLOCK: tl.constexpr,
):
    """A program per block of a row."""
    blocks = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0).to(tl.int64) // blocks
    start = tl.program_id(0) % blocks * BLOCK
    student += row * student_stride
    if DIVERGENCE != "none":
        teacher += row * teacher_stride
        scalars += row * 8
    else:
        scalars += row * 5
    label = tl.load(labels + row)
    label = tl.where((label >= 0) & (label < columns), label, -1).to(tl.int32)
    if start + BLOCK <= columns:
        _gradient_block(
            student, teacher, label, scalars, start, columns, temperature, inverse_temperature, beta,
            DIVERGENCE, UNSCALED, BLOCK, False,
        )  # fmt: skip
    else:
        _gradient_block(
            student, teacher, label, scalars, start, columns, temperature, inverse_temperature, beta,
            DIVERGENCE, UNSCALED, BLOCK, True,
        )  # fmt: skip


@triton.jit
def _gradient_block(
    student,
    teacher,
    label,
    scalars,
    start,
    columns,
    temperature,
    inverse_temperature,
    beta,
    DIVERGENCE: tl.constexpr,
    UNSCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """d divergence / d s is, for forward KL, q - p (without a teacher q); for reverse KL and JSD
    q * (log ratio - its mean under q), of q / p as x - y and of q / m; JSD's weight holds 1 - beta."""
    offsets = start + tl.arange(0, BLOCK)
    x = _load(student, offsets, columns, MASKED) * inverse_temperature - tl.load(scalars)
    e = tl.exp(x)
    q = e * tl.load(scalars + 1)
    divergence = q
    if DIVERGENCE != "none":
        y = _load(teacher, offsets, columns, MASKED) * inverse_temperature - tl.load(scalars + 5)
        if DIVERGENCE == "reverse_kl":
            divergence = q * (tl.where(e > 0.0, x - y, 0.0) - tl.load(scalars + 7))
        else:
            p = tl.exp(y) * tl.load(scalars + 6)
            if DIVERGENCE == "forward_kl":
                divergence = q - p
            else:
                log_ratio = _log_over_mixture(q, beta * (q - p), _inverse_mixture(q, p, beta))
                divergence = q * (log_ratio - tl.load(scalars + 7))
    if UNSCALED:
        e = tl.exp(x * temperature)
    softmax = e * tl.load(scalars + 2) - tl.where(offsets == label, 1.0, 0.0)
    gradient = (divergence * tl.load(scalars + 3) + softmax * tl.load(scalars + 4)).to(student.dtype.element_ty)
    if MASKED:
        tl.store(student + offsets, gradient, mask=offsets < columns)
    else:
        tl.store(student + offsets, gradient)


@triton.jit
def _load(logits, offsets, columns, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(logits + offsets, mask=offsets < columns, other=-float("inf"))
    else:
        values = tl.load(logits + offsets)
    return values.to(tl.float32)


@triton.jit
def _sum(lanes):
    """In fp64: a small divergence is a difference of such sums. A lane's own share is a short sum."""
    return tl.sum(lanes.to(tl.float64))


@triton.jit
def _advance(logits, maximum):
    """logits - maximum; whether that raises the maximum; the factor of what was summed before; the new exponential.

    Of the two factors one is 1: a single exponential serves both cases.
    """
    difference = logits - maximum
    grown = logits > maximum
    factor = tl.exp(-tl.abs(difference))
    return difference, grown, tl.where(grown, factor, 1.0), tl.where(grown, 1.0, factor)


@triton.jit
def _advance_cross(cross, total, old, new, mass, other):
    """Sum of exp(a) (a - b), a being relative to its running maximum and b to its own.

    mass, other: next a and b relative to the maxima before; total, old, new: of the sum of exp(a), see `_advance`.
    """
    cross = _shift_cross(cross, total, old, tl.maximum(other, 0.0) - tl.maximum(mass, 0.0))
    return cross + tl.where(new > 0.0, new * (tl.minimum(mass, 0.0) - tl.minimum(other, 0.0)), 0.0)


@triton.jit
def _shift_cross(cross, total, factor, shift):
    """The sum after a - b has grown by `shift` and exp(a) by `factor`; an infinite sum with factor 0 is 0."""
    return tl.where(factor > 0.0, factor * (cross + total * shift), 0.0)


@triton.jit
def _inverse_mixture(q, p, beta):
    """1 / m, m = beta p + (1 - beta) q."""
    return 1.0 / tl.maximum(q + beta * (p - q), _TINY)


@triton.jit
def _log_over_mixture(a, difference, inverse):
    """log(a / m) from a - m, which the caller computes so that it stays exact as p and q near each other, and 1 / m."""
    u = difference * inverse
    # log(1 + u): near 0 its series, which 1 + u rounded to fp32 would spoil.
    series = 1.0 / 7 - u * (1.0 / 8)
    series = 1.0 / 6 - u * series
    series = 1.0 / 5 - u * series
    series = 1.0 / 4 - u * series
    series = 1.0 / 3 - u * series
    series = 1.0 / 2 - u * series
    series = u * (1.0 - u * series)
    return tl.where(tl.abs(u) < 0.125, series, tl.log(tl.maximum(a * inverse, _TINY)))
