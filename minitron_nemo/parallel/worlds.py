"""One job in two worlds: the student's processes come first, the teacher's last.

    rank in the job    0 1 2 3 4 5 | 6 7
    student's world    0 1 2 3 4 5 |        a default process group of torch and Megatron's groups on each side
    teacher's world                | 0 1

Within a world nothing knows of the other one. The two share a link, outside torch's default group, on which any process
sends tensors to any other; the job's store, for short messages; and their end: where one fails it says why, and the
other raises.

Megatron-core's HyperCommGrid and BridgeCommunicator do not serve here. They take one default world for granted, whose
ranks all run one schedule: transfers block both ends, pass through one leader of each replica to its tensor-parallel
neighbours, and one data-parallel size must divide the other. These two sides run at their own pace, and keep the
sequence sharded.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

from torch import Tensor
from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store

from minitron_nemo.errors import SaidByRankZero, UserError
from minitron_nemo.parallel import device, launch

# Seconds after which who waits for a transfer looks whether the other side still goes on.
INTERVAL = 1.0
# For the other side to hear why this one ends, before the store goes with rank 0; and to say it, when a connection
# breaks.
LAST_WORDS = 5.0


class Shipment:
    """Transfers under way together, and what they must not outlive; let go when they are done."""

    def __init__(self, works: Sequence[tuple[Any, int]], tensors: Sequence[Tensor]) -> None:
        """`works` as `Side.send` and `Side.receive` give them: with the rank at the other end."""
        self.works = works
        self.tensors = tensors
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self.done = threading.Event()
        self.error: tuple[int, Exception] | None = None


class Side:
    """Where this process stands in a split job."""

    def __init__(self, store: Store, teachers: int) -> None:
        """Collective over the job."""
        self.rank, size = launch.job_rank(), launch.job_size()
        self.students, self.teachers = size - teachers, teachers
        self.of_teacher = self.rank >= self.students
        self.name = "teacher" if self.of_teacher else "student"
        self.store = store
        self.meet("link")  # whoever waits within torch for a rank that a signal has ended hears none itself
        self.link = device.link(PrefixStore("link", store), self.rank, size, launch.TIMEOUT)
        self._shipped: queue.SimpleQueue[Shipment | None] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="link", daemon=True).start()

    def send(self, tensor: Tensor, rank: int) -> tuple[Any, int]:
        """Begin to send to a rank of the job. What a pair of ranks sends arrives in the order of its receiving."""
        return self._begin(self.link.send, tensor, rank)

    def receive(self, tensor: Tensor, rank: int) -> tuple[Any, int]:
        """Begin to receive from a rank of the job."""
        return self._begin(self.link.recv, tensor, rank)

    def ship(self, works: Sequence[tuple[Any, int]], tensors: Sequence[Tensor]) -> Shipment:
        """Have transfers that have begun watched. They end in the order in which they were given here."""
        shipment = Shipment(works, tensors)
        self._shipped.put(shipment)
        return shipment

    def wait_for(self, shipment: Shipment) -> None:
        """Return when its transfers are done. Raises where one failed, and what `check` raises."""
        while not shipment.done.wait(INTERVAL):
            self.check()
        if shipment.error is not None:
            self._lost(*shipment.error)

    def post(self, key: str, message: Any) -> None:
        """Leave a message, of what JSON can hold, for `read`."""
        self.store.set(key, json.dumps(message))

    def read(self, key: str, longest: float = 0.05) -> Any:
        """The message under `key`, found at most `longest` seconds after it came. Raises what `check` raises."""
        pause = 0.001
        while not self.has(key):
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return json.loads(self.store.get(key))

    def check(self) -> None:
        """Raise SaidByRankZero where some rank of the job ended with a UserError, RuntimeError where with another."""
        if not self.has("failed"):
            return
        name, wrong_input, reason = json.loads(self.store.get("failed"))
        if name != self.name:
            self.store.set("heard", "")
        raise (SaidByRankZero if wrong_input else RuntimeError)(f"the {name}'s ranks ended: {reason}")

    def has(self, key: str) -> bool:
        """Whether there is a message under `key`. Raises RuntimeError where the store is gone."""
        try:
            return self.store.check([key])
        except DistNetworkError as error:
            raise RuntimeError("lost rank 0 of the job, which holds its store") from error

    def fail(self, error: BaseException) -> None:
        """Say why this side ends; the first of all ranks to do so is heard."""
        words = json.dumps([self.name, isinstance(error, UserError), f"{type(error).__name__}: {error}"])
        with suppress(DistStoreError, DistNetworkError):  # rank 0 went first
            self.store.compare_set("failed", "", words)
            if self.rank == 0:
                self.store.wait(["heard"], timedelta(seconds=LAST_WORDS))

    def meet(self, place: str) -> None:
        """Wait until every rank of the job is at `place`. Raises what `check` raises."""
        if self.store.add(f"{place} count", 1) == self.students + self.teachers:
            self.post(place, True)
        self.read(place, longest=1.0)

    def end(self) -> None:
        """Let the thread go that watches the link."""
        self._shipped.put(None)

    def _begin(self, transfer: Callable[..., Any], tensor: Tensor, rank: int) -> tuple[Any, int]:
        try:
            return transfer([tensor], rank, 0), rank
        except RuntimeError as error:
            self._lost(rank, error)

    def _lost(self, rank: int, error: Exception) -> NoReturn:
        until = time.monotonic() + LAST_WORDS  # the other end may be about to say why
        while time.monotonic() < until:
            self.check()
            time.sleep(0.1)
        raise RuntimeError(f"lost rank {rank} of the job: {error}") from error

    def _watch(self) -> None:
        while (shipment := self._shipped.get()) is not None:
            shipment.error = _failure(shipment)
            shipment.works = shipment.tensors = ()
            shipment.done.set()
            del shipment  # or it stays until the next one comes


def _failure(shipment: Shipment) -> tuple[int, Exception] | None:
    """Wait for its transfers; what went wrong with the first that failed, and the rank at its other end."""
    for work, peer in shipment.works:
        try:
            device.finish(work)
        except Exception as error:  # whatever it is, the main thread raises it
            return peer, error
    return None


@contextmanager
def split(teachers: int) -> Iterator[Side]:
    """Within, the job's last `teachers` processes are a world of their own, and so are the others. Collective.

    At the end the job is one world again; not where an exception ends it, since ranks may be anywhere then. Process
    groups and models of the job before are gone.
    """
    side = Side(launch.job_store("split"), teachers)
    side.meet("split")  # nobody needs the job's groups any more
    launch.leave_world()
    first = side.students if side.of_teacher else 0
    launch.enter_world(side.name, side.rank - first, side.teachers if side.of_teacher else side.students)
    try:
        yield side
        side.meet("join")
    except BaseException as error:
        side.fail(error)
        raise
    finally:
        side.end()
    launch.leave_world()
    launch.enter_world("job", launch.job_rank(), launch.job_size())
