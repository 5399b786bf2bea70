"""The intermediate-state loss against the fp64 formula and autograd, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitron_nemo.kernels import linear_hidden_loss
from tests.kernels.counting import Count
from tests.kernels.hidden_inputs import (
    KIND,
    KINDS,
    PROJECTED,
    chunk_bytes,
    exact_loss,
    gradients_of,
    hidden_inputs,
    worst_error,
)
from tests.kernels.inputs import relative_error


@KIND
@PROJECTED
@pytest.mark.parametrize("distance", [None, 0.1])
@pytest.mark.parametrize("tokens_per_chunk", [7, 1000])
def test_loss_and_gradients_match_the_fp64_formula(
    kind: str, projected: bool, distance: float | None, tokens_per_chunk: int
) -> None:
    inputs = hidden_inputs(projected=projected, distance=distance)
    total, sums = linear_hidden_loss(*inputs, kind=kind, chunk_bytes=chunk_bytes(tokens_per_chunk))
    expected, gradients = exact_loss(*inputs, kind=kind)
    assert total.dtype == sums.loss.dtype == torch.float32 and total.item() == sums.loss.item()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert worst_error(gradients_of(total, *inputs[:2]), gradients) < 1e-5
    assert sums.tokens.dtype == sums.nonfinite.dtype == torch.int64
    assert sums.tokens.item() == 19 and sums.nonfinite.item() == 0
    assert sums.weight.item() == pytest.approx(13.7)


@KIND
@PROJECTED
@pytest.mark.parametrize("distance", [None, 0.1, 0.01])
def test_bf16_states_cost_no_more_than_rounding_a_gradient(kind: str, projected: bool, distance: float | None) -> None:
    student, projection, teacher, weights = hidden_inputs(
        tokens=64, width=128, teacher_width=160, projected=projected, distance=distance, dtype=torch.bfloat16
    )
    if projection is not None:
        projection.main_grad = torch.zeros(projection.shape)  # type: ignore[attr-defined]
    total, _ = linear_hidden_loss(student, projection, teacher, weights, kind=kind)
    total.backward()
    expected, gradients = exact_loss(student, projection, teacher, weights, kind=kind)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    # 0.17% is the rounding of this gradient itself to bf16; as much again is the product's.
    assert relative_error(student.grad, gradients[0]) < 2.5e-3
    if projection is not None:
        assert relative_error(projection.main_grad, gradients[1]) < 2e-3  # type: ignore[attr-defined]


@KIND
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_the_loss_keeps_its_digits_as_the_student_nears_the_teacher(kind: str, distance: float) -> None:
    """1 - cosine in fp32 would be wrong by 100% at the last distance."""
    inputs = hidden_inputs(projected=False, width=512, distance=distance)
    total, _ = linear_hidden_loss(*inputs, kind=kind)
    expected, gradients = exact_loss(*inputs, kind=kind)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert worst_error(gradients_of(total, inputs[0]), gradients) < 1e-7 / distance


@KIND
@pytest.mark.parametrize("width", [4096, 16384])
def test_long_rows_add_up_without_loss(kind: str, width: int) -> None:
    inputs = hidden_inputs(tokens=4, width=width, projected=False)
    total, _ = linear_hidden_loss(*inputs, kind=kind)
    expected, gradients = exact_loss(*inputs, kind=kind)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert worst_error(gradients_of(total, inputs[0]), gradients) < 1e-6


@KIND
@PROJECTED
@pytest.mark.parametrize("garbage", [0.0, 1e30, float("inf"), float("nan")])
def test_states_without_weight_take_no_part_whatever_they_hold(kind: str, projected: bool, garbage: float) -> None:
    clean, dirty = hidden_inputs(projected=projected), hidden_inputs(projected=projected)
    masked = dirty[3] == 0
    with torch.no_grad():
        dirty[0][masked], dirty[2][masked] = garbage, -garbage
    expected, _ = linear_hidden_loss(*clean, kind=kind, chunk_bytes=chunk_bytes(7))
    total, sums = linear_hidden_loss(*dirty, kind=kind, chunk_bytes=chunk_bytes(7))
    assert torch.equal(total, expected) and sums.nonfinite.item() == 0
    gradients = gradients_of(total, *dirty[:2])
    for mine, other in zip(gradients, gradients_of(expected, *clean[:2]), strict=True):
        assert torch.equal(mine, other)
    assert gradients[0][masked].abs().max() == 0 and gradients[0][~masked].abs().min(0).values.max() > 0


@KIND
@PROJECTED
def test_an_empty_batch_and_one_without_weights_give_zeros(kind: str, projected: bool) -> None:
    for inputs in (hidden_inputs(tokens=0, projected=projected), hidden_inputs(projected=projected)):
        inputs[3].zero_()
        total, sums = linear_hidden_loss(*inputs, kind=kind)
        assert total.item() == sums.tokens.item() == sums.weight.item() == sums.nonfinite.item() == 0
        for tensor, gradient in zip(inputs, gradients_of(total, *inputs[:2]), strict=False):
            assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_zero_states_have_the_cosine_and_gradient_of_torch(zero: str) -> None:
    student, _, teacher, weights = hidden_inputs(projected=False)
    with torch.no_grad():
        if zero != "teacher":
            student[3] = 0
        if zero != "student":
            teacher[3] = 0
    total, sums = linear_hidden_loss(student, None, teacher, weights)
    exact = student.detach().double().requires_grad_()
    similarity = torch.nn.functional.cosine_similarity(exact, teacher.double())
    expected = (weights * (1 - similarity)).sum()
    assert sums.nonfinite.item() == 0 and total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert worst_error(gradients_of(total, student), gradients_of(expected, exact)) < 1e-5


@pytest.mark.parametrize("length", [1e-12, 3e-9, 3e-8])
def test_states_shorter_and_little_longer_than_eps_match_the_formula(length: float) -> None:
    student, _, teacher, weights = hidden_inputs(projected=False)
    with torch.no_grad():
        student[3] *= length / student[3].norm()
        student[4] *= length / student[4].norm()
        teacher[4] *= length / teacher[4].norm()
    total, _ = linear_hidden_loss(student, None, teacher, weights)
    expected, gradients = exact_loss(student, None, teacher, weights, kind="cosine")
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    mine = gradients_of(total, student)[0]
    for rows in (slice(3), slice(3, 4), slice(4, 5), slice(5, None)):  # of sizes too different for one norm
        assert relative_error(mine[rows], gradients[0][rows]) < 1e-5


@KIND
@PROJECTED
def test_tokens_without_a_finite_loss_are_counted(kind: str, projected: bool) -> None:
    student, projection, teacher, weights = hidden_inputs(projected=projected)
    with torch.no_grad():
        student[0, 1], student[3, 2], teacher[4, 3] = float("nan"), float("inf"), -float("inf")
        student[5] = 1e25  # finite, but not its length in fp32
        student[2] = float("nan")  # without weight
    total, sums = linear_hidden_loss(student, projection, teacher, weights, kind=kind, chunk_bytes=chunk_bytes(4))
    assert sums.nonfinite.item() == 4 and not total.isfinite()


def test_a_projection_that_is_not_finite_is_seen_even_without_weights() -> None:
    student, projection, teacher, weights = hidden_inputs()
    assert projection is not None
    with torch.no_grad():
        projection[0, 0] = float("nan")
    for factor in (0, 1):
        _, sums = linear_hidden_loss(student, projection, teacher, weights * factor)
        assert sums.nonfinite.item() == len(weights)


@KIND
def test_the_sums_do_not_depend_on_the_chunks(kind: str) -> None:
    inputs = hidden_inputs(tokens=23)
    runs = []
    for tokens in (1, 2, 5, 23, 10_000):
        total, _ = linear_hidden_loss(*inputs, kind=kind, chunk_bytes=chunk_bytes(tokens))
        runs.append((total, gradients_of(total, *inputs[:2])))
    for total, gradients in runs[1:]:
        assert total.item() == pytest.approx(runs[0][0].item(), rel=1e-7)
        assert worst_error(gradients, runs[0][1]) < 1e-6


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(0, 9),
    width=st.integers(1, 19),
    teacher_width=st.integers(2, 19),
    projected=st.booleans(),
    tokens_per_chunk=st.integers(1, 10),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_mix_of_dtypes_matches_the_formula(
    kind: str,
    tokens: int,
    width: int,
    teacher_width: int,
    projected: bool,
    tokens_per_chunk: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    student, projection, teacher, weights = hidden_inputs(
        tokens=tokens, width=width, teacher_width=teacher_width, projected=projected, seed=seed
    )
    student = student.detach().to(dtypes[0]).requires_grad_()
    teacher = teacher.to(dtypes[1])
    chunk = chunk_bytes(tokens_per_chunk, teacher.shape[1])
    total, _ = linear_hidden_loss(student, projection, teacher, weights, kind=kind, chunk_bytes=chunk)
    expected, gradients = exact_loss(student, projection, teacher, weights, kind=kind)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, exact in zip(gradients_of(total, student, projection), gradients, strict=True):
        precision = 1e-4 if mine.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine.double(), exact, rtol=precision, atol=precision)


class _Once(torch.autograd.Function):
    """The loss with gradients that may be asked for again, as gradcheck does."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, projection: Tensor, teacher: Tensor, weights: Tensor, kind: str) -> Tensor:
        leaves = [tensor.float().requires_grad_() for tensor in (student.detach(), projection.detach())]
        with torch.enable_grad():
            total, _ = linear_hidden_loss(*leaves, teacher, weights, kind=kind)
        ctx.gradients = gradients_of(total, *leaves)
        return total.double()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return *(upstream * gradient.double() for gradient in ctx.gradients), None, None, None


