"""What is sent between two worlds, carried out on arrays: every rank gets its part of the gathered states."""

from __future__ import annotations

from collections import defaultdict, deque
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from minitron_nemo.distillation.phases import Segment
from minitron_nemo.distillation.transfers import Grid, Item, Place, Transfers, Window, windows
from minitron_nemo.models.states import Delivery, owners
from minitron_nemo.parallel.layout import Layout

SEQUENCE = 24
DELIVERIES = ((3, 0), (3, 1), (5, 1))  # (state, the student's pipeline rank that needs it)


def grid(tp: int, pp: int, dp: int, first: int = 0) -> Grid:
    return Grid(Layout(tp, pp), tp * pp * dp, first)


@pytest.mark.parametrize("teacher", [(1, 1, 1), (2, 2, 1), (4, 1, 2), (3, 2, 3)])
@pytest.mark.parametrize("student", [(1, 2, 2), (2, 2, 3), (6, 2, 1)])
def test_every_rank_of_the_student_gets_its_part_of_the_whole_states(
    teacher: tuple[int, int, int], student: tuple[int, int, int]
) -> None:
    """Sizes that divide one another and that do not; channels between pairs of ranks keep their order."""
    wanted, count = grid(*student), 3
    own = grid(*teacher, first=wanted.processes)
    source = {3: 0, 5: own.layout.pipeline_model_parallel_size - 1}
    transfers = Transfers(own, wanted, tuple(Delivery(state, source[state], target) for state, target in DELIVERIES))
    whole = {
        (state, Item(microbatch, data)): np.random.default_rng((state, microbatch, data)).random(SEQUENCE)
        for state, microbatch, data in product((3, 5), range(count), range(wanted.data_parallel_size))
    }
    channels: dict[tuple[int, int], deque[NDArray[np.float64]]] = defaultdict(deque)
    computed = []
    for rank in range(own.first, own.first + own.processes):
        place = own.place(rank)
        assert own.rank(place) == rank
        items = transfers.items(place.data, count)
        if place.tensor == place.pipeline == 0:
            computed += items
        for item in items:
            for piece in transfers.outgoing(place, item, SEQUENCE):
                mine = whole[piece.state, item].reshape(own.layout.tensor_model_parallel_size, -1)[place.tensor]
                channels[rank, piece.peer].append(mine[piece.start : piece.stop])
    assert sorted(computed) == sorted(product(range(count), range(wanted.data_parallel_size))), "each once"
    for rank, microbatch in product(range(wanted.processes), range(count)):
        place = wanted.place(rank)
        size = SEQUENCE // wanted.layout.tensor_model_parallel_size
        got: dict[int, NDArray[np.float64]] = {}
        for piece in transfers.incoming(place, microbatch, SEQUENCE):
            part = got.setdefault(piece.state, np.full(size, np.nan))
            part[piece.start : piece.stop] = channels[piece.peer, rank].popleft()
        assert sorted(got) == [state for state, target in DELIVERIES if target == place.pipeline]
        for state, values in got.items():
            expected = whole[state, Item(microbatch, place.data)].reshape(-1, size)[place.tensor]
            np.testing.assert_array_equal(values, expected)
    assert not any(channels.values()), "nothing is sent that nobody receives"


def test_ranks_are_placed_as_megatron_places_them() -> None:
    """Tensor-parallel neighbours first, then data-parallel ones; behind those of the other world."""
    eight = grid(2, 2, 2, first=5)
    expected = {5: Place(0, 0, 0), 6: Place(1, 0, 0), 7: Place(0, 1, 0), 9: Place(0, 0, 1)}
    assert {rank: eight.place(rank) for rank in expected} == expected


def test_windows_are_those_that_a_step_makes_of_every_batch() -> None:
    """Two data-parallel ranks; windows of three microbatches at most; begun anywhere."""
    run = (Segment(2, 16, 8, 1), Segment(1, 32, 8, 2))
    expected = [
        Window(0, 0, 3, 1, 16),
        Window(0, 6, 1, 1, 16),
        Window(1, 8, 3, 1, 16),
        Window(1, 14, 1, 1, 16),
        Window(2, 16, 2, 2, 32),
    ]
    for number, window in enumerate(expected):
        assert list(windows(run, window.position, 3, 2)) == expected[number:]
    assert list(windows(run, 24, 3, 2)) == []


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(), [0] * 6),
        (Layout(pipeline_model_parallel_size=2), [0, 0, 0, 1, 1, 1]),
        # Stages of 1, 2, 1 and 1 layers, in turn on the two ranks.
        (Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), [0, 1, 1, 0, 1, 1]),
    ],
)
def test_a_state_is_owned_by_the_stage_whose_norm_reads_it(layout: Layout, expected: list[int]) -> None:
    assert owners(5, layout) == dict(enumerate(expected, start=-1))
