"""The Triton kernels, run by Triton's interpreter on the CPU, against the fp64 formula and autograd."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_nemo.kernels import linear_kd_loss, logits_kd_loss
from minitron_nemo.kernels.objective import DIVERGENCES, Objective
from minitron_nemo.kernels.reference import reference_loss
from minitron_nemo.kernels.rows import merge
from tests.kernels.inputs import VOCAB_SIZE, chunk_bytes, inputs, relative_error
from tests.kernels.row_passes import Outcome, assert_agree, formula, passes
from tests.kernels.sparse_teachers import projected_formula, sparse_loss, top

Run = Callable[..., Any]
INF = float("inf")


def _prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # decides when kernels are defined, so it must not reach other tests
    os.environ["MINITRON_KERNELS"] = "triton"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Calls a function of this module where Triton's interpreter runs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare) as executor:
        yield lambda function, *args: executor.submit(function, *args).result()


def _passes(*args: Any) -> Outcome:
    from minitron_nemo.kernels import triton_rows

    return passes(triton_rows, *args)


def _logits(vocab: int, rows: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, labels, weights (of one token 0, of one a fraction)."""
    generator = torch.Generator().manual_seed(vocab)
    student = torch.randn(rows, vocab, generator=generator) * 4
    teacher = student + torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(vocab, (rows,), generator=generator)
    return student.to(dtype), teacher.to(dtype), labels, torch.tensor([1.0, 0.0, 0.5]).repeat(rows)[:rows]


