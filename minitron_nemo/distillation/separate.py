"""`teacher.placement: separate`: the teacher runs on processes of its own, one batch ahead of the student.

    student   asks for n + 1, takes n | trains on n            | asks for n + 2, takes n + 1 | trains on n + 1
    teacher                           | runs on n + 1, sends   |                             | runs on n + 2, sends

The student's side. What a training will ask for is a function of its recipe, so windows are asked for before they are
needed, as many as fit into `teacher.buffer_bytes`: nothing is sent that nobody made room for. A request says which
samples, by their place in the sampler's order; the teacher reads them itself (`serving`), and what comes back says
for which samples it was computed.
"""

from __future__ import annotations

import hashlib
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.config import Recipe
from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.distillation.intermediate import Pair
from minitron_nemo.distillation.phases import Segment, segments
from minitron_nemo.distillation.teacher import TeacherSignal, interleaved_microbatches, window_size
from minitron_nemo.distillation.transfers import Grid, Transfers, Window, windows
from minitron_nemo.errors import UserError
from minitron_nemo.models.states import Delivery, owners
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.parallel.worlds import Shipment, Side

# Windows under way beside the one in use. One hides the teacher's time; the second makes up for an update of either
# side that takes longer than others. Before a training stops it waits for them, so there are not more.
AHEAD = 2


@dataclass
class Expected:
    """A window under way: {state: [s/tp, b, h_t]} per microbatch, and for each what its senders say it belongs to."""

    window: Window
    states: list[dict[int, Tensor]]
    digests: list[list[Tensor]]
    shipment: Shipment


