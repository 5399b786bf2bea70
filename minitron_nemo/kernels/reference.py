"""The loss as a formula in fp64 on full logits, for tests and benchmarks: nothing of the fused kernel is used here."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_loss(
    student_hidden: Tensor,  # [tokens, h_s]
    student_weight: Tensor,  # [padded_vocab, h_s]
    teacher_hidden: Tensor | None,  # [tokens, h_t]
    teacher_weight: Tensor | None,  # [padded_vocab, h_t]
    labels: Tensor,  # [tokens]
    token_weights: Tensor,  # [tokens]
    *,
    vocab_size: int,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    jsd_beta: float = 0.5,
    logits_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, divergence sum and cross-entropy sum as fp64 scalars, differentiable by autograd."""
    student = (student_hidden.double() @ student_weight.double().t())[:, :vocab_size]
    weights = token_weights.double()
    label_log_p = student.log_softmax(-1).gather(1, labels.clamp(0, vocab_size - 1).unsqueeze(1)).squeeze(1)
    ce = -(weights * label_log_p).sum()
    divergence_sum = torch.zeros_like(ce)
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden.double() @ teacher_weight.double().t())[:, :vocab_size]
        log_p, log_q = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
        if divergence == "forward_kl":
            per_token = _kl(log_q, log_p)
        elif divergence == "reverse_kl":
            per_token = _kl(log_p, log_q)
        else:
            log_m = torch.logaddexp(log_q + math.log(jsd_beta), log_p + math.log1p(-jsd_beta))
            per_token = jsd_beta * _kl(log_q, log_m) + (1 - jsd_beta) * _kl(log_p, log_m)
        divergence_sum = (weights * per_token).sum() * (temperature**2 if temperature_squared else 1.0)
    return logits_weight * divergence_sum + ce_weight * ce, divergence_sum, ce


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def reference_hidden_loss(
    student_hidden: Tensor,  # [tokens, h_s]
    projection: Tensor | None,  # [h_t, h_s]
    teacher_hidden: Tensor,  # [tokens, h_t]
    token_weights: Tensor,  # [tokens]
    *,
    kind: str = "cosine",
) -> Tensor:
    """Weighted sum over tokens of the intermediate-state loss, an fp64 scalar, differentiable by autograd."""
    y, t = student_hidden.double(), teacher_hidden.double()
    if projection is not None:
        y = y @ projection.double().t()
    if kind == "cosine":
        per_token = 1 - (y * t).sum(1) / (y.norm(dim=1).clamp_min(1e-8) * t.norm(dim=1).clamp_min(1e-8))
    else:
        per_token = (y - t).square().mean(1)
    return (token_weights.double() * per_token).sum()
