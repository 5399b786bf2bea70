"""The fused loss against the fp64 formula and autograd, in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_nemo.kernels import linear_kd_loss, token_statistics
from minitron_nemo.kernels.linear_kd import project
from minitron_nemo.kernels.reference import reference_loss
from tests.kernels.counting import Count
from tests.kernels.inputs import DIVERGENCES, SETTINGS, VOCAB_SIZE, chunk_bytes, inputs, relative_error


def _gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tokens_per_chunk", [7, 1000])
def test_loss_and_gradients_match_the_fp64_formula(settings: dict[str, Any], tokens_per_chunk: int) -> None:
    tensors = inputs()
    chunk = chunk_bytes(tensors, tokens_per_chunk)
    total, sums = linear_kd_loss(*tensors, vocab_size=VOCAB_SIZE, chunk_bytes=chunk, **settings)
    expected, divergence, ce = reference_loss(*tensors, vocab_size=VOCAB_SIZE, **settings)
    assert total.dtype == sums.logits.dtype == sums.ce.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.logits.item() == pytest.approx(divergence.item(), rel=1e-6)
    assert sums.ce.item() == pytest.approx(ce.item(), rel=1e-6)
    ours, theirs = _gradients(total, *tensors[:2]), _gradients(expected, *tensors[:2])
    for mine, reference in zip(ours, theirs, strict=True):
        assert relative_error(mine, reference) < 1e-5


def test_without_a_limit_a_cpu_takes_chunks_of_512_tokens_at_most() -> None:
    states = inputs(tokens=1200)[:4]
    chunks = project(*states, 1200, VOCAB_SIZE, None, False, None).chunks()
    assert [tokens.stop - tokens.start for tokens, _, _ in chunks] == [400, 400, 400]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cross_entropy_alone_needs_no_teacher(temperature: float) -> None:
    student, weight, _, _, labels, weights = inputs()
    settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "ce_weight": 1.5, "temperature": temperature}
    total, sums = linear_kd_loss(student, weight, None, None, labels, weights, **settings)
    expected, _, _ = reference_loss(student, weight, None, None, labels, weights, **settings)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.logits.item() == 0
    for mine, reference in zip(_gradients(total, student, weight), _gradients(expected, student, weight), strict=True):
        assert relative_error(mine, reference) < 1e-5


def test_tokens_without_weight_are_left_out_whatever_their_label() -> None:
    student, weight, teacher, teacher_weight, labels, weights = inputs()
    masked = torch.where(weights == 0, -100, labels)
    assert (masked == -100).any() and (weights == 0.5).any()
    total, sums = linear_kd_loss(
        student, weight, teacher, teacher_weight, masked, weights, vocab_size=VOCAB_SIZE, ce_weight=1.0
    )
    kept = weights != 0
    expected, _, _ = reference_loss(
        student[kept],
        weight,
        teacher[kept],
        teacher_weight,
        labels[kept],
        weights[kept],
        vocab_size=VOCAB_SIZE,
        ce_weight=1.0,
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.tokens.dtype == torch.int64 and sums.tokens.item() == kept.sum().item()
    assert sums.weight.item() == pytest.approx(weights.sum().item())
    hidden_grad = _gradients(total, student)[0]
    assert hidden_grad[~kept].abs().max() == 0 and torch.isfinite(hidden_grad).all()


def test_padding_rows_take_no_part_even_when_they_hold_huge_values() -> None:
    tensors = inputs()
    with torch.no_grad():
        tensors[1][VOCAB_SIZE:] = 1e4
        tensors[3][VOCAB_SIZE:] = -float("inf")
    total, _ = linear_kd_loss(*tensors, vocab_size=VOCAB_SIZE, ce_weight=0.5)
    student, weight, teacher, teacher_weight, labels, weights = tensors
    cut = (student, weight[:VOCAB_SIZE], teacher, teacher_weight[:VOCAB_SIZE], labels, weights)
    expected, _, _ = reference_loss(*cut, vocab_size=VOCAB_SIZE, ce_weight=0.5)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert _gradients(total, weight)[0][VOCAB_SIZE:].abs().max() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_extreme_logits_give_finite_losses_and_gradients(divergence: dict[str, Any]) -> None:
    tensors = inputs(scale=300.0)  # probabilities underflow to 0 in fp32 on both sides
    total, sums = linear_kd_loss(*tensors, vocab_size=VOCAB_SIZE, ce_weight=1.0, **divergence)
    expected, _, _ = reference_loss(*tensors, vocab_size=VOCAB_SIZE, ce_weight=1.0, **divergence)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6) and sums.nonfinite.item() == 0
    for mine, reference in zip(_gradients(total, *tensors[:2]), _gradients(expected, *tensors[:2]), strict=True):
        assert relative_error(mine, reference) < 1e-3  # the logits themselves are of size 1e4


@pytest.mark.parametrize("closeness", [1.0, 0.1, 0.03])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_bf16_gradients_stay_right_as_the_student_nears_the_teacher(
    closeness: float, divergence: dict[str, Any], ce_weight: float
) -> None:
    """Logits rounded to bf16 would lose up to 22% of the gradient here."""
    student, weight, teacher, teacher_weight, labels, weights = inputs(tokens=64, width=128, teacher_width=128)
    with torch.no_grad():
        student.copy_(teacher + closeness * student)
        weight.copy_(teacher_weight + closeness * 0.1 * weight)
    rounded = [tensor.detach().bfloat16() for tensor in (student, weight, teacher, teacher_weight)]
    hidden, output = rounded[0].requires_grad_(), rounded[1].requires_grad_()
    output.main_grad = torch.zeros(output.shape)  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "ce_weight": ce_weight, **divergence}
    total, _ = linear_kd_loss(*rounded, labels, weights, **settings)
    total.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded[:2]]
    expected, _, _ = reference_loss(*exact, *rounded[2:], labels, weights, **settings)
    hidden_grad, weight_grad = _gradients(expected, *exact)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)  # divergences down to 1e-4 per token
    assert relative_error(output.main_grad, weight_grad) < 0.002  # type: ignore[attr-defined]
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    rounding = relative_error(hidden_grad.bfloat16(), hidden_grad)  # 0.17%: of the best gradient bf16 can hold
    assert relative_error(hidden.grad, hidden_grad) < math.hypot(0.002, rounding)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_the_slopes_of_the_loss_itself(settings: dict[str, Any]) -> None:
    """In place of torch.autograd.gradcheck, which wants fp64 losses and several backward passes through one graph: here
    the arithmetic is fp32, gradients are made in the forward pass and given away by the first backward pass."""
    tensors = inputs()
    total, _ = linear_kd_loss(*tensors, vocab_size=VOCAB_SIZE, **settings)
    step = 1e-2
    for index, gradient in enumerate(_gradients(total, *tensors[:2])):
        direction = gradient / gradient.norm()
        ends = []
        for sign in (1, -1):
            moved = list(tensors)
            moved[index] = tensors[index].detach() + sign * step * direction
            ends.append(linear_kd_loss(*moved, vocab_size=VOCAB_SIZE, **settings)[0])
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope.item() == pytest.approx(gradient.norm().item(), rel=2e-3)


def test_the_teacher_may_have_another_dtype_width_and_padding() -> None:
    student, weight, teacher, teacher_weight, labels, weights = inputs()
    for hidden, output in (
        (teacher.bfloat16(), teacher_weight.bfloat16()),
        (teacher.bfloat16(), teacher_weight),
        (teacher, teacher_weight[:VOCAB_SIZE].half()),
    ):
        total, _ = linear_kd_loss(student, weight, hidden, output, labels, weights, vocab_size=VOCAB_SIZE)
        expected, _, _ = reference_loss(student, weight, hidden, output, labels, weights, vocab_size=VOCAB_SIZE)
        assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_upstream_scalar_scales_every_gradient_exactly() -> None:
    plain, scaled = inputs(), inputs()
    linear_kd_loss(*plain, vocab_size=VOCAB_SIZE)[0].backward()
    (linear_kd_loss(*scaled, vocab_size=VOCAB_SIZE)[0] * 1024 / 4).backward()
    for a, b in zip(plain[:2], scaled[:2], strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad * 256, b.grad)


def test_weight_gradients_accumulate_in_fp32_main_grad() -> None:
    tensors = inputs(dtype=torch.bfloat16)
    weight = tensors[1]
    weight.main_grad = torch.full(weight.shape, 2.0)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for scalar in (1.0, 0.5):
        weight.grad = None  # as DDP's hook leaves it
        delivered: list[int] = []
        hook = weight.register_hook(lambda grad, delivered=delivered: delivered.append(grad.data_ptr()))
        (linear_kd_loss(*tensors, vocab_size=VOCAB_SIZE)[0] * scalar).backward()
        hook.remove()
        assert weight.grad is not None and [weight.grad.data_ptr()] == delivered  # kept as it is, not copied
    reference = [tensor.detach().clone().requires_grad_() for tensor in tensors[:2]]
    exact = [tensor.detach().double().requires_grad_() for tensor in reference]
    reference_loss(*exact, *tensors[2:], vocab_size=VOCAB_SIZE)[0].backward()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert weight.main_grad.dtype == torch.float32  # type: ignore[attr-defined]
    assert exact[1].grad is not None
    assert relative_error(weight.main_grad - 2.0, 1.5 * exact[1].grad) < 0.002  # type: ignore[attr-defined]


def test_only_the_gradients_that_are_wanted_are_returned() -> None:
    student, weight, *others = inputs()
    weight.requires_grad_(False)
    total, _ = linear_kd_loss(student, weight, *others, vocab_size=VOCAB_SIZE)
    total.backward()
    assert student.grad is not None and weight.grad is None


def test_a_second_backward_is_refused() -> None:
    total, _ = linear_kd_loss(*inputs(), vocab_size=VOCAB_SIZE)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_forward_only_does_no_gradient_work() -> None:
    tensors = inputs()
    with torch.no_grad(), Count() as no_grad:
        total, sums = linear_kd_loss(*tensors, vocab_size=VOCAB_SIZE)
    assert no_grad.products == 2 and not total.requires_grad
    with Count() as with_grad:
        again, _ = linear_kd_loss(*tensors, vocab_size=VOCAB_SIZE)
    assert with_grad.products == 4 and again.requires_grad
    assert torch.equal(total, again)
    assert torch.equal(sums.logits, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_two_chunk_buffers_and_the_gradients(dtype: torch.dtype) -> None:
    vocab, width, tokens = 16384, 32, 512
    tensors = inputs(tokens=tokens, vocab=vocab, padded=vocab, width=width, teacher_width=width, dtype=dtype)
    chunk = 8 * 1024**2  # 64 of the 512 tokens
    with Count() as count:
        total, _ = linear_kd_loss(*tensors, vocab_size=vocab, chunk_bytes=chunk)
        total.backward()
    kept = 4 * (tokens + vocab) * width
    delivered = 0 if dtype == torch.float32 else 2 * (tokens + vocab) * width  # fp32: the same tensors
    small = 4 * 1024**2  # of 16 MiB promised: blocks of rows, blocks of the weight in fp32, numbers per token
    assert count.peak <= chunk + kept + delivered + small
    assert count.peak < 4 * tokens * vocab  # less than even one model's logits


def test_token_statistics_match_the_fp64_formula() -> None:
    student, weight, teacher, teacher_weight, labels, _ = inputs(teacher_width=32)
    with torch.no_grad():  # near enough for some tokens to agree, far enough for some not to
        student.copy_(teacher + 0.3 * student)
        weight.copy_(teacher_weight + 0.3 * weight)
    ce, kl, agree = token_statistics(
        student,
        weight,
        teacher,
        teacher_weight,
        labels,
        vocab_size=VOCAB_SIZE,
        chunk_bytes=chunk_bytes(inputs(), 7),
    )
    logits = (student.double() @ weight.double().t())[:, :VOCAB_SIZE]
    teacher_logits = (teacher.double() @ teacher_weight.double().t())[:, :VOCAB_SIZE]
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    torch.testing.assert_close(ce, -log_p.gather(1, labels[:, None])[:, 0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(kl, (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-6, atol=1e-7)
    expected = logits.argmax(-1) == teacher_logits.argmax(-1)
    assert torch.equal(agree, expected) and expected.any() and not expected.all()
