"""What only a GPU shows of the loss: the compiled Triton kernels, cuBLAS products with fp32 output, memory on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_nemo.kernels import linear_kd_loss
from minitron_nemo.kernels.linear_kd import project
from minitron_nemo.kernels.objective import DIVERGENCES, Objective
from minitron_nemo.kernels.reference import reference_loss
from minitron_nemo.kernels.rows import STUDENT_BEST, TEACHER_BEST
from tests.kernels.inputs import VOCAB_SIZE, Tensors, chunk_bytes, inputs, relative_error
from tests.kernels.row_passes import assert_agree, formula, passes

pytestmark = pytest.mark.gpu

INF = float("inf")
MIB = 1024**2


def _rows(vocab: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, labels, weights (some tokens 0, some a fraction), on the GPU."""
    generator = torch.Generator("cuda").manual_seed(vocab)
    student = torch.randn(rows, vocab, generator=generator, device="cuda") * 4
    teacher = student + torch.randn(rows, vocab, generator=generator, device="cuda")
    labels = torch.randint(vocab, (rows,), generator=generator, device="cuda")
    weights = torch.tensor([1.0, 0.0, 0.5], device="cuda").repeat(rows)[:rows]
    return student.to(dtype), teacher.to(dtype), labels, weights


def _on_gpu(tensors: Tensors) -> Tensors:
    return tuple(tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in tensors)  # type: ignore[return-value]


def _gradient_error(exact: Tensor, dtype: torch.dtype) -> float:
    """The promise, and what one rounding costs: in fp16, whose least numbers lie far apart, up to 0.7 % of these."""
    return 1e-5 + relative_error(exact.to(dtype), exact)


@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_row_kernels_match_the_fp64_formula(
    divergence: str, dtype: torch.dtype, temperature: float, ce_weight: float
) -> None:
    from minitron_nemo.kernels import triton_rows

    objective = Objective(divergence, temperature, jsd_beta=0.3, ce_weight=ce_weight)
    for vocab, cuts in ((37, (5, 5, 20)), (9000, (4096,)), (128256, ())):
        rows = _rows(vocab, 5, dtype)
        exact = formula(*rows, objective)
        error = _gradient_error(exact.gradient, dtype)
        assert_agree(passes(triton_rows, *rows, objective, cuts), exact, gradient_error=error)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_row_kernels_take_minus_infinity_and_ten_thousand(divergence: str, temperature: float) -> None:
    from minitron_nemo.kernels import triton_rows

    objective = Objective(divergence, temperature, ce_weight=0.7)
    student, teacher, labels, weights = _rows(9000, 5, torch.float32)
    labels %= 2000
    student[:, 2000:6500] = teacher[:, 2000:6500] = -INF
    mine = passes(triton_rows, student, teacher, labels, weights, objective, (2100, 4500))
    assert_agree(mine, formula(student, teacher, labels, weights, objective))
    student[0] += 1e4
    teacher[1] -= 1e4
    mine = passes(triton_rows, student, teacher, labels, weights, objective, (2100, 4500))
    reference = formula(student, teacher, labels, weights, objective)
    assert_agree(mine, reference, gradient_error=2e-3, loss_error=2e-3)  # a ulp of such logits / 0.5 is 2e-3


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_most_likely_token_is_the_first_of_equals(temperature: float) -> None:
    from minitron_nemo.kernels import triton_rows

    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (
        torch.randint(-4, 3, (64, 9000), generator=generator, device="cuda").float() for _ in ("student", "teacher")
    )
    labels = torch.zeros(64, dtype=torch.int64, device="cuda")
    statistics = triton_rows.statistics(student, teacher, labels, Objective(temperature=temperature), 1000)
    for logits, column in ((student, STUDENT_BEST), (teacher, TEACHER_BEST)):
        is_best = logits == logits.amax(1, keepdim=True)
        first = torch.where(is_best, torch.arange(9000, device="cuda"), 9000).amin(1)
        assert torch.equal(statistics[:, column].long(), first + 1000)


def test_more_entries_than_32_bits_count() -> None:
    from minitron_nemo.kernels import triton_rows

    vocab, rows = 131072, 2**31 // 131072 + 8
    last = _rows(vocab, 8, torch.bfloat16)
    student, teacher = (logits.repeat(rows // 8, 1) for logits in last[:2])
    labels, weights = (values.repeat(rows // 8) for values in last[2:])
    assert student.numel() > 2**31
    few = passes(triton_rows, *last, Objective(ce_weight=0.7))
    many = passes(triton_rows, student, teacher, labels, weights, Objective(ce_weight=0.7))
    assert torch.equal(many.gradient[-8:], few.gradient) and torch.equal(many.ce[-8:], few.ce)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_kd_loss_matches_the_fp64_formula(dtype: torch.dtype, divergence: str) -> None:
    tensors = _on_gpu(inputs(dtype=dtype))
    settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "divergence": divergence, "temperature": 2.0}
    settings["ce_weight"] = 0.5
    total, sums = linear_kd_loss(*tensors, chunk_bytes=chunk_bytes(tensors, 7), **settings)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors[:2]]
    expected, divergence_sum, ce = reference_loss(*exact, *tensors[2:], **settings)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums.logits.item() == pytest.approx(divergence_sum.item(), rel=1e-5)
    assert sums.ce.item() == pytest.approx(ce.item(), rel=1e-5)
    ours, theirs = torch.autograd.grad(total, tensors[:2]), torch.autograd.grad(expected, exact)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        # 16 bits: the logits' gradient is rounded for the products, and their result once more.
        assert relative_error(mine, reference) < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    here = inputs(dtype=dtype)
    there = _on_gpu(here)
    total, _ = linear_kd_loss(*here, vocab_size=VOCAB_SIZE, ce_weight=0.5)
    on_gpu, _ = linear_kd_loss(*there, vocab_size=VOCAB_SIZE, ce_weight=0.5)
    assert on_gpu.item() == pytest.approx(total.item(), rel=1e-5)  # either is as near to the formula in fp64
    gradients = torch.autograd.grad(on_gpu, there[:2]), torch.autograd.grad(total, here[:2])
    for mine, reference in zip(*gradients, strict=True):
        assert relative_error(mine.cpu(), reference) < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_two_chunk_buffers_and_the_gradients(dtype: torch.dtype, divergence: str) -> None:
    vocab, width, tokens, chunk = 32768, 256, 4096, 64 * MIB
    tensors = _on_gpu(inputs(tokens=tokens, vocab=vocab, padded=vocab, width=width, teacher_width=width, dtype=dtype))

    def step() -> None:
        total, _ = linear_kd_loss(
            *tensors, vocab_size=vocab, divergence=divergence, temperature=2.0, ce_weight=0.5, chunk_bytes=chunk
        )
        total.backward()
        tensors[0].grad = tensors[1].grad = None

    step()  # cuBLAS keeps its workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    gradients = (4 + tensors[0].element_size()) * (tokens + vocab) * width  # fp32 as kept, then as delivered
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= chunk + gradients + 16 * MIB
    assert peak < 4 * tokens * vocab  # less than even one model's logits


def test_without_a_limit_chunks_are_of_2048_tokens_at_most() -> None:
    states = _on_gpu(inputs(tokens=4800))[:4]
    chunks = project(*states, 4800, VOCAB_SIZE, None, False, None).chunks()
    assert [tokens.stop - tokens.start for tokens, _, _ in chunks] == [1600, 1600, 1600]
