"""The same losses against a teacher of which only a few entries per token are known: `dense`, with another teacher.

Bucket form: k entries and one category for the rest of the vocabulary, k + 1 in all; the student's probabilities of
the rest are summed into that category. The entries' logits are taken out of the buffer before the row statistics, which
are then those of the rest: its mass is a sum, never 1 minus the others. A distribution on k + 1 categories is small
enough for fp64 on every rank; r, the divergence's gradient on it, gives that of the logits: r_c at entry c, and
r_rest * softmax over the rest.

Sampled form: entries with importance weights w_i such that sum_i w_i f(i) has the mean sum_i p_i f(i): m draws from p
at w_i = 1 / m, or the most likely entries at w_i = p_i and m draws from the rest at its mass / m (2503.16870). Forward
KL is linear in p, so it and its gradient are unbiased; reverse KL and JSD are not linear, and are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.rows import (
    ABSENT,
    NOTHING,
    STUDENT_COLUMNS,
    STUDENT_MAX,
    STUDENT_SUM,
    UNSCALED_SUM,
    RowKernels,
    Rows,
    merge,
)
from minitron_nemo.kernels.shard import Shard

_HIDDEN = -1e38  # a logit below `NOTHING` that stays finite, times the temperature where that is below 1


@dataclass(frozen=True)
class SparseTeacher:
    """A teacher's distributions at the loss's temperature; whole on every rank of the tensor-parallel group.

    token_ids: int64 [tokens, k], vocabulary ids; log_probs: fp32 [tokens, k], -inf marks an unused entry, whose id may
    be anything. Exactly one of
    tail_log_probs: fp32 [tokens], log of the mass of all other entries, -inf for none: the bucket form. The ids that a
        token uses must differ.
    weights: fp32 [tokens, k], importance weights: the sampled form. An id may come up several times.

    Raises ValueError for shapes and dtypes that do not fit. Ids outside the vocabulary, and repeated ones in the bucket
    form, are found without looking at values on the host: such a token's loss is not finite, and counted as such.
    """

    token_ids: Tensor
    log_probs: Tensor
    tail_log_probs: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.tail_log_probs is None) == (self.weights is None):
            raise ValueError("sparse teacher: give either tail_log_probs or weights")
        if self.token_ids.dim() != 2 or self.token_ids.dtype != torch.int64:
            raise ValueError(
                f"token_ids: {self.token_ids.dtype} {tuple(self.token_ids.shape)}, must be int64 [tokens, k]"
            )
        tokens_and_entries = self.token_ids.shape
        for name, tensor, shape in (
            ("log_probs", self.log_probs, tokens_and_entries),
            ("tail_log_probs", self.tail_log_probs, tokens_and_entries[:1]),
            ("weights", self.weights, tokens_and_entries),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)}, must be {tuple(shape)} as token_ids has it")

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def __getitem__(self, tokens: slice) -> SparseTeacher:
        return SparseTeacher(
            self.token_ids[tokens],
            self.log_probs[tokens],
            None if self.tail_log_probs is None else self.tail_log_probs[tokens],
            None if self.weights is None else self.weights[tokens],
        )

    def without(self, masked: Tensor) -> SparseTeacher:
        """With nothing known of masked tokens (bool [tokens]), whatever was given for them: their divergence is 0."""
        return SparseTeacher(
            self.token_ids,
            self.log_probs.masked_fill(masked.unsqueeze(1), -float("inf")),
            None if self.tail_log_probs is None else self.tail_log_probs.masked_fill(masked, 0.0),
            self.weights,
        )


@dataclass(frozen=True, kw_only=True)
class SparseRows(Rows):
    """`Rows` whose softmaxes are of what the buffer holds, all of the vocabulary or the rest of it; s = logits / T.

    fp64. Where the buffer holds nothing, both scales are 0.
    """

    softmax_gradients: Tensor  # [n]: d divergence / d s is this times the softmax, and
    entry_gradients: Tensor  # [n, k]: this is added at the entries
    softmax_share: Tensor  # [n]: how much of the student's mass at temperature 1 the buffer holds, and
    entry_probs: Tensor  # [n, k]: what it does not


def loss_rows(
    student: Tensor,
    teacher: SparseTeacher,
    labels: Tensor,
    shard: Shard,
    objective: Objective,
    kernels: RowKernels,
) -> SparseRows:
    """Loss per row of fp32 [n, shard.rows] logits against the teacher's n tokens; labels: vocabulary ids, int64 [n].

    One all-gather of k + 6 numbers per row over the group, for every divergence. Overwrites `student` as `RowKernels`
    does. Raises ValueError for another number of tokens, and for reverse KL and JSD in the sampled form.
    """
    if not len(student) == len(teacher) == len(labels):
        raise ValueError(f"sparse teacher: {len(teacher)} tokens, the student has {len(student)}")
    if teacher.weights is not None and objective.divergence != "forward_kl":
        raise ValueError(
            f"divergence {objective.divergence!r}: not linear in the teacher's probabilities, so biased with sampled "
            "ones; use forward_kl, or give tail_log_probs"
        )
    held, local = shard.owned(_labels_and_entries(labels, teacher))
    if student.shape[1]:
        picked = student.gather(1, local).masked_fill_(~held, ABSENT)
    else:
        picked = student.new_full(local.shape, ABSENT)
    used = teacher.log_probs != -float("inf")
    if teacher.weights is None and student.shape[1]:
        hidden_logit = _HIDDEN * min(1.0, objective.temperature)
        hidden = torch.where(held[:, 1:] & used, hidden_logit, float("inf")).to(student.dtype)
        student.scatter_reduce_(1, local[:, 1:], hidden, "amin")  # the minimum with inf leaves an entry alone
    statistics = kernels.statistics(student, None, _nowhere(labels), objective, None)
    shards = shard.gather_statistics(torch.cat([statistics, picked], 1))
    label, entries = shards[:, :, STUDENT_COLUMNS:].amax(0).double().tensor_split([1], dim=1)
    # An id that no shard holds, where it counts, makes the loss infinite or NaN instead of wrong.
    label = label.squeeze(1).masked_fill(label.squeeze(1) == ABSENT, -float("inf"))
    entries = entries.masked_fill(entries == ABSENT, float("nan")).masked_fill(~used, -float("inf"))
    shards = shards[:, :, :STUDENT_COLUMNS]
    rows = merge(shards, shard.rank, objective)
    if teacher.weights is None:
        entries = entries.masked_fill(_repeated(teacher.token_ids, used).unsqueeze(1) & used, float("nan"))
        return _bucket_rows(rows, shards, label, entries, teacher, objective)
    return _sampled_rows(rows, shards, label, entries, teacher, objective)


def logit_gradients(
    student: Tensor,
    teacher: SparseTeacher,
    labels: Tensor,
    token_weights: Tensor,
    rows: SparseRows,
    shard: Shard,
    objective: Objective,
    kernels: RowKernels,
) -> None:
    """Overwrite `student`, as `loss_rows` left it, with d(sum of weight * objective) / d(student logits)."""
    weights = token_weights.double()
    divergence_weights = weights * (objective.logits_weight * objective.divergence_scale / objective.temperature)
    ce_weights = weights * objective.ce_weight
    kernels.gradients(
        student,
        None,
        _nowhere(labels),
        divergence_weights * rows.softmax_gradients,
        ce_weights * rows.softmax_share,
        rows,
        objective,
    )
    if student.shape[1] == 0:
        return
    at_entries = divergence_weights.unsqueeze(1) * rows.entry_gradients + ce_weights.unsqueeze(1) * rows.entry_probs
    held, local = shard.owned(_labels_and_entries(labels, teacher))
    added = torch.cat([-ce_weights.unsqueeze(1), at_entries], 1).masked_fill(~held, 0.0)
    student.scatter_add_(1, local, added.to(student.dtype))


def _labels_and_entries(labels: Tensor, teacher: SparseTeacher) -> Tensor:
    """Vocabulary ids [n, 1 + k]."""
    return torch.cat([labels.unsqueeze(1), teacher.token_ids], 1)


def _nowhere(labels: Tensor) -> Tensor:
    """Labels that are on no shard: a label may be an entry, which is not in the buffer that `RowKernels` sees."""
    return torch.full_like(labels, -1)


def _bucket_rows(
    rows: Rows, shards: Tensor, label: Tensor, entries: Tensor, teacher: SparseTeacher, objective: Objective
) -> SparseRows:
    """From the rest's statistics of all shards and the logits of labels [n] and entries [n, k], fp64."""
    assert teacher.tail_log_probs is not None
    rest, unscaled_rest = _log_sums(shards, objective)
    nothing_left = shards[:, :, STUDENT_MAX].amax(0) < NOTHING
    rest, unscaled_rest = (values.masked_fill(nothing_left, -float("inf")) for values in (rest, unscaled_rest))
    log_q = torch.cat([entries / objective.temperature, rest.unsqueeze(1)], 1).log_softmax(1)
    log_p = torch.cat([teacher.log_probs, teacher.tail_log_probs.unsqueeze(1)], 1).double()
    divergence, gradients = _divergence(log_p, log_q, objective)
    unscaled = torch.cat([entries, unscaled_rest.unsqueeze(1)], 1)
    unscaled_probs = unscaled.softmax(1)
    return SparseRows(
        ce=unscaled.logsumexp(1) - label,
        divergence=divergence,
        student_max=rows.student_max,
        student_scale=rows.student_scale.masked_fill(nothing_left, 0.0),
        unscaled_scale=rows.unscaled_scale.masked_fill(nothing_left, 0.0),
        softmax_gradients=gradients[:, -1],
        entry_gradients=gradients[:, :-1],
        softmax_share=unscaled_probs[:, -1],
        entry_probs=unscaled_probs[:, :-1],
    )