OBJECTIVES = [
    Objective(divergence, temperature, jsd_beta=0.3, ce_weight=ce_weight)
    for divergence, temperature, ce_weight in itertools.product(DIVERGENCES, (0.5, 1.0, 4.0), (0.0, 0.7))
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.slow
def test_losses_and_gradients_match_the_fp64_formula(interpreted: Run, objective: Objective) -> None:
    student, teacher, labels, weights = _logits(37)
    cuts = (5, 5)  # the second shard has no columns
    assert_agree(
        interpreted(_passes, student, teacher, labels, weights, objective, cuts),
        formula(student, teacher, labels, weights, objective),
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cross_entropy_needs_no_teacher(interpreted: Run, temperature: float) -> None:
    student, _, labels, weights = _logits(37)
    objective = Objective(temperature=temperature, ce_weight=0.7)
    assert_agree(
        interpreted(_passes, student, None, labels, weights, objective, (20,)),
        formula(student, None, labels, weights, objective),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [1, 2048, 4097, 9000])
def test_vocabularies_of_any_size_match_the_fp64_formula(interpreted: Run, vocab: int, divergence: str) -> None:
    student, teacher, labels, weights = _logits(vocab, rows=2)
    objective = Objective(divergence, temperature=2.0, ce_weight=0.7)
    assert_agree(
        interpreted(_passes, student, teacher, labels, weights, objective),
        formula(student, teacher, labels, weights, objective),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_read_as_they_are_and_gradients_rounded_once(
    interpreted: Run, dtype: torch.dtype, divergence: str
) -> None:
    student, teacher, labels, weights = _logits(4097, rows=2, dtype=dtype)
    objective = Objective(divergence, ce_weight=0.7)
    mine = interpreted(_passes, student, teacher, labels, weights, objective)
    reference = formula(student, teacher, labels, weights, objective)
    assert mine.gradient.dtype == dtype
    # Rounding costs eps / 2 at most, as on a GPU; the interpreter truncates to bf16, which costs up to eps.
    assert_agree(mine, reference, gradient_error=torch.finfo(dtype).eps / (2 if dtype == torch.float16 else 1))


def test_the_teacher_may_have_another_dtype(interpreted: Run) -> None:
    student, teacher, labels, weights = _logits(37)
    teacher = teacher.bfloat16()
    assert_agree(
        interpreted(_passes, student, teacher, labels, weights, Objective()),
        formula(student, teacher, labels, weights, Objective()),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_entries_of_minus_infinity_do_not_exist(interpreted: Run, divergence: str, temperature: float) -> None:
    student, teacher, labels, weights = _logits(9000, rows=2)
    labels[:] = torch.tensor([3, 8999])
    for logits in (student, teacher):
        logits[:, 2000:6500] = -INF  # a whole block, and a whole shard
        logits[0, 4:1000:3] = -INF
    if divergence != "reverse_kl":
        teacher[1, :500] = -INF
    if divergence != "forward_kl":
        student[1, 600:1000] = -INF
    objective = Objective(divergence, temperature, ce_weight=0.7)
    mine = interpreted(_passes, student, teacher, labels, weights, objective, (2100, 4500))
    assert_agree(mine, formula(student, teacher, labels, weights, objective))
    assert (mine.gradient[:, 2000:6500] == 0).all()


@pytest.mark.parametrize("cuts", [(), (20,)])
def test_what_one_model_excludes_and_the_other_does_not_costs_infinitely_much(
    interpreted: Run, cuts: tuple[int, ...]
) -> None:
    excluding, other, labels, weights = _logits(37)
    excluding[0, 30] = excluding[1, 20:] = -INF  # an entry; a shard
    expected = [INF, INF]
    forward = interpreted(_passes, excluding, other, labels, weights, Objective("forward_kl"), cuts)
    reverse = interpreted(_passes, other, excluding, labels, weights, Objective("reverse_kl"), cuts)
    assert forward.divergence[:2].tolist() == reverse.divergence[:2].tolist() == expected
    assert forward.divergence[2].isfinite() and reverse.divergence[2].isfinite()


@pytest.mark.parametrize("cuts", [(), (20,)])
def test_excluding_what_has_no_mass_in_fp32_costs_nothing(interpreted: Run, cuts: tuple[int, ...]) -> None:
    excluding, other, labels, weights = _logits(4097)
    excluding[:, 7] = -INF
    other[:, 7] = -500.0  # a lane's maximum, until it meets entry 2055
    excluding[1, 2055:] = other[1, 2055:] = -INF  # it never does
    for divergence, student, teacher in (("forward_kl", excluding, other), ("reverse_kl", other, excluding)):
        objective = Objective(divergence, ce_weight=0.7)
        mine = interpreted(_passes, student, teacher, labels * 0, weights, objective, cuts)
        assert_agree(mine, formula(student, teacher, labels * 0, weights, objective))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_that_are_no_numbers_are_never_averaged_in(interpreted: Run, divergence: str) -> None:
    student, teacher, labels, weights = _logits(37, rows=6)
    student[0, 3] = teacher[1, 3] = INF
    student[2, 30] = teacher[3, 30] = float("nan")
    student[4] = -INF
    teacher[5] = -INF
    mine = interpreted(_passes, student, teacher, labels, weights, Objective(divergence), (20,))
    assert not mine.divergence.isfinite().any()
    assert mine.ce.isfinite().tolist() == [False, True] * 3


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_logits_of_ten_thousand_match_the_fp64_formula(interpreted: Run, divergence: str, temperature: float) -> None:
    student, teacher, labels, weights = _logits(4097, rows=2)
    student[0] += 1e4
    teacher[1] -= 1e4
    student[1] *= 1e3
    objective = Objective(divergence, temperature, ce_weight=0.7)
    mine = interpreted(_passes, student, teacher, labels, weights, objective, (3000,))
    reference = formula(student, teacher, labels, weights, objective)
    assert_agree(mine, reference, gradient_error=2e-3, loss_error=2e-3)  # a ulp of such logits / 0.5 is 2e-3


def test_rows_without_weight_have_no_gradient_whatever_their_label(interpreted: Run) -> None:
    student, teacher, labels, weights = _logits(37)
    labels[1] = -100
    objective = Objective(temperature=2.0, ce_weight=0.7)
    mine = interpreted(_passes, student, teacher, labels, weights, objective, (20,))
    assert mine.ce[1] == INF
    assert (mine.gradient[1] == 0).all() and mine.gradient.isfinite().all()
    assert (mine.gradient[[0, 2]] != 0).all()


def _best(student: Tensor, teacher: Tensor, first_row: int | None) -> tuple[Tensor, Tensor]:
    from minitron_nemo.kernels import rows, triton_rows

    statistics = triton_rows.statistics(student, teacher, torch.zeros(len(student)).long(), Objective(), first_row)
    return statistics[:, rows.STUDENT_BEST], statistics[:, rows.TEACHER_BEST]


def test_the_most_likely_token_is_the_first_of_equals(interpreted: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randint(-4, 3, (3, 9000), generator=generator).float() for _ in range(2))
    student[0, 8000] = 100  # alone in its lane and block
    teacher[1] = -INF
    teacher[2, :5000] -= 3
    student_best, teacher_best = interpreted(_best, student, teacher.bfloat16(), 128_000)
    assert student_best.tolist() == (student.argmax(1) + 128_000).tolist()
    assert teacher_best.tolist() == (teacher.argmax(1) + 128_000).tolist()
    assert all(ids.eq(0).all() for ids in interpreted(_best, student, teacher, None))


def test_rows_lie_further_apart_than_32_bits_count(interpreted: Run) -> None:
    assert interpreted(_far_apart)


def _far_apart() -> bool:
    from minitron_nemo.kernels import triton_rows

    apart = 2**30  # 3 rows: more than 2^31 entries; only the pages that are touched exist
    student, teacher = (torch.empty(2 * apart + 64, dtype=torch.bfloat16).as_strided((3, 64), (apart, 1)) for _ in "st")
    near, near_teacher, labels, weights = _logits(64, dtype=torch.bfloat16)
    student.copy_(near), teacher.copy_(near_teacher)
    far = triton_rows.statistics(student, teacher, labels, Objective(), None)
    same = triton_rows.statistics(near, near_teacher, labels, Objective(), None)
    weights = weights.double()
    rows = merge(far.unsqueeze(0), 0, Objective())
    triton_rows.gradients(student, teacher, labels, weights, weights, rows, Objective())
    triton_rows.gradients(near, near_teacher, labels, weights, weights, rows, Objective())
    return torch.equal(far, same) and torch.equal(student, near)


def test_rows_whose_entries_are_not_adjacent_are_refused(interpreted: Run) -> None:
    student, _, labels, weights = _logits(37)
    with pytest.raises(ValueError, match="adjacent"):
        interpreted(_transposed, student.t().contiguous(), labels)


def _transposed(student: Tensor, labels: Tensor) -> None:
    from minitron_nemo.kernels import triton_rows

    triton_rows.statistics(student.t(), None, labels, Objective(), None)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.fast_cases(2)
def test_linear_kd_loss_runs_on_them(interpreted: Run, divergence: str) -> None:
    settings = {"vocab_size": VOCAB_SIZE, "divergence": divergence, "temperature": 2.0, "ce_weight": 0.5}
    total, *gradients = interpreted(_linear_kd_loss, settings)
    tensors = inputs()
    expected, _, _ = reference_loss(*tensors, **settings)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, reference in zip(gradients, torch.autograd.grad(expected, tensors[:2]), strict=True):
        assert relative_error(mine, reference) < 1e-5


def _linear_kd_loss(settings: dict[str, Any]) -> tuple[Tensor, ...]:
    tensors = inputs()
    total, _ = linear_kd_loss(*tensors, chunk_bytes=chunk_bytes(tensors, 16), **settings)
    return total.detach(), *torch.autograd.grad(total, tensors[:2])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sparse_teacher_runs_on_them(interpreted: Run, temperature: float) -> None:
    options = {"temperature": temperature, "ce_weight": 0.5}
    total, *gradients = interpreted(_sparse_loss, options)
    tensors = inputs()
    expected, _, _ = projected_formula(tensors, top(tensors, temperature), **options)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, reference in zip(gradients, torch.autograd.grad(expected, tensors[:2]), strict=True):
        assert relative_error(mine, reference) < 1e-5


def _sparse_loss(options: dict[str, Any]) -> tuple[Tensor, ...]:
    tensors = inputs()
    total, _ = sparse_loss(tensors, top(tensors, options["temperature"]), **options)
    return total.detach(), *torch.autograd.grad(total, tensors[:2])


def test_logits_of_a_caller_become_the_gradient_where_they_lie(interpreted: Run) -> None:
    gradient, same_storage, teacher_unchanged = interpreted(_logits_kd_loss)
    student, teacher, labels, weights = _logits(40, dtype=torch.bfloat16)
    objective = Objective("reverse_kl", ce_weight=0.5)
    reference = formula(student[:, :37], teacher[:, :37], labels % 37, weights, objective)
    assert same_storage and teacher_unchanged and gradient.dtype == torch.bfloat16
    assert relative_error(gradient[:, :37], reference.gradient) < torch.finfo(torch.bfloat16).eps
    assert (gradient[:, 37:] == 0).all()


def _logits_kd_loss() -> tuple[Tensor, bool, bool]:
    student, teacher, labels, weights = _logits(40, dtype=torch.bfloat16)
    storage, before = student.data_ptr(), teacher.clone()
    student.requires_grad_()
    total, _ = logits_kd_loss(
        student, teacher, labels % 37, weights, vocab_size=37, divergence="reverse_kl", ce_weight=0.5
    )
    total.backward()
    assert student.grad is not None
    return student.grad, student.grad.data_ptr() == storage, torch.equal(before, teacher)