class SeparateTeacher:
    """A `TeacherSource` that receives what the ranks of a teacher send. Every rank of the student's world has one."""

    def __init__(
        self,
        side: Side,
        transfers: Transfers,
        teacher: Architecture,
        run: Sequence[Segment],
        *,
        dtype: torch.dtype,
        output_weight: Tensor | None,
        buffer_bytes: int,
    ) -> None:
        """`output_weight` as in `TeacherSignal`; `buffer_bytes` bounds the states in use and under way on a rank."""
        self.side = side
        self.transfers = transfers
        self.place = transfers.student.place(side.rank)
        self.output_weight = output_weight
        self.run = run
        self._shape_of_states = (teacher.hidden_size, dtype)
        self._final = teacher.num_layers - 1
        layout = transfers.student.layout
        tokens = max(part.micro_batch_size * part.sequence_length for part in run)
        state_bytes = tokens // layout.tensor_model_parallel_size * teacher.hidden_size * dtype.itemsize
        microbatch_bytes = transfers.states_held() * state_bytes
        # Half of the room is for the window in use, the other half for what comes meanwhile.
        self.window = window_size(
            state_bytes=microbatch_bytes, buffer_bytes=buffer_bytes // 2, multiple_of=interleaved_microbatches(layout)
        )
        self._room = max(buffer_bytes // microbatch_bytes, self.window)
        self._asked = 0
        self._ahead: Iterator[Window] = iter(())
        self._next: Window | None = None
        self._under_way: deque[Expected] = deque()

    def step(self, microbatches: Sequence[Microbatch]) -> TeacherSignal:
        """Wait for the states of these microbatches, and ask for those that come next.

        What the last call gave must not be held any more. Raises RuntimeError where the teacher's ranks failed or
        computed other samples.
        """
        self._pass_on_signal()
        wanted = self._window(microbatches)
        while self._under_way and self._under_way[0].window != wanted:
            # Asked for in vain: the batch is run twice, since its first pass measured alpha.
            self.side.wait_for(self._under_way.popleft().shipment)
        if not self._under_way:
            self._ahead = self._from(wanted.position)
            self._ask(next(self._ahead))
            self._next = next(self._ahead, None)
        self._ask_ahead()
        current = self._under_way.popleft()
        assert current.window == wanted, f"the recipe has no {wanted}"
        self.side.wait_for(current.shipment)
        self._check(current, microbatches)
        return TeacherSignal(
            [states[self._final] for states in current.states if self._final in states and self._is_last],
            self.output_weight,
            current.states,
        )

    def close(self, outcome: str) -> None:
        """Tell the teacher's ranks that the training ended, and how, when nothing is under way any more."""
        while self._under_way:
            self.side.wait_for(self._under_way.popleft().shipment)
        if self.side.rank == 0:
            self.side.post(f"request {self._asked}", {"end": outcome})

    @property
    def _is_last(self) -> bool:
        return self.place.pipeline == self.transfers.student.layout.pipeline_model_parallel_size - 1

    def _window(self, microbatches: Sequence[Microbatch]) -> Window:
        micro_batch_size, sequence_length = microbatches[0]["tokens"].shape
        position = microbatches[0]["position"] - self.place.data * micro_batch_size
        update = next(self._from(position)).update
        return Window(update, position, len(microbatches), micro_batch_size, sequence_length)

    def _from(self, position: int) -> Iterator[Window]:
        return windows(self.run, position, self.window, self.transfers.student.data_parallel_size)

    def _ask_ahead(self) -> None:
        """Ask for what there is room for, beside the first window under way, which is used next."""
        while self._next is not None and len(self._under_way) <= AHEAD:
            held = sum(expected.window.microbatches for expected in self._under_way)
            if held + self._next.microbatches > self._room:
                return
            self._ask(self._next)
            self._next = next(self._ahead, None)

    def _ask(self, window: Window) -> None:
        """Have the teacher's ranks compute a window, and make room for it."""
        # First: NCCL's first transfer of a pair of ranks blocks both until the other one comes.
        if self.side.rank == 0:
            self.side.post(f"request {self._asked}", asdict(window))
        self._asked += 1
        works, states, digests = [], [], []
        for microbatch in range(window.microbatches):
            found: dict[int, Tensor] = {}
            senders: dict[int, Tensor] = {}
            for piece in self.transfers.incoming(self.place, microbatch, window.sequence_length):
                if piece.peer not in senders:
                    senders[piece.peer] = torch.empty(1, dtype=torch.int64, device=current_device())
                    works.append(self.side.receive(senders[piece.peer], piece.peer))
                if piece.state not in found:
                    found[piece.state] = self._buffer(window)
                works.append(self.side.receive(found[piece.state][piece.start : piece.stop], piece.peer))
            states.append(found)
            digests.append(list(senders.values()))
        received = [*chain(*digests), *chain(*(found.values() for found in states))]
        self._under_way.append(Expected(window, states, digests, self.side.ship(works, received)))

    def _buffer(self, window: Window) -> Tensor:
        """Room for one state of one microbatch, [s/tp, b, h_t]."""
        width, dtype = self._shape_of_states
        rows = window.sequence_length // self.transfers.student.layout.tensor_model_parallel_size
        return torch.empty((rows, window.micro_batch_size, width), dtype=dtype, device=current_device())

    def _check(self, found: Expected, microbatches: Sequence[Microbatch]) -> None:
        for microbatch, digests in zip(microbatches, found.digests, strict=True):
            own = digest(microbatch["sample_ids"])
            if any(said.item() != own for said in digests):
                raise RuntimeError(
                    "the teacher's ranks computed other samples than the student's are training on (here: "
                    f"{', '.join(microbatch['sample_ids'])}); all ranks must read the same prepared data"
                )

    def _pass_on_signal(self) -> None:
        """A signal that reached the teacher's ranks alone stops the training, too."""
        if self.side.rank == 0 and self.side.has("signal"):
            number = self.side.read("signal")
            self.side.store.delete_key("signal")
            signal.raise_signal(number)


def digest(sample_ids: Sequence[str]) -> int:
    """63 bits that stand for a microbatch's samples."""
    return int.from_bytes(hashlib.sha256("\n".join(sample_ids).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Worlds:
    """How a recipe shares a job out between student and teacher."""

    student: Grid
    teacher: Grid

    def __str__(self) -> str:
        parts = (
            f"{name}: {grid.processes} of {grid.layout} dp={grid.data_parallel_size}" for name, grid in self._named
        )
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For a plan as JSON."""
        return {
            name: {"processes": grid.processes, "data_parallel_size": grid.data_parallel_size}
            for name, grid in self._named
        }

    @property
    def _named(self) -> tuple[tuple[str, Grid], ...]:
        return ("student", self.student), ("teacher", self.teacher)

    def transfers(self, pairs: Sequence[Pair], teacher: Architecture, student: Architecture) -> Transfers:
        """The final states for the student's last stage, and those of the pairs for the stages that compare them."""
        sources = owners(teacher.num_layers, self.teacher.layout)
        targets = owners(student.num_layers, self.student.layout)
        ends = [Pair(teacher.num_layers - 1, student.num_layers - 1), *pairs]
        found = {Delivery(pair.teacher, sources[pair.teacher], targets[pair.student]) for pair in ends}
        return Transfers(self.teacher, self.student, tuple(sorted(found)))


def shared_out(recipe: Recipe, teacher: Architecture, job_size: int) -> Worlds:
    """The two worlds of a recipe with placement separate. Raises UserError, naming the key, for what does not fit."""
    config, layout = recipe.teacher, Layout.from_config(recipe.parallel)
    if config.layout is None or config.processes is None:
        missing = "layout" if config.layout is None else "processes"
        raise UserError(
            f"teacher.{missing}: placement separate needs it: teacher.processes of the job run the teacher, with the "
            "sizes of teacher.layout"
        )
    own = Layout.from_config(config.layout)
    students = job_size - config.processes
    if config.processes < 1 or students < 1:
        raise UserError(
            f"teacher.processes: {config.processes} of the job's {job_size} leaves no process to the teacher or to the "
            f"student; give 1 to {job_size - 1}, and the job as many as both take"
        )
    for key, part in (("parallel", layout), ("teacher.layout", own)):
        if part.context_parallel_size > 1:
            raise UserError(f"{key}.context_parallel_size: above 1 it does not go with placement separate")
    if config.processes % own.model_parallel_size:
        raise UserError(
            f"teacher.processes: {config.processes} is not a multiple of the {own.model_parallel_size} that "
            f"teacher.layout ({own}) takes; change one of them"
        )
    if students % layout.model_parallel_size:
        raise UserError(
            f"teacher.processes: {config.processes} of the job's {job_size} leave {students} to the student, not a "
            f"multiple of the {layout.model_parallel_size} that parallel ({layout}) takes; change one of them"
        )
    own.check(teacher, config.processes, "teacher.layout")
    own.check_split("teacher", teacher.num_layers, "teacher.layout")
    for segment in segments(recipe.train, recipe.data.sequence_length):
        if segment.sequence_length % own.tensor_model_parallel_size:
            raise UserError(
                f"teacher.layout.tensor_model_parallel_size: {own.tensor_model_parallel_size} does not divide the "
                f"sequence length {segment.sequence_length}, over which hidden states are split; change one of them"
            )
    if recipe.distill.logits_weight == 0:
        raise UserError(
            "teacher.placement: separate, but distill.logits_weight 0 means training without the teacher; raise it, or "
            "use colocated, which starts none"
        )
    return Worlds(Grid(layout, students), Grid(own, config.processes, first=students))
