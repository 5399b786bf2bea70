"""Inputs of the intermediate-state loss, and what it must give by the fp64 formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minitron_nemo.kernels.reference import reference_hidden_loss
from tests.kernels.inputs import relative_error

KINDS = ("cosine", "mse")
KIND = pytest.mark.parametrize("kind", KINDS)
PROJECTED = pytest.mark.parametrize("projected", [True, False], ids=["projected", "identity"])


def hidden_inputs(
    *,
    tokens: int = 24,
    width: int = 32,
    teacher_width: int = 48,
    projected: bool = True,
    distance: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Student states, projection, teacher states (at `distance` from the projected student, or anywhere), weights."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    projection = None
    if projected:
        projection = (torch.randn(teacher_width, width, generator=generator) / width**0.5).to(dtype).requires_grad_()
    teacher = torch.randn(tokens, teacher_width if projected else width, generator=generator)
    if distance is not None:
        with torch.no_grad():
            mapped = student.float() if projection is None else student.float() @ projection.float().t()
            teacher = mapped + distance * teacher
    weights = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.3]).repeat(-(-tokens // 5))[:tokens]
    return student, projection, teacher.to(dtype), weights


def chunk_bytes(tokens: int, teacher_width: int = 48) -> int:
    return 8 * tokens * teacher_width


def gradients_of(loss: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None]))


def exact_loss(student: Tensor, projection: Tensor | None, *rest: Tensor, kind: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients by the formula, all in fp64."""
    student = student.detach().double().requires_grad_()
    projection = None if projection is None else projection.detach().double().requires_grad_()
    loss = reference_hidden_loss(student, projection, *rest, kind=kind)
    return loss, gradients_of(loss, student, projection)


def worst_error(mine: list[Tensor], exact: list[Tensor]) -> float:
    return max(relative_error(*pair) for pair in zip(mine, exact, strict=True))
