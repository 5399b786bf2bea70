"""The loss from logits against the fp64 formula, and what becomes of the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from minitron_nemo.kernels import SparseTeacher, logits_kd, logits_kd_loss, torch_rows
from minitron_nemo.kernels.backend import backend
from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.reference import reference_loss
from minitron_nemo.kernels.rows import Rows
from tests.kernels.counting import Count
from tests.kernels.inputs import DIVERGENCES, PADDED_VOCAB_SIZE, SETTINGS, VOCAB_SIZE, inputs, relative_error
from tests.kernels.sparse_teachers import formula

INF = float("inf")


def _logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of student (requiring gradients) and teacher, [tokens, padded]; labels; token weights."""
    student, weight, teacher, teacher_weight, labels, token_weights = inputs()
    with torch.no_grad():
        logits, teacher_logits = (student @ weight.t()).to(dtype), (teacher @ teacher_weight.t()).to(dtype)
    return logits.requires_grad_(), teacher_logits, labels, token_weights


def _reference(
    student: Tensor, teacher: Tensor | None, labels: Tensor, token_weights: Tensor, **settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formula of logits: total, divergence, cross-entropy, and the gradient, fp64."""
    exact, identity = student.detach().double().requires_grad_(), torch.eye(student.shape[1], dtype=torch.float64)
    states = (exact, identity, teacher, None if teacher is None else identity, labels, token_weights)
    total, divergence, ce = reference_loss(*states, **{"vocab_size": VOCAB_SIZE, **settings})
    return total, divergence, ce, torch.autograd.grad(total, exact)[0]


class _ReadingRows:
    """Row kernels like a GPU's, made of those in torch: any dtype, nothing overwritten but the student, at the end."""

    def statistics(self, student: Tensor, teacher: Tensor | None, *arguments: Any) -> Tensor:
        return torch_rows.statistics(_fp32(student), _fp32(teacher), *arguments)

    def mixture(self, student: Tensor, teacher: Tensor, rows: Rows, objective: Objective) -> Tensor:
        copies = _fp32(student), _fp32(teacher)
        torch_rows.statistics(*copies, torch.zeros(len(student), dtype=torch.int64), objective, None)
        return torch_rows.mixture(*copies, rows, objective)

    def gradients(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        divergence_weights: Tensor,
        ce_weights: Tensor,
        rows: Rows,
        objective: Objective,
    ) -> None:
        copies = _fp32(student), _fp32(teacher)
        torch_rows.statistics(*copies, labels, objective, None)
        if objective.divergence == "jsd":
            torch_rows.mixture(*copies, rows, objective)
        torch_rows.gradients(*copies, labels, divergence_weights, ce_weights, rows, objective)
        student.copy_(copies[0])


def _fp32(logits: Any) -> Any:
    return None if logits is None else logits.float().clone()


@pytest.fixture(params=["copied blocks of 7 tokens", "copied whole", "read where they are"])
def handling(request: pytest.FixtureRequest) -> Any:
    """How the kernels get at the logits."""
    if request.param == "read where they are":
        reading = replace(backend(torch.device("cpu")), rows=_ReadingRows(), any_dtype=True)
        with patch.object(logits_kd, "backend", lambda device: reading):
            yield
    else:
        tokens = 7 if "7" in request.param else 100
        with patch.object(logits_kd, "_BUFFER_BYTES", 4 * tokens * PADDED_VOCAB_SIZE):
            yield


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loss_and_gradient_match_the_fp64_formula(settings: dict[str, Any]) -> None:
    student, teacher, labels, token_weights = _logits()
    expected, divergence, ce, expected_grad = _reference(student, teacher, labels, token_weights, **settings)
    total, sums = logits_kd_loss(student * 1.0, teacher, labels, token_weights, vocab_size=VOCAB_SIZE, **settings)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.logits.item() == pytest.approx(divergence.item(), rel=1e-6)
    assert sums.ce.item() == pytest.approx(ce.item(), rel=1e-6)
    assert sums.tokens.item() == 18 and sums.nonfinite.item() == 0
    (gradient,) = torch.autograd.grad(total, student)
    assert relative_error(gradient, expected_grad) < 1e-5
    assert not gradient[:, VOCAB_SIZE:].any()


def test_cross_entropy_alone_needs_no_teacher() -> None:
    student, _, labels, token_weights = _logits()
    settings: dict[str, Any] = {"ce_weight": 1.5, "temperature": 2.0}
    expected, _, _, expected_grad = _reference(student, None, labels, token_weights, **settings)
    total, _ = logits_kd_loss(student * 1.0, None, labels, token_weights, vocab_size=VOCAB_SIZE, **settings)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(torch.autograd.grad(total, student)[0], expected_grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_through_the_product_that_made_the_logits(dtype: torch.dtype) -> None:
    student, weight, teacher, teacher_weight, labels, token_weights = inputs(dtype=dtype)
    logits = student @ weight.t()
    rounded = logits.detach().clone()
    total, _ = logits_kd_loss(logits, teacher @ teacher_weight.t(), labels, token_weights, vocab_size=VOCAB_SIZE)
    gradients = torch.autograd.grad(total * 0.5, (student, weight))
    *_, logit_grad = _reference(rounded, teacher @ teacher_weight.t(), labels, token_weights)
    expected = 0.5 * logit_grad @ weight.double(), 0.5 * logit_grad.t() @ student.double()
    for mine, reference in zip(gradients, expected, strict=True):
        assert relative_error(mine, reference) < (1e-5 if dtype == torch.float32 else 0.004)  # rounded twice


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.002), (torch.float16, 0.0003)])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradients_of_16_bit_logits_are_rounded_once(
    divergence: dict[str, Any], dtype: torch.dtype, rounding: float
) -> None:
    student, teacher, labels, token_weights = _logits(dtype)
    settings = {"ce_weight": 0.7, "temperature": 2.0, **divergence}
    expected, _, _, expected_grad = _reference(student, teacher, labels, token_weights, **settings)
    total, _ = logits_kd_loss(student * 1.0, teacher, labels, token_weights, vocab_size=VOCAB_SIZE, **settings)
    (gradient,) = torch.autograd.grad(total, student)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6) and gradient.dtype == dtype
    assert relative_error(gradient, expected_grad) < rounding


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_the_gradient_takes_the_students_storage_and_nothing_else_is_changed(divergence: dict[str, Any]) -> None:
    student, teacher, labels, token_weights = _logits()
    logits, given = student * 1.0, (teacher.clone(), labels.clone(), token_weights.clone())
    arguments: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "ce_weight": 0.5, **divergence}
    with torch.no_grad():
        before, _ = logits_kd_loss(logits, teacher, labels, token_weights, **arguments)
    assert torch.equal(logits, student) and not before.requires_grad
    unwanted, _ = logits_kd_loss(logits.detach(), teacher, labels, token_weights, **arguments)
    assert torch.equal(logits, student) and not unwanted.requires_grad
    total, _ = logits_kd_loss(logits, teacher, labels, token_weights, **arguments)
    assert torch.equal(total, before) and torch.equal(total, unwanted)
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    for tensor, original in zip((teacher, labels, token_weights), given, strict=True):
        assert torch.equal(tensor, original)


