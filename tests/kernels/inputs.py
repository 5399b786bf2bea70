"""Random inputs of the losses, and what they are computed with: every divergence, temperature and weighting."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 259
PADDED_VOCAB_SIZE = 272

DIVERGENCES: list[dict[str, Any]] = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    *({"divergence": "jsd", "jsd_beta": beta} for beta in (0.1, 0.5, 0.9)),
]
SETTINGS: list[dict[str, Any]] = [
    *(
        {**divergence, "temperature": temperature, "ce_weight": ce_weight}
        for divergence, temperature, ce_weight in itertools.product(DIVERGENCES, (0.5, 1.0, 2.0, 4.0), (0.0, 0.7))
    ),
    {"temperature": 2.0, "temperature_squared": False, "logits_weight": 0.3},
    {"logits_weight": 0.0, "ce_weight": 1.0},
]

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(
    *,
    tokens: int = 24,
    vocab: int = VOCAB_SIZE,
    padded: int = PADDED_VOCAB_SIZE,
    width: int = 32,
    teacher_width: int = 48,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Student hidden, student weight (both requiring gradients), teacher hidden and weight, labels, token weights.

    Every third token of four has no weight, every fourth half of one.
    """
    generator = torch.Generator().manual_seed(7)

    def normal(rows: int, columns: int, factor: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * factor).to(dtype)

    student, student_weight = normal(tokens, width, scale), normal(padded, width, 0.2)
    teacher, teacher_weight = normal(tokens, teacher_width, scale), normal(padded, teacher_width, 0.2)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    token_weights = torch.tensor([1.0, 1.0, 0.0, 0.5]).repeat(-(-tokens // 4))[:tokens]
    return (
        student.requires_grad_(),
        student_weight.requires_grad_(),
        teacher,
        teacher_weight,
        labels,
        token_weights,
    )


def chunk_bytes(tensors: Tensors, tokens: int, shards: int = 1) -> int:
    """As many bytes as two fp32 logit buffers of `tokens` tokens take."""
    return 8 * tokens * tensors[1].shape[0] // shards


def relative_error(mine: Tensor, reference: Tensor) -> float:
    return ((mine.double() - reference.double()).norm() / reference.double().norm()).item()
