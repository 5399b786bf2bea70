"""The fused loss on 2 and 4 vocabulary shards equals the fp64 formula on the whole, and ranks agree bit for bit."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from minitron_nemo.kernels import linear_kd_loss, shard, token_statistics
from minitron_nemo.kernels.reference import reference_loss
from tests.kernels.inputs import VOCAB_SIZE, chunk_bytes, inputs, relative_error
from tests.pool import run_distributed

SETTINGS = [
    {"divergence": "forward_kl", "ce_weight": 0.7},
    {"divergence": "reverse_kl", "temperature": 2.0, "ce_weight": 0.7},
    {"divergence": "forward_kl", "temperature": 0.5},
]


def _on_a_shard(settings: dict[str, Any], sequence_parallel: bool, padded: int) -> dict[str, Any]:
    group = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = inputs(padded=padded)
    spiked = tensors[1].detach().clone()
    spiked[3] *= 20  # the first shard alone holds the largest logits
    rows = slice(rank * padded // size, (rank + 1) * padded // size)
    count = len(tensors[4]) // size
    mine = slice(rank * count, (rank + 1) * count) if sequence_parallel else slice(None)
    student = tensors[0].detach()[mine].clone().requires_grad_()
    weight = spiked[rows].clone().requires_grad_()
    teacher, teacher_weight = tensors[2][mine], tensors[3][rows]
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "tp_group": group,
        "sequence_parallel": sequence_parallel,
        "chunk_bytes": chunk_bytes(tensors, 7, shards=size),
    }
    total, _ = linear_kd_loss(student, weight, teacher, teacher_weight, *tensors[4:], **common, **settings)
    (total * 0.25).backward()
    statistics = token_statistics(student, weight, teacher, teacher_weight, tensors[4], **common)
    return {"total": total.detach(), "dx": student.grad, "dw": weight.grad, "statistics": statistics}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("world_size", "padded"), [(2, 272), (4, 272), (4, 400)])  # 400: the last shard is all padding
def test_shards_match_the_unsharded_formula(
    settings: dict[str, Any], sequence_parallel: bool, world_size: int, padded: int
) -> None:
    ranks = run_distributed(world_size, _on_a_shard, settings, sequence_parallel, padded)
    student, weight, *rest = inputs(padded=padded)
    weight = weight.detach().clone()
    weight[3] *= 20
    weight.requires_grad_()
    expected, _, _ = reference_loss(student, weight, *rest, vocab_size=VOCAB_SIZE, **settings)
    (expected * 0.25).backward()
    assert student.grad is not None and weight.grad is not None
    assert ranks[0]["total"].item() == pytest.approx(expected.item(), rel=1e-5)
    for rank in ranks[1:]:
        assert torch.equal(rank["total"], ranks[0]["total"])
        for mine, theirs in zip(rank["statistics"], ranks[0]["statistics"], strict=True):
            assert torch.equal(mine, theirs)
    assert relative_error(torch.cat([rank["dw"] for rank in ranks]), weight.grad) < 1e-5
    if sequence_parallel:
        assert relative_error(torch.cat([rank["dx"] for rank in ranks]), student.grad) < 1e-5
    else:
        for rank in ranks:
            assert relative_error(rank["dx"], student.grad) < 1e-5
    with torch.no_grad():
        ce, kl, agree = token_statistics(student, weight, rest[0], rest[1], rest[2], vocab_size=VOCAB_SIZE)
    for mine, theirs in zip(ranks[0]["statistics"], (ce, kl, agree), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def _collectives() -> tuple[list[int], list[int]]:
    """Sizes in bytes of the all-gathers of one call, per chunk of 8 tokens."""
    tensors = inputs()
    rank = dist.get_rank()
    rows = slice(rank * 136, (rank + 1) * 136)
    gathered: list[int] = []
    original = shard._all_gather

    def counting(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        gathered.append(output.numel() * output.element_size())
        return original(output, *args, **kwargs)

    with torch.no_grad(), patch.object(shard, "_all_gather", counting):
        linear_kd_loss(
            tensors[0],
            tensors[1][rows],
            tensors[2],
            tensors[3][rows],
            *tensors[4:],
            vocab_size=VOCAB_SIZE,
            tp_group=dist.group.WORLD,
            chunk_bytes=chunk_bytes(tensors, 8, shards=2),
        )
    return gathered, [8] * 3


def test_one_small_collective_per_chunk() -> None:
    for gathered, chunks in run_distributed(2, _collectives):
        assert len(gathered) == len(chunks)
        assert all(size <= 2 * tokens * 9 * 8 for size, tokens in zip(gathered, chunks, strict=True))