def _sampled_rows(
    rows: Rows, shards: Tensor, label: Tensor, entries: Tensor, teacher: SparseTeacher, objective: Objective
) -> SparseRows:
    """From the whole vocabulary's statistics of all shards and the logits of labels [n] and entries [n, k], fp64."""
    assert teacher.weights is not None
    log_sum, unscaled_log_sum = _log_sums(shards, objective)
    weights = teacher.weights.double().masked_fill(teacher.log_probs == -float("inf"), 0.0)
    log_ratio = teacher.log_probs.double() - (entries / objective.temperature - log_sum.unsqueeze(1))
    return SparseRows(
        ce=unscaled_log_sum - label,
        divergence=torch.where(weights == 0, 0.0, weights * log_ratio).sum(1),
        student_max=rows.student_max,
        student_scale=rows.student_scale,
        unscaled_scale=rows.unscaled_scale,
        softmax_gradients=weights.sum(1),
        entry_gradients=-weights,
        softmax_share=torch.ones_like(log_sum),
        entry_probs=torch.zeros_like(weights),
    )


def _divergence(log_p: Tensor, log_q: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Of distributions on few categories, [n, c]: the divergence [n], and its gradient by the logits of q [n, c]."""
    p, q = log_p.exp(), log_q.exp()
    if objective.divergence == "forward_kl":
        return _kl_terms(log_p, log_q).sum(1), q * p.sum(1, keepdim=True) - p
    if objective.divergence == "reverse_kl":
        terms = _kl_terms(log_q, log_p)
        divergence = terms.sum(1)
        return divergence, terms - q * divergence.unsqueeze(1)
    beta = objective.jsd_beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    terms = _kl_terms(log_q, log_m)
    student_kl = terms.sum(1)
    divergence = beta * _kl_terms(log_p, log_m).sum(1) + (1 - beta) * student_kl
    return divergence, (1 - beta) * (terms - q * student_kl.unsqueeze(1))


def _kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a log(a / b), 0 where a is 0."""
    a = log_a.exp()
    return torch.where(a == 0, 0.0, a * (log_a - log_b))


def _log_sums(shards: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Log of the sums of exp(logits / T) and of exp(logits) over what the buffers of all shards hold, fp64 [n]."""
    shards = shards.double()
    highest = shards[:, :, STUDENT_MAX]
    scaled = highest + shards[:, :, STUDENT_SUM].log()
    unscaled = objective.temperature * highest + shards[:, :, UNSCALED_SUM].log()
    return scaled.logsumexp(0), unscaled.logsumexp(0)


def _repeated(ids: Tensor, used: Tensor) -> Tensor:
    """Rows in which an id is used twice, bool [n]."""
    unlike = torch.arange(-ids.shape[1], 0, device=ids.device)
    ordered = torch.where(used, ids, unlike).sort(1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(1)
