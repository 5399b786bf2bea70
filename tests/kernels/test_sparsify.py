"""Top-k and draws from the tail against fp64 softmaxes written out, whole and in vocabulary shards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels import SparseEntries, SparseTeacher, linear_kd_loss, sparse_entries
from minitron_nemo.kernels.reference import reference_loss
from tests.kernels.inputs import PADDED_VOCAB_SIZE, VOCAB_SIZE, inputs, relative_error
from tests.kernels.sparse_teachers import projected_formula, teacher_log_probs
from tests.pool import run_distributed

TOKENS = 24
DRAWS = 12


def _uniforms(draws: int = DRAWS, seed: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.rand(tokens, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _entries(top_k: int, uniforms: Tensor, temperature: float = 1.0, **options: Any) -> SparseEntries:
    """Chunks of 5 tokens."""
    _, _, hidden, weight, _, _ = inputs()
    options = {"hidden": hidden, "weight": weight, "chunk_bytes": 4 * PADDED_VOCAB_SIZE * 5, **options}
    return sparse_entries(top_k=top_k, uniforms=uniforms, vocab_size=VOCAB_SIZE, temperature=temperature, **options)


def _expected_draws(log_probs: Tensor, top: Tensor, uniforms: Tensor) -> Tensor:
    """fp64: the entry at which the cumulative mass of what is not in `top` passes (j + u_j) / m of its sum."""
    mass = log_probs.exp().scatter(1, top, 0.0)
    positions = (torch.arange(uniforms.shape[1]) + uniforms) / uniforms.shape[1]
    return torch.searchsorted(mass.cumsum(1), positions * mass.sum(1, keepdim=True), right=True)


def rate_of_convergence(samples: Tensor, exact: Tensor) -> float:
    """Slope, in logarithms, of the mean's error over the number of samples in it: -1/2 without a bias.

    samples: [200, ...]; the error of n is the root mean square over the 200 / n means of n samples each.
    """
    counts = torch.tensor([1.0, 2.0, 4.0, 8.0, 20.0, 40.0])
    errors = [
        (samples.unflatten(0, (-1, int(count))).mean(1) - exact).flatten(1).square().sum(1).mean().sqrt()
        for count in counts
    ]
    x, y = counts.log(), torch.stack(errors).float().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 16, VOCAB_SIZE - 1, VOCAB_SIZE])
def test_entries_are_those_of_the_fp64_softmax(top_k: int, temperature: float) -> None:
    log_probs = teacher_log_probs(inputs(), temperature)
    entries = _entries(top_k, _uniforms(), temperature)
    expected, ids = log_probs.topk(top_k, dim=1)
    rounding = 2e-6 * max(1.0, 1 / temperature)  # of fp32 logits of up to 10
    assert torch.equal(entries.token_ids[:, :top_k], ids)
    torch.testing.assert_close(entries.log_probs[:, :top_k].double(), expected, rtol=0, atol=rounding)
    tail = log_probs.scatter(1, ids, -float("inf")).logsumexp(1)
    torch.testing.assert_close(entries.tail_log_probs.double(), tail, rtol=0, atol=2 * rounding)
    if top_k == VOCAB_SIZE:
        assert (entries.log_probs[:, top_k:] == -float("inf")).all()
        return
    drawn = _expected_draws(log_probs, ids, _uniforms())
    assert torch.equal(entries.token_ids[:, top_k:], drawn)
    torch.testing.assert_close(
        entries.log_probs[:, top_k:].double(), log_probs.gather(1, drawn), rtol=0, atol=2 * rounding
    )


def _on_a_shard(top_k: int, sequence_parallel: bool, padded: int) -> SparseEntries:
    rank, size = dist.get_rank(), dist.get_world_size()
    _, _, hidden, weight, _, _ = inputs(padded=padded)
    count = TOKENS // size
    mine = slice(rank * count, (rank + 1) * count) if sequence_parallel else slice(None)
    return _entries(
        top_k,
        _uniforms(),
        hidden=hidden[mine],
        weight=weight[rank * padded // size : (rank + 1) * padded // size],
        tp_group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
    )


@pytest.mark.parametrize("top_k", [8, 100, VOCAB_SIZE])
@pytest.mark.parametrize(
    ("size", "sequence_parallel", "padded"),
    [(2, False, PADDED_VOCAB_SIZE), (4, True, PADDED_VOCAB_SIZE), (4, False, 4 * 96)],  # the last shard: padding alone
)
def test_vocabulary_shards_give_the_same_entries(top_k: int, size: int, sequence_parallel: bool, padded: int) -> None:
    _, _, hidden, weight, _, _ = inputs(padded=padded)
    whole = _entries(top_k, _uniforms(), hidden=hidden, weight=weight)
    for entries in run_distributed(size, _on_a_shard, top_k, sequence_parallel, padded):
        used = whole.log_probs > -float("inf")
        assert torch.equal(entries.token_ids[used], whole.token_ids[used])
        # Products of other widths round other sums: twice the 2e-6 of fp32 logits of up to 10.
        torch.testing.assert_close(entries.log_probs, whole.log_probs, rtol=0, atol=4e-6)
        torch.testing.assert_close(entries.tail_log_probs, whole.tail_log_probs, rtol=0, atol=4e-6)


def test_a_tail_of_tiny_mass_keeps_its_digits() -> None:
    """One entry at 1 - 5e-12 of the mass: 1 minus it has no digit left in fp32."""
    logits = torch.full((1, 512), -32.0)
    logits[0, 7] = 0.0
    entries = sparse_entries(
        torch.ones(1, 1), logits.t().contiguous(), top_k=1, uniforms=_uniforms(4, tokens=1), vocab_size=512
    )
    exact = logits.double().scatter(1, torch.tensor([[7]]), -float("inf")).logsumexp(1)
    torch.testing.assert_close(entries.tail_log_probs.double(), exact, rtol=1e-7, atol=0)
    assert 7 not in entries.token_ids[0, 1:]


@pytest.mark.parametrize(("top_k", "draws"), [(8, 0), (8, DRAWS)])
def test_loss_against_the_entries_is_their_fp64_formula(top_k: int, draws: int) -> None:
    tensors = inputs()
    teacher = _entries(top_k, _uniforms(draws), 2.0).teacher()
    total, _ = linear_kd_loss(
        *tensors[:2], None, None, *tensors[4:], vocab_size=VOCAB_SIZE, temperature=2.0, sparse_teacher=teacher
    )
    expected, *_ = projected_formula(tensors, teacher, temperature=2.0)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, wanted = (torch.autograd.grad(loss, tensors[:2]) for loss in (total, expected))
    for one, other in zip(ours, wanted, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.slow
def test_the_mean_over_draws_converges_to_the_exact_loss_and_gradient() -> None:
    """Within 4 standard errors over 200 draws, an error like 1 / sqrt(draws); top-k without its tail is far off."""
    tensors = inputs()
    options: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "temperature": 2.0}
    exact_loss, *_ = reference_loss(*tensors, **options)
    exact = torch.autograd.grad(exact_loss, tensors[0])[0].double()

    def loss_and_gradient(teacher: SparseTeacher) -> tuple[Tensor, Tensor]:
        total, _ = linear_kd_loss(*tensors[:2], None, None, *tensors[4:], sparse_teacher=teacher, **options)
        return total.detach().double(), torch.autograd.grad(total, tensors[0])[0].double()

    losses, gradients = zip(
        *(loss_and_gradient(_entries(8, _uniforms(seed=seed), 2.0).teacher()) for seed in range(200)), strict=True
    )
    drawn, stacked = torch.stack(losses), torch.stack(gradients)
    assert abs(drawn.mean() - exact_loss) < 4 * drawn.std() / len(losses) ** 0.5
    assert rate_of_convergence(stacked, exact) == pytest.approx(-0.5, abs=0.08)
    teacher = _entries(8, _uniforms(), 2.0).teacher()
    assert teacher.weights is not None
    cut = replace(teacher, weights=teacher.weights.index_fill(1, torch.arange(8, 8 + DRAWS), 0.0))
    assert (loss_and_gradient(cut)[1] - exact).norm() > 4 * (stacked.mean(0) - exact).norm()
    used = tensors[5] != 0
    z = (stacked.mean(0) - exact)[used] / (stacked.std(0)[used] / len(gradients) ** 0.5)
    assert z.std().item() == pytest.approx(1.0, abs=0.15)
    assert (z.abs() > 4).sum() <= 1, "of 576 values, 0.04 are expected beyond 4 standard errors"


@pytest.mark.slow
def test_each_tail_entry_is_drawn_as_often_as_it_is_likely() -> None:
    log_probs = teacher_log_probs(inputs(), 1.0)
    top = log_probs.topk(8, dim=1).indices
    counts = torch.zeros(TOKENS, VOCAB_SIZE)
    rounds = 400
    for seed in range(rounds):
        drawn = _entries(8, _uniforms(seed=seed)).token_ids[:, 8:]
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape))
    assert not counts.gather(1, top).any()
    expected = log_probs.exp().scatter(1, top, 0.0)
    expected = rounds * DRAWS * expected / expected.sum(1, keepdim=True)
    likely = expected > 10
    z = (counts - expected)[likely] / expected[likely].sqrt()
    assert z.abs().max() < 5
    assert z.mean().abs() < 5 / len(z) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"), [({"top_k": 0}, "top_k"), ({"top_k": 300}, "top_k"), ({"t": 0.0}, "temp")]
)
def test_numbers_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _entries(change.get("top_k", 8), _uniforms(), change.get("t", 1.0))