def test_operations_that_need_their_logits_for_backward_are_refused_by_autograd() -> None:
    student, teacher, labels, token_weights = _logits()
    total, _ = logits_kd_loss(student.tanh(), teacher, labels, token_weights, vocab_size=VOCAB_SIZE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_upstream_scalar_scales_the_gradient_exactly() -> None:
    gradients = []
    for scalar in (1.0, 256.0):
        student, *others = _logits()
        (logits_kd_loss(student * 1.0, *others, vocab_size=VOCAB_SIZE)[0] * scalar).backward()
        gradients.append(student.grad)
    assert torch.equal(gradients[0] * 256, gradients[1])


@pytest.mark.usefixtures("handling")
def test_padding_columns_take_no_part_whatever_they_hold() -> None:
    student, teacher, labels, token_weights = _logits()
    expected, *_, expected_grad = _reference(student, teacher, labels, token_weights)
    with torch.no_grad():
        student[:, VOCAB_SIZE:], teacher[:, VOCAB_SIZE:] = float("nan"), INF
    total, _ = logits_kd_loss(student * 1.0, teacher, labels, token_weights, vocab_size=VOCAB_SIZE)
    (gradient,) = torch.autograd.grad(total, student)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradient, expected_grad) < 1e-5 and not gradient[:, VOCAB_SIZE:].any()


@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 0.02}], ids=str)
def test_masked_columns_take_no_part(settings: dict[str, Any], mask: float) -> None:
    student, teacher, labels, token_weights = _logits()
    visible = torch.arange(PADDED_VOCAB_SIZE) % 3 != 1
    labels[~visible[labels]] += 1  # to the next column, which is not masked
    position = visible.cumsum(0) - 1  # of the visible columns among themselves
    cut = (student[:, visible], teacher[:, visible], position[labels], token_weights)
    size = int(visible[:VOCAB_SIZE].sum())
    expected, *_, expected_grad = _reference(*cut, **{**settings, "vocab_size": size})
    with torch.no_grad():
        student[:, ~visible], teacher[:, ~visible] = mask, mask
    total, sums = logits_kd_loss(student * 1.0, teacher, labels, token_weights, vocab_size=VOCAB_SIZE, **settings)
    (gradient,) = torch.autograd.grad(total, student)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6) and sums.nonfinite.item() == 0
    assert relative_error(gradient[:, visible], expected_grad) < 1e-5
    assert not gradient[:, ~visible].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("divergence", "holed"), [("forward_kl", 0), ("reverse_kl", 1)])
def test_a_token_possible_for_one_model_alone_is_an_infinite_loss(
    divergence: str, holed: int, temperature: float
) -> None:
    logits = _logits()
    labels, token_weights = logits[2:]
    with torch.no_grad():
        logits[holed][[1, 2, 9], [5, 6, 7]] = -INF  # 2 has no weight
    total, sums = logits_kd_loss(
        logits[0] * 1.0,
        logits[1],
        torch.zeros_like(labels),
        token_weights,
        vocab_size=VOCAB_SIZE,
        divergence=divergence,
        temperature=temperature,
    )
    assert total.item() == INF and sums.nonfinite.item() == 3


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("holed", [0, 1])
def test_jsd_of_a_token_possible_for_one_model_alone_is_the_formula(holed: int, beta: float) -> None:
    student, teacher, labels, token_weights = _logits()
    hole = torch.zeros_like(teacher, dtype=torch.bool)
    hole[[1, 2, 9], [5, 6, 7]] = True
    tensors = [student.detach(), teacher]
    far = tensors[holed].masked_fill(hole, -1e4)  # for the formula, which has no -inf: e^-1e4 is 0 in fp64
    tensors[holed] = tensors[holed].masked_fill(hole, -INF)
    replaced = (far, teacher) if holed == 0 else (tensors[0], far)
    settings: dict[str, Any] = {"divergence": "jsd", "jsd_beta": beta}
    expected, *_, expected_grad = _reference(*replaced, labels, token_weights, **settings)
    logits = tensors[0].requires_grad_()
    total, sums = logits_kd_loss(logits * 1.0, tensors[1], labels, token_weights, vocab_size=VOCAB_SIZE, **settings)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6) and sums.nonfinite.item() == 0
    assert relative_error(torch.autograd.grad(total, logits)[0], expected_grad) < 1e-5


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("model", [0, 1])
def test_rows_without_a_distribution_are_counted(divergence: dict[str, Any], model: int) -> None:
    logits = _logits()
    with torch.no_grad():
        logits[model][1] = -INF
        logits[model][2, 3] = float("nan")  # no weight
        logits[model][7, 4] = INF
    total, sums = logits_kd_loss(logits[0] * 1.0, *logits[1:], vocab_size=VOCAB_SIZE, **divergence)
    assert sums.nonfinite.item() == 3 and not torch.isfinite(total)


