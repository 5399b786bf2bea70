"""The losses on 1, 2 and 4 vocabulary shards equal the fp64 formula on the whole, and ranks agree bit for bit."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels import linear_kd_loss, logits_kd_loss, reshard_rows, shard, token_statistics
from minitron_nemo.kernels.reference import reference_loss
from tests.kernels.inputs import DIVERGENCES, SETTINGS, VOCAB_SIZE, Tensors, chunk_bytes, inputs, relative_error
from tests.pool import run_distributed

# Ranks, padded rows; of 400 the last shard is all padding.
SHARDS = [(1, 272), (2, 272), (4, 400), pytest.param(4, 272, marks=pytest.mark.slow)]


def _whole(padded: int) -> Tensors:
    """The first shard alone holds the largest logits."""
    student, weight, teacher, teacher_weight, labels, token_weights = inputs(padded=padded)
    spiked = weight.detach().clone()
    spiked[3] *= 10
    return student, spiked.requires_grad_(), teacher, teacher_weight, labels, token_weights


def _mine(padded: int, sequence_parallel: bool) -> Tensors:
    """This rank's rows of the weights, and with `sequence_parallel` its run of the states."""
    student, weight, teacher, teacher_weight, labels, token_weights = _whole(padded)
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * padded // size, (rank + 1) * padded // size)
    count = len(labels) // size
    tokens = slice(rank * count, (rank + 1) * count) if sequence_parallel else slice(None)
    return (
        student.detach()[tokens].clone().requires_grad_(),
        weight.detach()[rows].clone().requires_grad_(),
        teacher[tokens],
        teacher_weight[rows],
        labels,
        token_weights,
    )


def _from_states(settings: list[dict[str, Any]], padded: int, sequence_parallel: bool) -> list[list[Tensor]]:
    """Per setting: total, sums of divergence and cross-entropy, gradients of this rank's states and weight rows."""
    results = []
    for setting in settings:
        mine = _mine(padded, sequence_parallel)
        total, sums = linear_kd_loss(
            *mine,
            vocab_size=VOCAB_SIZE,
            tp_group=dist.group.WORLD,
            sequence_parallel=sequence_parallel,
            chunk_bytes=chunk_bytes(_whole(padded), 7, shards=dist.get_world_size()),
            **setting,
        )
        results.append([total.detach(), sums.logits, sums.ce, *torch.autograd.grad(total * 0.25, mine[:2])])
    return results


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("world_size", "padded"), SHARDS)
@pytest.mark.fast_cases(2)
def test_shards_match_the_unsharded_formula(world_size: int, padded: int, sequence_parallel: bool) -> None:
    ranks = run_distributed(world_size, _from_states, SETTINGS, padded, sequence_parallel)
    tensors = _whole(padded)
    for setting, *of_ranks in zip(SETTINGS, *ranks, strict=True):
        total, divergence, ce = reference_loss(*tensors, vocab_size=VOCAB_SIZE, **setting)
        hidden_grad, weight_grad = torch.autograd.grad(total * 0.25, tensors[:2])
        for mine, expected in zip(of_ranks[0][:3], (total, divergence, ce), strict=True):
            assert mine.item() == pytest.approx(expected.item(), rel=1e-6), setting
        for of_rank in of_ranks[1:]:
            assert all(torch.equal(mine, first) for mine, first in zip(of_rank[:3], of_ranks[0][:3], strict=True))
        assert relative_error(torch.cat([of_rank[4] for of_rank in of_ranks]), weight_grad) < 1e-5, setting
        if sequence_parallel:
            assert relative_error(torch.cat([of_rank[3] for of_rank in of_ranks]), hidden_grad) < 1e-5, setting
        else:
            assert all(relative_error(of_rank[3], hidden_grad) < 1e-5 for of_rank in of_ranks), setting


