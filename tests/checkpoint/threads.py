"""Threads that are the processes of a job to the transform."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from minitron_nemo.errors import UserError

Gather = Callable[[Any], list[Any]]
SECONDS = 30  # that one of them may wait for the others


def in_threads(world_size: int, work: Callable[[int, Gather], object]) -> list[BaseException | None]:
    """Call `work(rank, gather)` in as many threads, and return what each of them raised."""
    barrier = threading.Barrier(world_size, timeout=SECONDS)
    values: list[Any] = [None] * world_size
    raised: list[BaseException | None] = [None] * world_size

    def process(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            everyones = list(values)
            barrier.wait()
            return everyones

        try:
            work(rank, gather)
        except BaseException as error:
            raised[rank] = error
            if not isinstance(error, UserError):
                barrier.abort()  # as a process group does when one of its processes is gone

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised
