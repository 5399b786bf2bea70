"""The losses against a sparse teacher, and autograd through the same categories written out in fp64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitron_nemo.kernels import LossSums, SparseTeacher, linear_kd_loss, logits_kd_loss, shard, sparse, torch_rows
from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.reference import reference_loss
from tests.kernels.inputs import VOCAB_SIZE, Tensors, chunk_bytes, inputs, relative_error
from tests.kernels.sparse_teachers import (
    DIVERGENCES,
    INF,
    bucket,
    draws,
    formula,
    kl,
    projected_formula,
    sparse_loss,
    teacher_log_probs,
    top,
)

SETTINGS: list[dict[str, Any]] = [
    *(
        {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight}
        for divergence, temperature, ce_weight in itertools.product(DIVERGENCES, (0.5, 1.0, 4.0), (0.0, 0.7))
    ),
    {"divergence": "jsd", "jsd_beta": 0.1, "temperature": 3.0},
    {"divergence": "forward_kl", "temperature": 2.0, "temperature_squared": False, "logits_weight": 0.3},
]


def _rows_and_gradients(
    logits: Tensor, teacher: SparseTeacher, labels: Tensor, token_weights: Tensor, objective: Objective
) -> tuple[sparse.SparseRows, Tensor]:
    """Of whole fp32 logits, without a projection."""
    buffer = logits.clone()
    whole = shard.Shard.of(logits.shape[1], logits.shape[1], None)
    rows = sparse.loss_rows(buffer, teacher, labels, whole, objective, torch_rows)
    sparse.logit_gradients(buffer, teacher, labels, token_weights, rows, whole, objective, torch_rows)
    return rows, buffer


def _assert_same(ours: tuple[Tensor, LossSums], expected: tuple[Tensor, Tensor, Tensor], tensors: Tensors) -> None:
    (total, sums), (expected_total, divergence, ce) = ours, expected
    assert sums.nonfinite.item() == 0
    assert total.item() == pytest.approx(expected_total.item(), rel=1e-6)
    assert sums.logits.item() == pytest.approx(divergence.item(), rel=1e-6)
    assert sums.ce.item() == pytest.approx(ce.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, tensors[:2]) for loss in (total, expected_total)]
    for mine, reference in zip(*gradients, strict=True):
        assert relative_error(mine, reference) < 1e-5


# Bucket form.


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_the_bucket_form_matches_the_fp64_formula(options: dict[str, Any]) -> None:
    tensors = inputs()
    teacher = top(tensors, options["temperature"])
    is_entry = (teacher.token_ids == tensors[4].unsqueeze(1)).any(1)
    assert is_entry.any() and not is_entry.all()  # labels among the entries and outside
    ours = sparse_loss(tensors, teacher, chunk_bytes=chunk_bytes(tensors, 7), **options)
    _assert_same(ours, projected_formula(tensors, teacher, **options), tensors)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_entries_for_the_whole_vocabulary_are_the_dense_loss(divergence: str, temperature: float) -> None:
    tensors = inputs()
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.7}
    log_probs = teacher_log_probs(tensors, temperature)
    ids = log_probs.argsort(1)
    teacher = bucket(log_probs, ids, torch.ones_like(ids, dtype=torch.bool))
    assert (teacher.tail_log_probs == -INF).all()
    expected = reference_loss(*tensors, vocab_size=VOCAB_SIZE, **options)
    _assert_same(sparse_loss(tensors, teacher, **options), expected, tensors)


def test_a_teacher_with_no_entries_leaves_the_cross_entropy() -> None:
    tensors = inputs()
    count = len(tensors[4])
    teacher = SparseTeacher(torch.zeros(count, 0, dtype=torch.int64), torch.zeros(count, 0), torch.zeros(count))
    ours, sums = sparse_loss(tensors, teacher, ce_weight=0.7)
    expected, _, _ = reference_loss(*tensors, vocab_size=VOCAB_SIZE, ce_weight=0.7, logits_weight=0.0)
    assert sums.logits.item() == 0
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, tensors[:2]) for loss in (ours, expected)]
    for mine, reference in zip(*gradients, strict=True):
        assert relative_error(mine, reference) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("likely", [0, 4])
def test_a_tail_of_vanishing_probability_keeps_its_exact_logarithm(divergence: str, likely: int) -> None:
    """1 minus the entries' mass would be 0, or rounding noise."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 30, generator=generator)
    logits[:, likely:] -= 400.0
    log_probs = torch.randn(4, 30, generator=generator).double().log_softmax(1)
    ids = torch.arange(5).repeat(4, 1)
    teacher = bucket(log_probs, ids, torch.ones_like(ids, dtype=torch.bool))
    labels, weights = torch.tensor([0, 4, 5, 29]), torch.ones(4)
    rows, gradients = _rows_and_gradients(logits, teacher, labels, weights, Objective(divergence, ce_weight=0.5))
    exact = logits.double().requires_grad_()
    total, divergences, ce = formula(exact, teacher, labels, weights, divergence=divergence, ce_weight=0.5)
    assert rows.divergence is not None
    assert rows.divergence.sum().item() == pytest.approx(divergences.item(), rel=1e-6)
    assert rows.ce.sum().item() == pytest.approx(ce.item(), rel=1e-6)
    assert relative_error(gradients, torch.autograd.grad(total, exact)[0]) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("closeness", [0.1, 0.001])
def test_gradients_stay_right_as_the_student_nears_the_teacher(divergence: str, closeness: float) -> None:
    generator = torch.Generator().manual_seed(2)
    target = 3 * torch.randn(16, 300, generator=generator)
    logits = target + closeness * torch.randn(16, 300, generator=generator)
    log_probs = target.double().log_softmax(1)
    ids = log_probs.topk(20, 1).indices
    teacher = bucket(log_probs, ids, torch.ones_like(ids, dtype=torch.bool))
    labels, weights = torch.zeros(16, dtype=torch.int64), torch.ones(16)
    _, gradients = _rows_and_gradients(logits, teacher, labels, weights, Objective(divergence))
    exact = logits.double().requires_grad_()
    total, _, _ = formula(exact, teacher, labels, weights, divergence=divergence)
    # log_probs in fp32, about 10, are known to 5e-7; what follows from them is the same on both sides.
    assert relative_error(gradients, torch.autograd.grad(total, exact)[0]) < 1e-7 / closeness + 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_without_tail_mass_is_infinitely_far_only_by_reverse_kl(divergence: str) -> None:
    tensors = inputs()
    teacher = replace(top(tensors, 1.0), tail_log_probs=torch.full((24,), -INF))
    teacher.log_probs[3, 0] = 0.0  # a token without any entry would have no mass at all
    total, sums = sparse_loss(tensors, teacher, divergence=divergence)
    if divergence == "reverse_kl":
        assert sums.nonfinite.item() == (tensors[5] != 0).sum().item()
        return
    _assert_same((total, sums), projected_formula(tensors, teacher, divergence=divergence), tensors)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_without_tail_mass_is_infinitely_far_only_by_forward_kl(divergence: str) -> None:
    tensors = inputs()
    ids = torch.arange(VOCAB_SIZE).repeat(24, 1)
    log_probs = (teacher_log_probs(tensors, 1.0) + math.log(0.9)).float()
    teacher = SparseTeacher(ids, log_probs, torch.full((24,), math.log(0.1)))
    total, sums = sparse_loss(tensors, teacher, divergence=divergence)
    if divergence == "forward_kl":
        assert sums.nonfinite.item() == (tensors[5] != 0).sum().item()
        return
    student, weight = tensors[0].detach().double(), tensors[1].detach().double()
    logits = (student @ weight.t())[:, :VOCAB_SIZE].requires_grad_()
    expected, _, _ = formula(logits, teacher, *tensors[4:], divergence=divergence)
    assert sums.nonfinite.item() == 0 and total.item() == pytest.approx(expected.item(), rel=1e-6)
    (by_logits,) = torch.autograd.grad(expected, logits)
    by_hidden, by_weight = torch.autograd.grad(total, tensors[:2])
    assert relative_error(by_hidden, by_logits @ weight[:VOCAB_SIZE]) < 1e-5
    assert relative_error(by_weight[:VOCAB_SIZE], by_logits.t() @ student) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logits_masked_down_to_the_entries_leave_an_empty_tail(divergence: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, target = (torch.randn(4, 30, generator=generator) for _ in range(2))
    logits[:, 5:], target[:, 5:] = -INF, -INF
    ids = torch.arange(5).repeat(4, 1)
    teacher = bucket((target.double() / temperature).log_softmax(1), ids, torch.ones_like(ids, dtype=torch.bool))
    labels, weights = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 0.5, 0.0, 1.0])
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.7}
    exact = logits.double().requires_grad_()
    expected, _, _ = formula(exact[:, :5], teacher, labels, weights, **options)
    logits.requires_grad_()
    total, sums = logits_kd_loss(logits, None, labels, weights, vocab_size=30, sparse_teacher=teacher, **options)
    assert sums.nonfinite.item() == 0
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = torch.autograd.grad(total, logits)[0], torch.autograd.grad(expected, exact)[0]
    assert relative_error(ours, theirs) < 1e-5 and ours[:, 5:].abs().max() == 0


# Sampled form.


@pytest.mark.parametrize("options", [entry for entry in SETTINGS if entry["divergence"] == "forward_kl"], ids=str)
def test_the_sampled_form_matches_the_fp64_formula(options: dict[str, Any]) -> None:
    tensors = inputs()
    teacher = draws(teacher_log_probs(tensors, options["temperature"]), likely=3, count=40)
    assert any(len(row.unique()) < len(row) for row in teacher.token_ids)  # drawn more than once
    teacher.log_probs[1, ::2] = -INF
    ours = sparse_loss(tensors, teacher, chunk_bytes=chunk_bytes(tensors, 7), **options)
    _assert_same(ours, projected_formula(tensors, teacher, **options), tensors)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_whole_vocabulary_weighted_by_its_probabilities_is_the_dense_loss(temperature: float) -> None:
    tensors = inputs()
    log_probs = teacher_log_probs(tensors, temperature)
    ids = log_probs.argsort(1)
    ordered = log_probs.gather(1, ids)
    teacher = SparseTeacher(ids, ordered.float(), weights=ordered.exp().float())
    options: dict[str, Any] = {"temperature": temperature, "ce_weight": 0.7}
    expected = reference_loss(*tensors, vocab_size=VOCAB_SIZE, **options)
    _assert_same(sparse_loss(tensors, teacher, **options), expected, tensors)


def test_draws_estimate_the_dense_loss_and_gradient_without_bias() -> None:
    """Mean over 4000 independent draws against the dense values: within 4 standard errors of that mean."""
    repeats, vocab, temperature = 4000, 40, 2.0
    generator = torch.Generator().manual_seed(5)
    logits, target = (3 * torch.randn(1, vocab, generator=generator) for _ in range(2))
    log_probs = (target.double() / temperature).log_softmax(1)
    teacher = draws(log_probs.expand(repeats, -1), likely=3, count=4)
    labels, weights = torch.zeros(repeats, dtype=torch.int64), torch.ones(repeats)
    objective = Objective(temperature=temperature, temperature_squared=False)
    rows, gradients = _rows_and_gradients(logits.expand(repeats, -1), teacher, labels, weights, objective)
    assert rows.divergence is not None

    exact = logits.double().requires_grad_()
    divergence = kl(log_probs[0], (exact[0] / temperature).log_softmax(0))
    divergence.backward()
    assert exact.grad is not None
    for drawn, expected in (
        (rows.divergence.unsqueeze(1), divergence.detach().view(1)),
        (gradients.double(), exact.grad[0]),
    ):
        error = (drawn.mean(0) - expected).abs()
        standard_error = drawn.std(0) / math.sqrt(repeats)
        assert (error <= 4 * standard_error + 1e-7).all()
        assert standard_error.norm() < 0.05 * expected.norm()  # small enough to mean something

    assert teacher.weights is not None
    without_draws = replace(teacher, weights=teacher.weights.index_fill(1, torch.arange(3, 7), 0.0))
    biased, _ = _rows_and_gradients(logits.expand(repeats, -1), without_draws, labels, weights, objective)
    spread = (rows.divergence.std() / math.sqrt(repeats)).item()
    assert abs(biased.divergence.mean().item() - divergence.item()) > 10 * spread


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_divergences_that_draws_would_bias_are_refused(divergence: str) -> None:
    tensors = inputs()
    teacher = draws(teacher_log_probs(tensors, 1.0), likely=3, count=4)
    with pytest.raises(ValueError, match=f"{divergence}.*forward_kl, or give tail_log_probs"):
        sparse_loss(tensors, teacher, divergence=divergence)


