"""Row statistics: the few numbers per token and vocabulary shard from which losses and gradients follow.

    RowKernels.statistics on each shard -> one all-gather -> merge -> [JSD: RowKernels.mixture -> one all-gather ->
    merge_mixture] -> RowKernels.gradients on each shard

Notation: s, t are the logits of student and teacher divided by the temperature T; x = s - max(s), y = t - max(t), the
maxima being the shard's own; q, p are the softmax of s, t over the whole vocabulary. Everything here has [n] or
[shards, n] elements; what touches the vocabulary is in torch_rows.py and triton_rows.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from minitron_nemo.kernels.objective import Objective

# Columns of `statistics`. LABEL: s of the label. UNSCALED_SUM: sum of exp(T x). CROSS: the sum of
# exp(y) (y - x) for forward KL, of exp(x) (x - y) for reverse KL, 0 for JSD. *_BEST: the vocabulary id of the largest
# logit (exact in fp32 up to 2^24), where asked for.
STUDENT_MAX, STUDENT_SUM, UNSCALED_SUM, LABEL, STUDENT_BEST, TEACHER_MAX, TEACHER_SUM, CROSS, TEACHER_BEST = range(9)
STUDENT_COLUMNS, ALL_COLUMNS = 5, 9

# LABEL of a shard without the label, maxima of a shard without any row: finite, so that 0 * x stays 0.
ABSENT = torch.finfo(torch.float32).min
# A row whose largest logit over all shards is below this holds nothing: its softmax is undefined, NaN.
NOTHING = -1e30


@dataclass(frozen=True)
class Rows:
    """One value per row, fp64. Those that end in `max`, `scale` or `offset` belong to this shard's logits."""

    ce: Tensor  # inf where no shard holds the label
    divergence: Tensor | None  # at the temperature, without its square; for JSD known after `merge_mixture`
    student_max: Tensor
    student_scale: Tensor  # exp(x) * student_scale = q
    unscaled_scale: Tensor  # exp(x)^T * unscaled_scale = softmax of the student's logits at temperature 1
    teacher_max: Tensor | None = None
    teacher_scale: Tensor | None = None  # exp(y) * teacher_scale = p
    log_ratio_offset: Tensor | None = None  # x - y + log_ratio_offset = log(q / p)
    student_mixture_kl: Tensor | None = None  # JSD: KL(q || m)


class RowKernels(Protocol):
    """The passes over [n, v] logits of one shard. Both modules that implement it work on any strided row layout.

    Buffers belong to the call sequence: each call may overwrite `student` and `teacher`, and must be given them as the
    call before left them. v may be 0: every row of this shard is padding.
    """

    def statistics(
        self,
        student: Tensor,  # [n, v] logits
        teacher: Tensor | None,  # [n, v] logits
        labels: Tensor,  # int64 [n], in this shard's numbering; elsewhere: outside [0, v)
        objective: Objective,
        first_row: int | None,  # of the vocabulary, on this shard: fills the *_BEST columns; None: they stay 0
    ) -> Tensor:
        """fp32 or fp64 [n, STUDENT_COLUMNS] without a teacher, [n, ALL_COLUMNS] with one."""

    def mixture(self, student: Tensor, teacher: Tensor, rows: Rows, objective: Objective) -> Tensor:
        """JSD's second pass: fp32 or fp64 [n, 2], this shard's sums of p log(p / m) and q log(q / m)."""

    def gradients(
        self,
        student: Tensor,  # [n, v]; overwritten by the gradient, in its own dtype
        teacher: Tensor | None,
        labels: Tensor,
        divergence_weights: Tensor,  # fp64 [n]: factor of d divergence / d logits, 1 / T included
        ce_weights: Tensor,  # fp64 [n]: factor of d cross-entropy / d logits
        rows: Rows,
        objective: Objective,
    ) -> None:
        """d(sum over rows of the weighted divergence and cross-entropy) / d(student logits), unscaled by T.

        Without a teacher the divergence's part is divergence_weights * q: a softmax, to which callers that know a
        sparse teacher add the rest.
        """


