"""Random inputs of the fused loss: masked and fractionally weighted tokens, a padded vocabulary, two widths."""

from __future__ import annotations

import torch
from torch import Tensor

VOCAB_SIZE = 259
PADDED_VOCAB_SIZE = 272

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
    """Student hidden, student weight (both requiring gradients), teacher hidden and weight, labels, token weights."""
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