# Both forms: tokens and entries that do not count, and those that cannot.


def _teacher(form: str, tensors: Tensors) -> SparseTeacher:
    return top(tensors, 1.0) if form == "bucket" else draws(teacher_log_probs(tensors, 1.0), likely=3, count=9)


@pytest.mark.parametrize("form", ["bucket", "sampled"])
def test_tokens_without_weight_may_have_any_teacher_and_label(form: str) -> None:
    tensors = inputs()
    labels, token_weights = tensors[4:]
    teacher = _teacher(form, tensors)
    expected = projected_formula(tensors, teacher, ce_weight=0.7)
    masked = token_weights == 0
    labels[masked] = -100
    teacher.token_ids[masked] = VOCAB_SIZE + 1
    teacher.log_probs[masked] = float("nan")
    for tensor in (teacher.tail_log_probs, teacher.weights):
        if tensor is not None:
            tensor[masked] = INF
    ours = sparse_loss(tensors, teacher, ce_weight=0.7)
    _assert_same(ours, expected, tensors)
    (hidden_grad,) = torch.autograd.grad(sparse_loss(tensors, teacher, ce_weight=0.7)[0], tensors[:1])
    assert hidden_grad[masked].abs().max() == 0


@pytest.mark.parametrize("form", ["bucket", "sampled"])
def test_masking_every_token_gives_zero(form: str) -> None:
    tensors = inputs()
    tensors[5].zero_()
    total, sums = sparse_loss(tensors, _teacher(form, tensors), ce_weight=0.7)
    assert total.item() == sums.tokens.item() == sums.nonfinite.item() == 0
    for gradient in torch.autograd.grad(total, tensors[:2]):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("form", ["bucket", "sampled"])
@pytest.mark.parametrize("outside", [-1, VOCAB_SIZE, 2**40])  # VOCAB_SIZE: a padding row of the weight
def test_an_id_outside_the_vocabulary_makes_its_token_count_as_not_finite(form: str, outside: int) -> None:
    tensors = inputs()
    teacher = _teacher(form, tensors)
    teacher.token_ids[5, 2] = outside
    assert sparse_loss(tensors, teacher)[1].nonfinite.item() == 1
    teacher.log_probs[5, 2] = -INF  # unused, so its id may be anything
    assert sparse_loss(tensors, teacher)[1].nonfinite.item() == 0


def test_an_id_twice_in_a_token_of_the_bucket_form_makes_it_count_as_not_finite() -> None:
    tensors = inputs()
    teacher = top(tensors, 1.0)
    teacher.token_ids[5, 2] = teacher.token_ids[5, 40]
    assert sparse_loss(tensors, teacher)[1].nonfinite.item() == 1
    teacher.log_probs[5, 2] = -INF
    assert sparse_loss(tensors, teacher)[1].nonfinite.item() == 0