def _from_logits(settings: list[dict[str, Any]], padded: int) -> list[list[Tensor]]:
    """Per setting: total, and the gradient of this rank's columns of the student's logits."""
    student, weight, teacher, teacher_weight, labels, token_weights = _mine(padded, sequence_parallel=False)
    results = []
    for setting in settings:
        logits = (student @ weight.t()).detach().requires_grad_()
        total, _ = logits_kd_loss(
            logits * 1.0,
            teacher @ teacher_weight.t(),
            labels,
            token_weights,
            vocab_size=VOCAB_SIZE,
            tp_group=dist.group.WORLD,
            **setting,
        )
        results.append([total.detach(), *torch.autograd.grad(total, logits)])
    return results


@pytest.mark.parametrize(("world_size", "padded"), SHARDS)
def test_shards_of_logits_match_the_unsharded_formula(world_size: int, padded: int) -> None:
    ranks = run_distributed(world_size, _from_logits, SETTINGS, padded)
    student, weight, teacher, teacher_weight, labels, token_weights = _whole(padded)
    logits = (student @ weight.t()).detach().requires_grad_()
    identity = torch.eye(padded)
    whole = (logits, identity, teacher @ teacher_weight.t(), identity, labels, token_weights)
    for setting, *of_ranks in zip(SETTINGS, *ranks, strict=True):
        expected, _, _ = reference_loss(*whole, vocab_size=VOCAB_SIZE, **setting)
        assert of_ranks[0][0].item() == pytest.approx(expected.item(), rel=1e-6), setting
        assert all(torch.equal(total, of_ranks[0][0]) for total, _ in of_ranks)
        gradient = torch.cat([of_rank[1] for of_rank in of_ranks], 1)
        assert relative_error(gradient, torch.autograd.grad(expected, logits)[0]) < 1e-5, setting
        assert not gradient[:, VOCAB_SIZE:].any()


def _statistics(padded: int, sequence_parallel: bool) -> tuple[Tensor, Tensor, Tensor]:
    mine = _mine(padded, sequence_parallel)
    group = dist.group.WORLD
    return token_statistics(
        *mine[:5], vocab_size=VOCAB_SIZE, tp_group=group, sequence_parallel=sequence_parallel, chunk_bytes=10**5
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("world_size", "padded"), SHARDS)
def test_statistics_of_shards_are_those_of_the_whole(world_size: int, padded: int, sequence_parallel: bool) -> None:
    ranks = run_distributed(world_size, _statistics, padded, sequence_parallel)
    whole = token_statistics(*_whole(padded)[:5], vocab_size=VOCAB_SIZE)
    for of_rank in ranks:
        assert all(torch.equal(mine, first) for mine, first in zip(of_rank, ranks[0], strict=True))
    for mine, theirs in zip(ranks[0], whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def _edges() -> dict[str, Any]:
    """Without tokens; with all of them masked; with states that are not finite on the last rank alone."""
    rank, size = dist.get_rank(), dist.get_world_size()
    common: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "tp_group": dist.group.WORLD, "sequence_parallel": True}
    student, weight, teacher, teacher_weight, labels, token_weights = _mine(272, True)
    none, _ = linear_kd_loss(
        student[:0], weight, teacher[:0], teacher_weight, labels[:0], token_weights[:0], ce_weight=1.0, **common
    )
    masked, _ = linear_kd_loss(
        student, weight, teacher, teacher_weight, labels - 500, token_weights * 0, ce_weight=1.0, **common
    )
    gradients = torch.autograd.grad(none + masked, (student, weight))
    if rank == size - 1:
        teacher[0, 0] = float("nan")
    _, sums = linear_kd_loss(student, weight, teacher, teacher_weight, labels, token_weights, **common)
    return {"losses": [none.item(), masked.item()], "gradients": gradients, "nonfinite": sums.nonfinite.item()}


def test_empty_masked_and_broken_batches_are_the_same_on_every_rank() -> None:
    for rank in run_distributed(2, _edges):
        assert rank["losses"] == [0, 0]
        assert all(gradient.abs().max() == 0 for gradient in rank["gradients"])
        assert rank["nonfinite"] == 1


