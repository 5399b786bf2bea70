"""Sparse teachers made from dense ones, and the loss against them in fp64, a row at a time, categories written out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.kernels import LossSums, SparseTeacher, linear_kd_loss
from tests.kernels.inputs import VOCAB_SIZE, Tensors

INF = float("inf")
ENTRIES = 70  # enough to hold all rows of one of four shards
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def _row_divergence(log_q: Tensor, teacher: SparseTeacher, row: int, divergence: str, beta: float) -> Tensor:
    """log_q: the student's log-softmax over the vocabulary, fp64 [v]."""
    used = teacher.log_probs[row] > -INF
    ids, log_p = teacher.token_ids[row][used], teacher.log_probs[row][used].double()
    if teacher.weights is not None:
        return (teacher.weights[row][used].double() * (log_p - log_q[ids])).sum()
    assert teacher.tail_log_probs is not None
    rest = torch.ones(len(log_q), dtype=torch.bool).index_fill(0, ids, False)
    log_p = torch.cat([log_p, teacher.tail_log_probs[row : row + 1].double()])
    log_q = torch.cat([log_q[ids], log_q[rest].logsumexp(0, keepdim=True)])
    if divergence == "forward_kl":
        return kl(log_p, log_q)
    if divergence == "reverse_kl":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    present = log_a > -INF
    return (log_a[present].exp() * (log_a[present] - log_b[present])).sum()


def formula(
    logits: Tensor,
    teacher: SparseTeacher,
    labels: Tensor,
    token_weights: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    jsd_beta: float = 0.5,
    logits_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, divergence and cross-entropy of fp64 logits [tokens, vocab]; tokens without weight are left out."""
    divergence_sum = ce = logits.sum() * 0
    for row in token_weights.nonzero().flatten().tolist():
        log_q = (logits[row] / temperature).log_softmax(0)
        divergence_sum = divergence_sum + token_weights[row] * _row_divergence(
            log_q, teacher, row, divergence, jsd_beta
        )
        ce = ce - token_weights[row] * logits[row].log_softmax(0)[labels[row]]
    if temperature_squared:
        divergence_sum = divergence_sum * temperature**2
    return logits_weight * divergence_sum + ce_weight * ce, divergence_sum, ce


def projected_formula(tensors: Tensors, teacher: SparseTeacher, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    student, weight, _, _, labels, token_weights = tensors
    logits = (student.double() @ weight.double().t())[:, :VOCAB_SIZE]
    return formula(logits, teacher, labels, token_weights, **options)


def teacher_log_probs(tensors: Tensors, temperature: float) -> Tensor:
    logits = (tensors[2].double() @ tensors[3].double().t())[:, :VOCAB_SIZE]
    return (logits / temperature).log_softmax(1)


def bucket(log_probs: Tensor, ids: Tensor, used: Tensor) -> SparseTeacher:
    """From a dense fp64 [tokens, vocab]."""
    rest = torch.ones_like(log_probs).scatter_reduce(1, ids, (~used).double(), "amin").bool()
    return SparseTeacher(
        token_ids=ids,
        log_probs=log_probs.gather(1, ids).masked_fill(~used, -INF).float(),
        tail_log_probs=log_probs.masked_fill(~rest, -INF).logsumexp(1).float(),
    )


def top(tensors: Tensors, temperature: float, count: int = ENTRIES) -> SparseTeacher:
    """The most likely entries, but: token 0 has the first ids, token 1 a few among unused ones, token 3 none."""
    log_probs = teacher_log_probs(tensors, temperature)
    ids = log_probs.topk(count, 1).indices
    ids[0] = torch.arange(count)
    used = torch.ones_like(ids, dtype=torch.bool)
    used[1] = torch.arange(count) % 3 == 1
    used[3] = False
    return bucket(log_probs, ids, used)


def draws(log_probs: Tensor, likely: int, count: int) -> SparseTeacher:
    """The most likely entries at their probability, and draws from the rest, of equal weight."""
    ids = log_probs.topk(likely, 1).indices
    rest = log_probs.exp().scatter(1, ids, 0.0)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(rest, count, replacement=True, generator=generator)
    weights = torch.cat([log_probs.gather(1, ids).exp(), (rest.sum(1, keepdim=True) / count).expand(-1, count)], 1)
    ids = torch.cat([ids, drawn], 1)
    return SparseTeacher(ids, log_probs.gather(1, ids).float(), weights=weights.float())


def sparse_loss(tensors: Tensors, teacher: SparseTeacher, **options: Any) -> tuple[Tensor, LossSums]:
    student, weight, _, _, labels, token_weights = tensors
    return linear_kd_loss(
        student, weight, None, None, labels, token_weights, vocab_size=VOCAB_SIZE, sparse_teacher=teacher, **options
    )