@pytest.mark.parametrize("form", ["bucket", "sampled"])
def test_an_unknown_teacher_probability_makes_its_token_count_as_not_finite(form: str) -> None:
    tensors = inputs()
    teacher = _teacher(form, tensors)
    teacher.log_probs[5, 2] = float("nan")
    assert sparse_loss(tensors, teacher)[1].nonfinite.item() == 1


def test_arguments_that_do_not_fit_are_refused() -> None:
    ids, log_probs, tail = torch.zeros(24, 3, dtype=torch.int64), torch.zeros(24, 3), torch.zeros(24)
    for arguments, message in (
        ({}, "either"),
        ({"tail_log_probs": tail, "weights": log_probs}, "either"),
        ({"tail_log_probs": tail, "token_ids": ids.int()}, "token_ids.*int64"),
        ({"tail_log_probs": tail, "token_ids": ids[0]}, r"token_ids.*\[tokens, k\]"),
        ({"tail_log_probs": tail, "log_probs": log_probs[:, :2]}, r"log_probs.*\(24, 3\)"),
        ({"tail_log_probs": tail[:5]}, r"tail_log_probs.*\(24,\)"),
        ({"weights": tail}, r"weights.*\(24, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseTeacher(**{"token_ids": ids, "log_probs": log_probs, **arguments})
    tensors = inputs()
    with pytest.raises(ValueError, match="sparse_teacher: 5 tokens, labels has 24"):
        sparse_loss(tensors, SparseTeacher(ids, log_probs, tail)[:5])
    with pytest.raises(ValueError, match="teacher_hidden and teacher_weight"):
        linear_kd_loss(*tensors, vocab_size=VOCAB_SIZE, sparse_teacher=SparseTeacher(ids, log_probs, tail))


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_every_shape_matches_the_fp64_formula(data: st.DataObject) -> None:
    tokens, vocab = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    count = data.draw(st.integers(0, vocab))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    options: dict[str, Any] = {
        "divergence": data.draw(st.sampled_from(DIVERGENCES)),
        "temperature": data.draw(st.sampled_from((0.5, 0.7, 1.0, 4.0))),
        "ce_weight": data.draw(st.sampled_from((0.0, 1.0))),
    }
    logits, target = (4 * torch.randn(tokens, vocab, generator=generator) for _ in range(2))
    log_probs = (target.double() / options["temperature"]).log_softmax(1)
    ids = torch.rand(tokens, vocab, generator=generator).argsort(1)[:, :count]
    used = torch.rand(tokens, count, generator=generator) < data.draw(st.sampled_from((0.5, 1.0)))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator)
    teacher = bucket(log_probs, ids, used)
    rows, gradients = _rows_and_gradients(logits, teacher, labels, weights, Objective(**options))
    exact = logits.double().requires_grad_()
    total, divergence, ce = formula(exact, teacher, labels, weights, **options)
    assert rows.divergence is not None
    scale = options["temperature"] ** 2
    assert (weights * rows.divergence).sum().item() * scale == pytest.approx(divergence.item(), rel=1e-6, abs=1e-6)
    assert (weights * rows.ce).sum().item() == pytest.approx(ce.item(), rel=1e-6, abs=1e-6)
    expected = torch.autograd.grad(total, exact)[0]
    assert (gradients - expected).norm() <= 1e-5 * expected.norm() + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_the_gpu_matches_the_fp64_formula(options: dict[str, Any]) -> None:
    here = inputs()
    teacher = top(here, options["temperature"])
    expected, _, _ = projected_formula(here, teacher, **options)
    there = [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in here]
    assert teacher.tail_log_probs is not None
    on_gpu = SparseTeacher(teacher.token_ids.cuda(), teacher.log_probs.cuda(), teacher.tail_log_probs.cuda())
    total, sums = sparse_loss(tuple(there), on_gpu, **options)
    assert sums.nonfinite.item() == 0
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, tensors[:2]) for loss, tensors in ((total, there), (expected, here))]
    for mine, reference in zip(*gradients, strict=True):
        assert relative_error(mine.cpu(), reference) < 1e-5