def _resharded(padded: int, teacher_padded: int, dtype: torch.dtype) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    student, weight, teacher, _, labels, token_weights = _mine(padded, False)
    whole = inputs(padded=teacher_padded)[3]
    whole[VOCAB_SIZE:] = float("nan")  # padding is not to be looked at
    part = whole.to(dtype)[rank * teacher_padded // size : (rank + 1) * teacher_padded // size]
    before = part.clone()
    mine = reshard_rows(part, padded // size, VOCAB_SIZE, dist.group.WORLD)
    assert torch.equal(part.nan_to_num(), before.nan_to_num())
    total, _ = linear_kd_loss(
        student, weight, teacher, mine, labels, token_weights, vocab_size=VOCAB_SIZE, tp_group=dist.group.WORLD
    )
    return {"rows": mine, "total": total.detach(), "dw": torch.autograd.grad(total, weight)[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world_size", "padded", "teacher_padded"),
    [(1, 272, 259), (2, 272, 400), (4, 272, 400), (4, 400, 272), (4, 272, 272)],
)
@pytest.mark.fast_cases(4)
def test_a_teacher_padded_otherwise_is_resharded_bit_for_bit(
    world_size: int, padded: int, teacher_padded: int, dtype: torch.dtype
) -> None:
    ranks = run_distributed(world_size, _resharded, padded, teacher_padded, dtype)
    rows = torch.cat([rank["rows"] for rank in ranks])
    assert rows.shape[0] == padded and rows.dtype == dtype
    student, weight, teacher, _, labels, token_weights = _whole(padded)
    teacher_weight = inputs(padded=teacher_padded)[3].to(dtype)[:VOCAB_SIZE]
    assert torch.equal(rows[:VOCAB_SIZE], teacher_weight) and not rows[VOCAB_SIZE:].any()
    expected, _, _ = reference_loss(
        student, weight, teacher, teacher_weight, labels, token_weights, vocab_size=VOCAB_SIZE
    )
    assert ranks[0]["total"].item() == pytest.approx(expected.item(), rel=1e-6)
    gradient = torch.cat([rank["dw"] for rank in ranks])
    assert relative_error(gradient, torch.autograd.grad(expected, weight)[0]) < 1e-5


def _padded_otherwise(reshard: bool) -> None:
    student, weight, teacher, _, labels, token_weights = _mine(272, False)
    teacher_weight = inputs(padded=400)[3][dist.get_rank() * 200 :][:200]
    if reshard:
        reshard_rows(teacher_weight, 100, VOCAB_SIZE, dist.group.WORLD)
    group = dist.group.WORLD
    linear_kd_loss(
        student, weight, teacher, teacher_weight, labels, token_weights, vocab_size=VOCAB_SIZE, tp_group=group
    )


@pytest.mark.parametrize(("reshard", "message"), [(False, "reshard_rows"), (True, "200 vocabulary rows")])
@pytest.mark.fast_cases(1)
def test_layouts_that_do_not_fit_are_refused(reshard: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_distributed(2, _padded_otherwise, reshard)


def _collectives(setting: dict[str, Any]) -> list[int]:
    """Bytes of the all-gathers of one call, with 3 chunks of 8 tokens."""
    tensors = inputs()
    gathered: list[int] = []
    original = shard._all_gather

    def counting(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        gathered.append(output.numel() * output.element_size())
        return original(output, *args, **kwargs)

    with torch.no_grad(), patch.object(shard, "_all_gather", counting):
        linear_kd_loss(
            *_mine(272, False),
            vocab_size=VOCAB_SIZE,
            tp_group=dist.group.WORLD,
            chunk_bytes=chunk_bytes(tensors, 8, shards=2),
            **setting,
        )
    return gathered


@pytest.mark.parametrize("setting", DIVERGENCES, ids=str)
@pytest.mark.fast_cases(3)
def test_one_small_collective_per_chunk_and_two_for_jsd(setting: dict[str, Any]) -> None:
    for gathered in run_distributed(2, _collectives, setting):
        assert len(gathered) == 3 * (2 if setting["divergence"] == "jsd" else 1)
        assert all(size <= 2 * 8 * 9 * 8 for size in gathered)  # 9 numbers per token and rank