@KIND
def test_gradients_are_those_of_the_loss_itself(kind: str) -> None:
    student, projection, teacher, weights = hidden_inputs(tokens=4, width=3, teacher_width=5)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (student, projection)]
    function = lambda *inputs: _Once.apply(*inputs, teacher, weights, kind)  # noqa: E731
    # The loss is fp32, so steps are long: their own error is of second order.
    assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=1e-3, rtol=1e-3)


def test_projection_gradients_accumulate_in_fp32_main_grad() -> None:
    inputs = hidden_inputs()
    projection = inputs[1]
    projection.main_grad = torch.full(projection.shape, 2.0)  # type: ignore[attr-defined]
    for scalar in (1.0, 0.5):
        projection.grad = None  # as DDP's hook leaves it
        (linear_hidden_loss(*inputs)[0] * scalar).backward()
        assert projection.grad is not None  # what the hook fires on
    _, gradients = exact_loss(*inputs, kind="cosine")
    assert projection.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert relative_error(projection.main_grad - 2.0, 1.5 * gradients[1]) < 1e-5  # type: ignore[attr-defined]
    assert relative_error(inputs[0].grad, 1.5 * gradients[0]) < 1e-5


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_gradient_that_is_wanted_is_computed(wanted: int) -> None:
    inputs = hidden_inputs()
    inputs[1 - wanted].requires_grad_(False)
    with Count() as count:
        total, _ = linear_hidden_loss(*inputs)
    assert count.products == 2
    total.backward()
    assert inputs[1 - wanted].grad is None
    assert relative_error(inputs[wanted].grad, exact_loss(*inputs, kind="cosine")[1][wanted]) < 1e-5


