"""The intermediate-state loss over tensor parallelism equals the fp64 formula on the whole, and ranks agree."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels import linear_hidden_loss
from tests.kernels.hidden_inputs import KIND, PROJECTED, chunk_bytes, exact_loss, hidden_inputs
from tests.kernels.inputs import relative_error
from tests.pool import run_distributed


def _on_a_rank(kind: str, projected: bool, sequence_parallel: bool) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    student, projection, teacher, weights = hidden_inputs(projected=projected)
    count = len(weights) // size
    mine = slice(rank * count, (rank + 1) * count) if sequence_parallel else slice(None)
    student = student.detach()[mine].clone().requires_grad_()
    reduced: list[int] = []
    original = dist.all_reduce

    def counting(tensor: Tensor, **kwargs: Any) -> None:
        reduced.append(tensor.numel() * tensor.element_size())
        original(tensor, **kwargs)

    with patch.object(dist, "all_reduce", counting):
        total, sums = linear_hidden_loss(
            student,
            projection,
            teacher[mine],
            weights,
            kind=kind,
            tp_group=dist.group.WORLD,
            sequence_parallel=sequence_parallel,
            chunk_bytes=chunk_bytes(4),
        )
    (total * 0.25).backward()
    return {
        "sums": (total.detach(), sums.loss, sums.tokens, sums.weight, sums.nonfinite),
        "dx": student.grad,
        "dp": None if projection is None else projection.grad,
        "reduced": reduced,
    }


@KIND
@PROJECTED
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.fast_cases(14)
def test_every_layout_matches_the_formula(kind: str, projected: bool, sequence_parallel: bool, world_size: int) -> None:
    ranks = run_distributed(world_size, _on_a_rank, kind, projected, sequence_parallel)
    inputs = hidden_inputs(projected=projected)
    expected, gradients = exact_loss(*inputs, kind=kind)
    assert ranks[0]["sums"][0].item() == pytest.approx(expected.item(), rel=1e-6)
    for rank in ranks:
        assert all(map(torch.equal, rank["sums"], ranks[0]["sums"]))
        assert rank["sums"][2].item() == 19 and rank["sums"][3].item() == pytest.approx(13.7)
        assert rank["reduced"] == [16] * sequence_parallel  # bytes
    # With sequence parallelism the gradients are parts, without they are the whole on every rank.
    if sequence_parallel:
        found = [torch.cat([rank["dx"] for rank in ranks]), sum(rank["dp"] for rank in ranks) if projected else None]
    else:
        assert all(torch.equal(rank["dx"], ranks[0]["dx"]) for rank in ranks)
        found = [ranks[0]["dx"], ranks[0]["dp"]]
    for mine, exact in zip(found, gradients, strict=False):
        assert relative_error(mine, 0.25 * exact) < 1e-5