def merge(shards: Tensor, shard: int, objective: Objective) -> Rows:
    """Combine the statistics of all vocabulary shards, [shards, n, columns], as seen from shard number `shard`."""
    shards = shards.double()
    student_max, student_rescale, student_sum = _log_sum_exp_parts(shards, STUDENT_MAX, STUDENT_SUM)
    unscaled_rescale = student_rescale**objective.temperature
    unscaled_sum = (unscaled_rescale * shards[:, :, UNSCALED_SUM]).sum(0)
    label = shards[:, :, LABEL].amax(0)
    ce = unscaled_sum.log() + (student_max - label) * objective.temperature
    student_rows = Rows(
        ce=torch.where(label == ABSENT, float("inf"), ce),
        divergence=None,
        student_max=shards[shard, :, STUDENT_MAX],
        student_scale=student_rescale[shard] / student_sum,
        unscaled_scale=unscaled_rescale[shard] / unscaled_sum,
    )
    if shards.shape[2] == STUDENT_COLUMNS:
        return student_rows
    teacher_max, teacher_rescale, teacher_sum = _log_sum_exp_parts(shards, TEACHER_MAX, TEACHER_SUM)
    # x - y of each shard is relative to the shard's own maxima; this makes it relative to the global ones.
    shift = (shards[:, :, STUDENT_MAX] - student_max) - (shards[:, :, TEACHER_MAX] - teacher_max)
    log_sum_ratio = teacher_sum.log() - student_sum.log()
    divergence = None
    if objective.divergence == "forward_kl":
        cross = (teacher_rescale * (shards[:, :, CROSS] - shards[:, :, TEACHER_SUM] * shift)).sum(0)
        divergence = cross / teacher_sum - log_sum_ratio
    elif objective.divergence == "reverse_kl":
        cross = (student_rescale * (shards[:, :, CROSS] + shards[:, :, STUDENT_SUM] * shift)).sum(0)
        divergence = cross / student_sum + log_sum_ratio
    return replace(
        student_rows,
        divergence=divergence,
        teacher_max=shards[shard, :, TEACHER_MAX],
        teacher_scale=teacher_rescale[shard] / teacher_sum,
        log_ratio_offset=shift[shard] + log_sum_ratio,
    )


def merge_mixture(shards: Tensor, rows: Rows, objective: Objective) -> Rows:
    """Add what `mixture` gave on all shards, [shards, n, 2]."""
    teacher_kl, student_kl = shards.double().sum(0).unbind(1)
    beta = objective.jsd_beta
    return replace(rows, divergence=beta * teacher_kl + (1 - beta) * student_kl, student_mixture_kl=student_kl)


def agreement(shards: Tensor) -> Tensor:
    """Whether both models' most likely token is the same, bool [n], from the statistics of all vocabulary shards."""
    return likeliest(shards) == _best(shards, TEACHER_MAX, TEACHER_BEST)


def likeliest(shards: Tensor) -> Tensor:
    """Vocabulary id of the student's most likely token, [n], from the statistics of all vocabulary shards."""
    return _best(shards, STUDENT_MAX, STUDENT_BEST)


def _log_sum_exp_parts(shards: Tensor, maximum: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Global maximum [n], the factor from each shard's exponentials to the global ones [shards, n], global sum [n]."""
    highest = shards[:, :, maximum].amax(0)
    highest = highest.masked_fill(highest < NOTHING, float("nan"))
    rescale = (shards[:, :, maximum] - highest).exp()
    return highest, rescale, (rescale * shards[:, :, total]).sum(0)


def _best(shards: Tensor, maximum: int, best: int) -> Tensor:
    return shards[:, :, best].gather(0, shards[:, :, maximum].argmax(0, keepdim=True)).squeeze(0)
