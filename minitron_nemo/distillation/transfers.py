"""What goes from which rank of a teacher in a world of its own to which rank of the student: arithmetic alone.

The unit is one state of one microbatch. The pipeline rank that computes it has it in parts of the sequence, one on each
tensor-parallel rank; the stage that needs it wants parts of its own number; what goes is where two parts overlap:

    teacher, tp=2   |      0      |      1      |
    student, tp=3   |    0   |    1   |    2    |        0 -> 0, 0 -> 1, 1 -> 1, 1 -> 2

The student's microbatches, whichever data-parallel rank they belong to, go round the teacher's replicas in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minitron_nemo.distillation.phases import Segment
from minitron_nemo.models.states import Delivery
from minitron_nemo.parallel.layout import Layout


@dataclass(frozen=True)
class Window:
    """Microbatches that a teacher is asked for: `microbatches` of every data-parallel rank of the student.

    They hold consecutive samples from `position` of the sampler's order on. `update` counts updates from 0.
    """

    update: int
    position: int
    microbatches: int
    micro_batch_size: int
    sequence_length: int


def windows(run: Sequence[Segment], position: int, size: int, data_parallel_size: int) -> Iterator[Window]:
    """Those that a run asks for, `size` microbatches at most each, from the one that begins at `position` on."""
    start = done = 0
    for segment in run:
        together = segment.micro_batch_size * data_parallel_size
        count = segment.global_batch_size // together
        first = max(0, (position - start) // segment.global_batch_size)
        for update in range(first, segment.steps):
            for taken in range(0, count, size):
                at = start + update * segment.global_batch_size + taken * together
                if at >= position:
                    yield Window(
                        done + update,
                        at,
                        min(size, count - taken),
                        segment.micro_batch_size,
                        segment.sequence_length,
                    )
        start += segment.samples
        done += segment.steps


class Place(NamedTuple):
    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Grid:
    """The ranks of a world as Megatron-core orders them: tensor-parallel neighbours first, then data-parallel ones.

    `first` is the rank in the job of the world's first process.
    """

    layout: Layout
    processes: int
    first: int = 0

    @property
    def data_parallel_size(self) -> int:
        return self.layout.data_parallel_size(self.processes)

    def rank(self, place: Place) -> int:
        """Rank in the job."""
        tp = self.layout.tensor_model_parallel_size
        return self.first + place.tensor + tp * (place.data + self.data_parallel_size * place.pipeline)

    def place(self, rank: int) -> Place:
        """Of a rank in the job."""
        rest, tensor = divmod(rank - self.first, self.layout.tensor_model_parallel_size)
        pipeline, data = divmod(rest, self.data_parallel_size)
        return Place(tensor, data, pipeline)


class Item(NamedTuple):
    """A microbatch of a window: of which data-parallel rank of the student, and which of its own."""

    microbatch: int
    data: int


class Piece(NamedTuple):
    """Rows [start, stop) of this rank's part of a state's sequence, from or to rank `peer` of the job."""

    state: int
    peer: int
    start: int
    stop: int


@dataclass(frozen=True)
class Transfers:
    """Who sends what to whom. A pair of ranks has the same pieces in the same order on both ends.

    `deliveries` say which states go from which pipeline rank of the teacher to which of the student.
    """

    teacher: Grid
    student: Grid
    deliveries: tuple[Delivery, ...]

    def items(self, replica: int, microbatches: int) -> list[Item]:
        """What one of the teacher's replicas computes of a window."""
        size = self.student.data_parallel_size
        everything = [Item(microbatch, data) for microbatch in range(microbatches) for data in range(size)]
        return everything[replica :: self.teacher.data_parallel_size]

    def outgoing(self, place: Place, item: Item, sequence_length: int) -> list[Piece]:
        """What the teacher's rank at `place` sends of a microbatch that its replica computed."""
        return [
            Piece(delivery.state, self.student.rank(Place(tensor, item.data, delivery.target)), start, stop)
            for delivery in self.deliveries
            if delivery.source == place.pipeline
            for tensor, start, stop in _overlaps(place.tensor, self.teacher, self.student, sequence_length)
        ]

    def incoming(self, place: Place, microbatch: int, sequence_length: int) -> list[Piece]:
        """What the student's rank at `place` gets of its `microbatch`-th of a window."""
        replica = (microbatch * self.student.data_parallel_size + place.data) % self.teacher.data_parallel_size
        return [
            Piece(delivery.state, self.teacher.rank(Place(tensor, replica, delivery.source)), start, stop)
            for delivery in self.deliveries
            if delivery.target == place.pipeline
            for tensor, start, stop in _overlaps(place.tensor, self.student, self.teacher, sequence_length)
        ]

    def states_held(self) -> int:
        """Of one microbatch, on the student's pipeline rank that gets most of them."""
        targets = [delivery.target for delivery in self.deliveries]
        return max(targets.count(target) for target in targets)


def _overlaps(tensor: int, own: Grid, other: Grid, sequence_length: int) -> Iterator[tuple[int, int, int]]:
    """Tensor-parallel ranks of the other model that share rows with part `tensor` of this one: (rank, start, stop).

    Rows count from the start of this part.
    """
    size = sequence_length // own.layout.tensor_model_parallel_size
    other_size = sequence_length // other.layout.tensor_model_parallel_size
    begin, end = tensor * size, (tensor + 1) * size
    for rank in range(begin // other_size, -(-end // other_size)):
        yield rank, max(begin, rank * other_size) - begin, min(end, (rank + 1) * other_size) - begin
