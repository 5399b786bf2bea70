"""The passes of a `RowKernels` over logits cut into vocabulary shards, and the formula they must agree with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.rows import RowKernels, merge, merge_mixture

_BESIDE = 3  # columns beside each shard's, so that rows are neither adjacent nor aligned
_SENTINEL = 7.0


@dataclass(frozen=True)
class Outcome:
    ce: Tensor  # fp64 [n]
    divergence: Tensor | None  # fp64 [n]
    gradient: Tensor  # [n, v], of the sum of weight * objective


def passes(
    kernels: RowKernels,
    student: Tensor,  # [n, v]
    teacher: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    objective: Objective,
    cuts: tuple[int, ...] = (),  # where the vocabulary is cut into shards
) -> Outcome:
    """All passes on all shards. Raises AssertionError if anything is written but the gradient."""
    edges = (0, *cuts, student.shape[1])
    shards = [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
    students = [_in_wider_rows(student[:, shard]) for shard in shards]
    teachers = [None if teacher is None else _in_wider_rows(teacher[:, shard]) for shard in shards]
    local = [labels - shard.start for shard in shards]
    pairs = list(zip(students, teachers, strict=True))
    statistics = [kernels.statistics(s, t, own, objective, None) for (s, t), own in zip(pairs, local, strict=True)]
    rows = [merge(torch.stack(statistics), index, objective) for index in range(len(shards))]
    if teacher is not None and objective.divergence == "jsd":
        sums = [kernels.mixture(s, t, mine, objective) for (s, t), mine in zip(pairs, rows, strict=True)]
        rows = [merge_mixture(torch.stack(sums), mine, objective) for mine in rows]
    divergence_weights = weights.double() * (objective.logits_weight * objective.divergence_scale)
    divergence_weights = divergence_weights / objective.temperature * (teacher is not None)
    for (s, t), own, mine in zip(pairs, local, rows, strict=True):
        kernels.gradients(s, t, own, divergence_weights, weights.double() * objective.ce_weight, mine, objective)
    for s, t, shard in zip(students, teachers, shards, strict=True):
        assert (_beside(s) == _SENTINEL).all()
        if teacher is not None and t is not None:
            torch.testing.assert_close(t, teacher[:, shard], rtol=0, atol=0, equal_nan=True)
            assert (_beside(t) == _SENTINEL).all()
    return Outcome(rows[0].ce, rows[0].divergence, torch.cat(students, 1))


def _in_wider_rows(logits: Tensor) -> Tensor:
    buffer = logits.new_full((logits.shape[0], logits.shape[1] + _BESIDE), _SENTINEL)
    buffer[:, : logits.shape[1]] = logits
    return buffer[:, : logits.shape[1]]


def _beside(logits: Tensor) -> Tensor:
    return logits.as_strided((logits.shape[0], _BESIDE), logits.stride(), logits.storage_offset() + logits.shape[1])


def formula(student: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor, objective: Objective) -> Outcome:
    """In fp64, differentiated by autograd. Logits of -inf are taken as -1e9, whose exponential is 0 all the same."""
    logits = student.double().clamp_min(-1e9).requires_grad_()
    ce = -logits.log_softmax(-1).gather(1, labels.clamp(0, student.shape[1] - 1).unsqueeze(1)).squeeze(1)
    total = objective.ce_weight * (weights * ce).sum()
    divergence = None
    if teacher is not None:
        log_p = (teacher.double().clamp_min(-1e9) / objective.temperature).log_softmax(-1)
        log_q = (logits / objective.temperature).log_softmax(-1)
        if objective.divergence == "forward_kl":
            divergence = _kl(log_p, log_q)
        elif objective.divergence == "reverse_kl":
            divergence = _kl(log_q, log_p)
        else:
            beta = objective.jsd_beta
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            divergence = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
        total = total + objective.logits_weight * objective.divergence_scale * (weights * divergence).sum()
        divergence = divergence.detach()
    return Outcome(ce.detach(), divergence, torch.autograd.grad(total, logits)[0])


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def assert_agree(mine: Outcome, reference: Outcome, gradient_error: float = 1e-5, loss_error: float = 1e-5) -> None:
    """Losses of each row; the gradient as a whole, by norm."""
    torch.testing.assert_close(mine.ce, reference.ce, rtol=loss_error, atol=1e-6)
    assert (mine.divergence is None) == (reference.divergence is None)
    if mine.divergence is not None:
        torch.testing.assert_close(mine.divergence, reference.divergence, rtol=loss_error, atol=1e-7)
    error = (mine.gradient.double() - reference.gradient).norm()
    assert error <= gradient_error * reference.gradient.norm() + 1e-12
