"""The pool itself: fresh groups per call, errors that reach the test, dead ranks that do not hang it."""

import os

import pytest
import torch

from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.pool import run_distributed


def _sum_of_ranks() -> tuple[int, float]:
    total = torch.tensor(float(launch.rank() + 1))
    torch.distributed.all_reduce(total)
    return launch.rank(), total.item()


def _tensor_parallel_size(layout: Layout) -> int:
    from megatron.core import parallel_state

    launch.initialize(layout, seed=1)
    return parallel_state.get_tensor_model_parallel_world_size()


def _fail_on_last_rank() -> None:
    if launch.rank() == launch.world_size() - 1:
        raise UserError("the last rank objects")
    launch.barrier()


def _die() -> None:
    if launch.rank() == 1:
        os._exit(3)
    launch.barrier()


def test_results_come_back_by_rank_from_a_group_of_the_asked_size() -> None:
    assert run_distributed(2, _sum_of_ranks) == [(0, 3.0), (1, 3.0)]
    assert run_distributed(1, _sum_of_ranks) == [(0, 1.0)]


def test_model_parallel_state_is_remade_for_every_call() -> None:
    assert run_distributed(2, _tensor_parallel_size, Layout(tensor_model_parallel_size=2)) == [2, 2]
    assert run_distributed(2, _tensor_parallel_size, Layout()) == [1, 1]


def test_an_exception_of_one_rank_is_raised_in_the_test_and_the_pool_recovers() -> None:
    with pytest.raises(UserError, match="the last rank objects") as caught:
        run_distributed(2, _fail_on_last_rank)
    assert "on rank 1 of 2" in str(caught.value.__cause__)
    assert run_distributed(2, _sum_of_ranks) == [(0, 3.0), (1, 3.0)]


def test_a_rank_that_dies_does_not_hang_the_test() -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_distributed(2, _die)
