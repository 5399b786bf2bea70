"""What holds for any number of tokens, width, vocabulary, padding, chunk and setting; hypothesis picks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitron_nemo.kernels import linear_kd_loss, logits_kd, logits_kd_loss
from minitron_nemo.kernels.reference import reference_loss
from tests.kernels.inputs import SETTINGS, Tensors, inputs

EXAMPLES = settings(derandomize=True, max_examples=100, deadline=None)


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    padding: int
    width: int
    teacher_width: int
    scale: float
    chunk_tokens: int
    setting: dict[str, Any]

    @property
    def rounding(self) -> float:
        """Of the loss where it is small: divergences are differences of numbers near 1, times the square of T."""
        return 1e-7 * max(1.0, self.setting.get("temperature", 1.0) ** 2) * self.tokens

    @property
    def padded(self) -> int:
        return self.vocab + self.padding

    def tensors(self) -> Tensors:
        return inputs(
            tokens=self.tokens,
            vocab=self.vocab,
            padded=self.padded,
            width=self.width,
            teacher_width=self.teacher_width,
            scale=self.scale,
        )

    def from_states(self, tensors: Tensors) -> Tensor:
        chunk_bytes = 8 * self.chunk_tokens * self.padded
        return linear_kd_loss(*tensors, vocab_size=self.vocab, chunk_bytes=chunk_bytes, **self.setting)[0]

    def from_logits(self, student: Tensor, teacher: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
        """The student's logits are left alone."""
        with patch.object(logits_kd, "_BUFFER_BYTES", 4 * self.chunk_tokens * self.padded):
            return logits_kd_loss(student * 1.0, teacher, labels, token_weights, vocab_size=self.vocab, **self.setting)[
                0
            ]


cases = st.builds(
    Case,
    tokens=st.integers(0, 13),
    vocab=st.integers(1, 200),
    padding=st.integers(0, 9),
    width=st.integers(1, 9),
    teacher_width=st.integers(1, 9),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    chunk_tokens=st.integers(1, 15),
    setting=st.sampled_from(SETTINGS),
)


def _logits(tensors: Tensors) -> tuple[Tensor, Tensor]:
    student, weight, teacher, teacher_weight, *_ = tensors
    return (student @ weight.t()).detach().requires_grad_(), teacher @ teacher_weight.t()


def _assert_near(mine: Tensor, reference: Tensor, relative: float, absolute: float) -> None:
    assert mine.shape == reference.shape
    error = (mine.double() - reference.double()).norm().item()
    assert error <= relative * reference.double().norm().item() + absolute


@EXAMPLES
@given(cases)
def test_loss_and_gradients_from_states_are_the_formula(case: Case) -> None:
    tensors = case.tensors()
    total = case.from_states(tensors)
    expected, _, _ = reference_loss(*tensors, vocab_size=case.vocab, **case.setting)
    _assert_near(total, expected, 1e-6, case.rounding)
    gradients = (torch.autograd.grad(loss, tensors[:2]) for loss in (total, expected))
    for mine, reference in zip(*gradients, strict=True):
        _assert_near(mine, reference, 1e-5, 10 * case.rounding)


@EXAMPLES
@given(cases)
def test_loss_and_gradients_from_logits_are_the_formula(case: Case) -> None:
    tensors = case.tensors()
    (student, teacher), identity = _logits(tensors), torch.eye(case.padded)
    total = case.from_logits(student, teacher, *tensors[4:])
    expected, _, _ = reference_loss(
        student, identity, teacher, identity, *tensors[4:], vocab_size=case.vocab, **case.setting
    )
    _assert_near(total, expected, 1e-6, case.rounding)
    gradients = (torch.autograd.grad(loss, student) for loss in (total, expected))
    for mine, reference in zip(*gradients, strict=True):
        _assert_near(mine, reference, 1e-5, 10 * case.rounding)


@EXAMPLES
@given(cases, st.integers(0, 13))
def test_the_sum_over_tokens_is_the_sum_over_any_two_parts(case: Case, cut: int) -> None:
    student, weight, teacher, teacher_weight, labels, token_weights = case.tensors()

    def of(tokens: slice) -> tuple[Tensor, ...]:
        part = (student[tokens], weight, teacher[tokens], teacher_weight, labels[tokens], token_weights[tokens])
        total = case.from_states(part)
        return total, *torch.autograd.grad(total, (student, weight))

    for whole, first, second in zip(of(slice(None)), of(slice(cut)), of(slice(cut, None)), strict=True):
        _assert_near(first + second, whole, 1e-6, 10 * case.rounding)


@EXAMPLES
@given(cases, st.sampled_from([-50.0, 3.0, 50.0]))
def test_a_constant_added_to_all_logits_of_a_token_changes_nothing(case: Case, constant: float) -> None:
    tensors = case.tensors()
    student, teacher = _logits(tensors)
    moved = (student + constant).detach().requires_grad_()
    totals = case.from_logits(student, teacher, *tensors[4:]), case.from_logits(moved, teacher - constant, *tensors[4:])
    # Logits near 50 are rounded to 4e-6.
    _assert_near(totals[1], totals[0], 1e-5, 100 * case.rounding)
    gradients = torch.autograd.grad(totals[1], moved)[0], torch.autograd.grad(totals[0], student)[0]
    _assert_near(*gradients, 1e-5, 100 * case.rounding)


@EXAMPLES
@given(cases)
def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient_of_it(case: Case) -> None:
    student, _, _, _, labels, token_weights = case.tensors()
    logits = (student @ torch.randn(case.padded, case.width, generator=torch.Generator().manual_seed(1)).t()).detach()
    setting = {**case.setting, "ce_weight": 0.0}
    logits.requires_grad_()
    total, _ = logits_kd_loss(
        logits * 1.0, logits.detach().clone(), labels, token_weights, vocab_size=case.vocab, **setting
    )
    assert abs(total.item()) <= 3 * case.rounding
    assert torch.autograd.grad(total, logits)[0].norm().item() <= 3 * case.rounding
