"""The teacher's side of `teacher.placement: separate`: compute what the student asks for, send it, wait for more.

    request (store) -> this replica's microbatches -> forward-only passes -> pieces to the ranks that made room

The samples are read here, from the same prepared data in the same order; no tokens come from the student.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.data.dataset import Blend, SampleIndex
from minitron_nemo.data.sampler import Microbatch, Sampler, stack
from minitron_nemo.distillation.separate import digest
from minitron_nemo.distillation.signals import StopRequest
from minitron_nemo.distillation.teacher import ColocatedTeacher, TeacherSignal
from minitron_nemo.distillation.trainer import Outcome
from minitron_nemo.distillation.transfers import Item, Transfers, Window
from minitron_nemo.distillation.watchdog import Heartbeat
from minitron_nemo.models.build import Model
from minitron_nemo.models.states import Delivery
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.worlds import Shipment, Side


class Server:
    """Serves the student's requests on one rank of the teacher's world, all of which run the same loop."""

    def __init__(
        self,
        side: Side,
        transfers: Transfers,
        model: Model,
        sampler: Sampler,
        *,
        sequence_length: int,
        micro_batch_size: int,
        buffer_bytes: int,
    ) -> None:
        """At most `buffer_bytes` of states wait here to be taken, for microbatches of the given sizes at most."""
        self.side = side
        self.transfers = transfers
        self.place = transfers.teacher.place(side.rank)
        self.sampler = sampler
        self.buffer_bytes = buffer_bytes
        self._final = model.architecture.num_layers - 1
        kept = {delivery.state: delivery.source for delivery in transfers.deliveries if delivery.state != self._final}
        self.teacher = ColocatedTeacher(
            model,
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
            student_layout=model.layout,  # no student shares these ranks' windows
            buffer_bytes=buffer_bytes // 2,  # what one pass gives is sent while the next one runs
            deliveries=[Delivery(state, source, source) for state, source in kept.items()],
        )
        self._sent: deque[Shipment] = deque()

    def serve(self, stop: StopRequest, heartbeat: Heartbeat) -> Outcome:
        """How the training ended: what the student's ranks passed to `close`. Collective over the teacher's world.

        A signal that reaches these ranks is passed on to the student's. Raises SaidByRankZero where the student's
        ranks ended with a UserError, RuntimeError where with another error.
        """
        count = 0
        while True:
            with heartbeat.idle():
                request = self._request(count)
            if (name := stop.agreed()) is not None and launch.rank() == 0:
                self.side.post("signal", signal.Signals[name])
            if "end" in request:
                while self._sent:
                    self.side.wait_for(self._sent.popleft())
                outcome: Outcome = request["end"]
                return outcome
            window = Window(**request)
            heartbeat.beat(window.update)
            self._serve(window)
            count += 1

    def _request(self, number: int) -> dict[str, Any]:
        """The student's `number`-th. Rank 0 of this world fetches it, and all learn why there is none."""

        def fetch() -> dict[str, Any]:
            try:
                return dict(self.side.read(f"request {number}"))
            except RuntimeError as error:
                return {"lost": str(error)}

        found = launch.from_rank_0(fetch)
        if "lost" in found:
            raise RuntimeError(found["lost"])
        return found

    def _serve(self, window: Window) -> None:
        """Compute and send what this replica owes of a window."""
        blend = self.sampler.blend_at(window.position)
        assert blend.sequence_length == window.sequence_length, "the student's phases are others than the teacher's"
        size, ranks = window.micro_batch_size, self.transfers.student.data_parallel_size
        samples = self.sampler.global_batch(window.position, window.microbatches * size * ranks)
        items = self.transfers.items(self.place.data, window.microbatches)
        for start in range(0, len(items), self.teacher.window):
            these = items[start : start + self.teacher.window]
            first = [(item.microbatch * ranks + item.data) * size for item in these]
            self._pass(these, [_read(blend, samples[at : at + size]) for at in first])

    def _pass(self, items: Sequence[Item], microbatches: Sequence[Microbatch]) -> None:
        self._make_room(self.buffer_bytes // 2)
        computed = self.teacher.step(microbatches)
        for number, (item, microbatch) in enumerate(zip(items, microbatches, strict=True)):
            self._send(item, microbatch, self._states(computed, number))

    def _states(self, computed: TeacherSignal, number: int) -> dict[int, Tensor]:
        """Those of one microbatch that this rank computed, {state: [s/tp, b, h_t]}."""
        states = dict(computed.states[number])
        if computed.hidden:
            states[self._final] = computed.hidden[number]
        return states

    def _send(self, item: Item, microbatch: Microbatch, states: dict[int, Tensor]) -> None:
        """To each rank that needs some of it: which samples it is of, then the pieces."""
        said = torch.tensor([digest(microbatch["sample_ids"])], device=current_device())
        works, greeted = [], set()
        for piece in self.transfers.outgoing(self.place, item, microbatch["tokens"].shape[1]):
            if piece.peer not in greeted:
                greeted.add(piece.peer)
                works.append(self.side.send(said, piece.peer))
            works.append(self.side.send(states[piece.state][piece.start : piece.stop], piece.peer))
        if works:
            self._sent.append(self.side.ship(works, [said, *states.values()]))

    def _make_room(self, nbytes: int) -> None:
        """Wait until so much is taken of what was sent that `nbytes` more fit into the buffer."""
        while self._sent and (
            self._sent[0].done.is_set() or nbytes + sum(sent.nbytes for sent in self._sent) > self.buffer_bytes
        ):
            self.side.wait_for(self._sent.popleft())


def _read(blend: Blend, samples: Sequence[SampleIndex]) -> Microbatch:
    return stack([blend.sample(index) for index in samples])
