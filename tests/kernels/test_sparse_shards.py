"""Against a sparse teacher, 2 and 4 vocabulary shards give the loss and gradients of the whole, not TP times them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels import SparseTeacher, linear_kd_loss, shard
from tests.kernels.inputs import VOCAB_SIZE, Tensors, chunk_bytes, inputs, relative_error
from tests.kernels.sparse_teachers import DIVERGENCES, draws, projected_formula, sparse_loss, teacher_log_probs, top
from tests.pool import run_distributed

_all_gather = shard._all_gather


def _on_a_shard(form: str, options: list[dict[str, Any]], sequence_parallel: bool, padded: int) -> list[dict[str, Any]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * padded // size, (rank + 1) * padded // size)
    results = []
    for entry in options:
        tensors = inputs(padded=padded)
        count = len(tensors[4]) // size
        mine = slice(rank * count, (rank + 1) * count) if sequence_parallel else slice(None)
        student = tensors[0].detach()[mine].clone().requires_grad_()
        weight = tensors[1].detach()[rows].clone().requires_grad_()
        teacher = _sharded_teacher(form, tensors, entry["temperature"])
        gathered: list[int] = []

        def counting(output: Tensor, *args: Any, gathered: list[int] = gathered, **kwargs: Any) -> Any:
            gathered.append(output.numel())
            return _all_gather(output, *args, **kwargs)

        with patch.object(shard, "_all_gather", counting):
            total, sums = linear_kd_loss(
                student,
                weight,
                None,
                None,
                *tensors[4:],
                vocab_size=VOCAB_SIZE,
                tp_group=dist.group.WORLD,
                sequence_parallel=sequence_parallel,
                chunk_bytes=chunk_bytes(tensors, 4, shards=size),  # 8 tokens: there is one buffer
                sparse_teacher=teacher,
                **entry,
            )
        (total * 0.25).backward()
        results.append(
            {
                "total": total.detach(),
                "nonfinite": sums.nonfinite,
                "dx": student.grad,
                "dw": weight.grad,
                "gathered": gathered[1:] if sequence_parallel else gathered,  # the first: the hidden states
                "entries": teacher.token_ids.shape[1],
            }
        )
    return results


def _sharded_teacher(form: str, tensors: Tensors, temperature: float) -> SparseTeacher:
    if form == "bucket":
        return top(tensors, temperature)
    return draws(teacher_log_probs(tensors, temperature), likely=3, count=40)


SHARDED = [
    ("bucket", [{"divergence": d, "temperature": t, "ce_weight": 0.7} for d in DIVERGENCES for t in (0.5, 1.0, 4.0)]),
    ("sampled", [{"temperature": temperature, "ce_weight": 0.7} for temperature in (0.5, 1.0, 4.0)]),
]


@pytest.mark.parametrize(("form", "options"), SHARDED, ids=["bucket", "sampled"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("world_size", "padded"), [(2, 272), (4, 272), (4, 400)])  # 400: the last shard is all padding
@pytest.mark.fast_cases(5)
def test_shards_give_the_loss_and_gradients_of_the_whole(
    form: str, options: list[dict[str, Any]], sequence_parallel: bool, world_size: int, padded: int
) -> None:
    ranks = run_distributed(world_size, _on_a_shard, form, options, sequence_parallel, padded)
    for number, entry in enumerate(options):
        results = [rank[number] for rank in ranks]
        tensors = inputs(padded=padded)
        teacher = _sharded_teacher(form, tensors, entry["temperature"])
        expected, _, _ = projected_formula(tensors, teacher, **entry)
        by_hidden, by_weight = torch.autograd.grad(expected * 0.25, tensors[:2])
        whole, _ = sparse_loss(tensors, teacher, **entry)
        unsharded = torch.autograd.grad(whole * 0.25, tensors[:2])

        assert results[0]["total"].item() == pytest.approx(expected.item(), rel=1e-6)
        for result in results:
            assert torch.equal(result["total"], results[0]["total"]) and result["nonfinite"] == 0
            assert result["gathered"] == [world_size * 8 * (result["entries"] + 6)] * 3  # one per chunk of 8 tokens
        weight_grad = torch.cat([result["dw"] for result in results])
        hidden_grads = [result["dx"] for result in results]
        if sequence_parallel:
            hidden_grads = [torch.cat(hidden_grads)]
        assert relative_error(weight_grad, by_weight) < 1e-5
        assert weight_grad.norm().item() == pytest.approx(unsharded[1].norm().item(), rel=1e-5)  # not TP times as much
        for hidden_grad in hidden_grads:
            assert relative_error(hidden_grad, by_hidden) < 1e-5
            assert hidden_grad.norm().item() == pytest.approx(unsharded[0].norm().item(), rel=1e-5)


def _broken_on_a_shard() -> int:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = inputs()
    teacher = top(tensors, 1.0)
    teacher.token_ids[5, 2] = VOCAB_SIZE  # held by the last rank as padding
    teacher.token_ids[8, 2] = teacher.token_ids[8, 3]
    rows = slice(rank * 272 // size, (rank + 1) * 272 // size)
    _, sums = linear_kd_loss(
        tensors[0],
        tensors[1][rows],
        None,
        None,
        *tensors[4:],
        vocab_size=VOCAB_SIZE,
        tp_group=dist.group.WORLD,
        sparse_teacher=teacher,
    )
    return int(sums.nonfinite)


def test_every_shard_counts_the_tokens_that_are_not_finite() -> None:
    assert run_distributed(2, _broken_on_a_shard) == [2, 2]