@KIND
def test_forward_only_does_no_gradient_work(kind: str) -> None:
    inputs = hidden_inputs()
    with torch.no_grad(), Count() as no_grad:
        total, _ = linear_hidden_loss(*inputs, kind=kind)
    assert no_grad.products == 1 and not total.requires_grad
    with Count() as with_grad:
        again, _ = linear_hidden_loss(*inputs, kind=kind)
    assert with_grad.products == 3 and again.requires_grad
    assert torch.equal(total, again)


@KIND
@PROJECTED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.fast_cases(4)
def test_memory_is_the_chunk_buffers_and_the_gradients(kind: str, projected: bool, dtype: torch.dtype) -> None:
    tokens, width = 4096, 256
    inputs = hidden_inputs(tokens=tokens, width=width, teacher_width=width, projected=projected, dtype=dtype)
    chunk = chunk_bytes(64, width)
    with torch.no_grad(), Count() as forward:
        linear_hidden_loss(*inputs, kind=kind, chunk_bytes=chunk)
    # A chunk's student states, with what the products take beside them: fp32 copies of a chunk and of a weight block.
    beside = 2 * chunk + 4 * width * width * projected
    assert forward.peak <= chunk + beside < 4 * tokens * width / 2
    with Count() as count:
        linear_hidden_loss(*inputs, kind=kind, chunk_bytes=chunk)[0].backward()
    gradients = (4 + inputs[0].element_size()) * (tokens + width * projected) * width  # as kept, then as delivered
    assert count.peak <= chunk + beside + gradients


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "l1"}, "kind"),
        ({"projection": None}, "projection"),
        ({"projection": torch.zeros(32, 48)}, "projection"),
        ({"teacher_hidden": torch.zeros(23, 48)}, "teacher_hidden"),
        ({"token_weights": torch.ones(25)}, "token_weights"),
        ({"token_weights": torch.ones(24, dtype=torch.bfloat16)}, "token_weights"),
        ({"student_hidden": torch.zeros(4, 6, 32)}, "student_hidden"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    names = ("student_hidden", "projection", "teacher_hidden", "token_weights")
    with pytest.raises(ValueError, match=message):
        linear_hidden_loss(**{**dict(zip(names, hidden_inputs(), strict=True)), **change})


@pytest.mark.gpu
@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_agrees_with_the_formula(kind: str, dtype: torch.dtype) -> None:
    here = hidden_inputs(dtype=dtype)
    there = [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in here]
    total, _ = linear_hidden_loss(*there, kind=kind, chunk_bytes=chunk_bytes(7))
    expected, gradients = exact_loss(*here, kind=kind)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    mine = [gradient.cpu() for gradient in gradients_of(total, *there[:2])]
    assert worst_error(mine, gradients) < (1e-5 if dtype == torch.float32 else 2.5e-3)