def test_a_label_that_is_masked_or_outside_is_infinite_and_counted() -> None:
    student, teacher, labels, token_weights = _logits()
    labels[0], labels[1], labels[2], labels[3] = VOCAB_SIZE, 9, -100, -1  # 2 has no weight
    with torch.no_grad():
        student[1, 9], teacher[1, 9] = -INF, -INF
    _, sums = logits_kd_loss(student * 1.0, teacher, labels, token_weights, vocab_size=VOCAB_SIZE)
    assert sums.ce.item() == INF and sums.nonfinite.item() == 3 and torch.isfinite(sums.logits)


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize("tokens", [0, 24])
def test_no_tokens_or_none_with_weight_is_no_loss_and_no_gradient(tokens: int) -> None:
    student, teacher, labels, token_weights = _logits()
    arguments = teacher[:tokens], labels[:tokens] - 500, token_weights[:tokens] * 0
    total, sums = logits_kd_loss(student[:tokens] * 1.0, *arguments, vocab_size=VOCAB_SIZE, ce_weight=1.0)
    assert total.item() == sums.tokens.item() == sums.nonfinite.item() == 0
    total.backward()
    assert student.grad is not None and student.grad.abs().max() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_sparse_teacher_is_the_formula_of_its_categories(divergence: dict[str, Any]) -> None:
    student, teacher, labels, token_weights = _logits(torch.bfloat16)
    log_p = (teacher[:, :VOCAB_SIZE].double() / 2.0).log_softmax(-1)
    kept, ids = log_p.topk(20)
    sparse_teacher = SparseTeacher(ids, kept.float(), (-kept.exp().sum(1)).log1p().float())
    settings: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.7, **divergence}
    exact = student.detach()[:, :VOCAB_SIZE].double().requires_grad_()
    expected, _, _ = formula(exact, sparse_teacher, labels, token_weights, **settings)
    with patch.object(logits_kd, "_BUFFER_BYTES", 4 * 7 * PADDED_VOCAB_SIZE):
        total, _ = logits_kd_loss(
            student * 1.0, None, labels, token_weights, vocab_size=VOCAB_SIZE, sparse_teacher=sparse_teacher, **settings
        )
    (gradient,) = torch.autograd.grad(total, student)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradient[:, :VOCAB_SIZE], torch.autograd.grad(expected, exact)[0]) < 0.002
    assert not gradient[:, VOCAB_SIZE:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_two_buffers_whatever_the_number_of_tokens(dtype: torch.dtype) -> None:
    tokens, vocab = 2048, 8192
    student, teacher = torch.zeros(2, tokens, vocab, dtype=dtype)
    labels, token_weights = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    logits = student.requires_grad_() * 1.0
    with Count() as count:
        total, _ = logits_kd_loss(logits, teacher, labels, token_weights, vocab_size=vocab, ce_weight=1.0)
        torch.autograd.grad(total, logits)
    assert count.peak <= 2 * logits_kd._BUFFER_BYTES + 4 * 1024**2  # blocks of rows, numbers per token
    assert count.peak < tokens * vocab * 4  # less than one fp32 copy of the logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "js"}, "divergence 'js'"),
        ({"vocab_size": 300}, "vocab_size is 300"),
        ({"student_logits": torch.zeros(23, 272)}, "student_logits: .23, 272., must be .24"),
        ({"student_logits": torch.zeros(6, 4, 272)}, "student_logits: .6, 4, 272., must be .24"),
        ({"teacher_logits": torch.zeros(25, 272)}, "teacher_logits: .25, 272., must be .24"),
        ({"teacher_logits": torch.zeros(24, 200)}, "200 vocabulary rows"),
        ({"labels": torch.zeros(24, 1, dtype=torch.int64)}, "labels: torch.int64 .24, 1"),
        ({"token_weights": torch.ones(23)}, "token_weights: .*must be float32 .24"),
        ({"token_weights": torch.ones(24, dtype=torch.int64)}, "token_weights: torch.int64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    names = ("student_logits", "teacher_logits", "labels", "token_weights")
    with pytest.raises(ValueError, match=message):
        logits_kd_loss(**{**dict(zip(names, _logits(), strict=True)), "vocab_size": VOCAB_SIZE, **change})


@pytest.mark.parametrize(("with_teacher", "tokens", "message"), [(True, 24, "None"), (False, 23, "23 tokens")])
def test_sparse_teachers_that_do_not_fit_are_refused(with_teacher: bool, tokens: int, message: str) -> None:
    student, teacher, labels, token_weights = _logits()
    sparse_teacher = SparseTeacher(
        torch.zeros(tokens, 1, dtype=torch.int64), torch.zeros(tokens, 1), torch.ones(tokens)
    )
    with pytest.raises(ValueError, match=f"sparse_teacher: .*{message}"):
        logits_kd_loss(
            student,
            teacher if with_teacher else None,
            labels,
            token_weights,
            vocab_size=VOCAB_SIZE,
            sparse_teacher=sparse_teacher,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_the_gpu_matches_the_fp64_formula(divergence: dict[str, Any], dtype: torch.dtype) -> None:
    student, *others = _logits(dtype)
    settings: dict[str, Any] = {"ce_weight": 0.7, "temperature": 2.0, **divergence}
    expected, *_, expected_grad = _reference(student, *others, **settings)
    there = student.detach().cuda().requires_grad_()
    total, _ = logits_kd_loss(there * 1.0, *(tensor.cuda() for tensor in others), vocab_size=VOCAB_SIZE, **settings)
    (gradient,) = torch.autograd.grad(total, there)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradient.cpu(), expected_grad) < (1e-5 if dtype == torch.float32 else 0.002)
