"""A persistent pool of gloo processes for distributed tests.

One spawned process per rank, started when first needed and kept until the interpreter ends: importing torch and
Megatron-core costs seconds, a new process group milliseconds. Every call gets a fresh process group of exactly
`world_size` ranks, and model-parallel state left behind by the function is destroyed afterwards.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from torch.distributed import TCPStore

# After the first failure the other ranks get this long to finish; ranks stuck in a collective are ended then.
GRACE_SECONDS = 5.0
CLEANING_SECONDS = 60.0  # for a rank to take its process groups down, or to start
MOST_THREADS = 150


class Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class RankFailed(Exception):
    """Carries a rank's traceback into the test's."""


_workers: list[Worker] = []


def run_distributed(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list:
    """Call `fn(*args, **kwargs)` on `world_size` ranks with `join_job` done, and return the results by rank.

    `fn` is a module-level function; arguments and results travel as pickles. An exception of any rank is raised here
    with that rank's traceback as its cause: the first one to fail speaks for all. A rank that does not answer within
    `timeout` seconds ends the pool's processes and raises TimeoutError; the next call starts new ones.
    """
    while len(_workers) < world_size:
        _workers.append(_start_worker())
    for rank in range(world_size):
        _wait_until_ready(rank)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank, worker in enumerate(_workers[:world_size]):
        worker.connection.send_bytes(pickle.dumps((rank, world_size, store.port, fn, args, kwargs)))
    outcomes, first_failure = _collect(world_size, timeout)
    if first_failure is not None:
        error, trace = outcomes[first_failure][1]
        raise error from RankFailed(f"on rank {first_failure} of {world_size}:\n{trace}")
    return [outcomes[rank][1] for rank in range(world_size)]


def shut_down() -> None:
    """End the pool's processes."""
    for worker in _workers:
        worker.connection.close()
        worker.process.kill()
    for worker in _workers:
        worker.process.join()
    _workers.clear()


def _wait_until_ready(rank: int) -> None:
    """Wait until the rank's process has cleaned up after its last call; where it went away for that, start another."""
    worker = _workers[rank]
    try:
        if worker.connection.poll(CLEANING_SECONDS):
            worker.connection.recv_bytes()
            return
        worker.process.kill()
    except (EOFError, ConnectionError):
        pass  # gone, as it does when it holds what it cannot free
    worker.process.join()
    _workers[rank] = _start_worker()
    _wait_until_ready(rank)


def _start_worker() -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Not daemonic: Megatron-core's checkpoint writer forks helpers, which daemons may not.
    process = context.Process(target=_serve, args=(theirs,), name="test-rank")
    process.start()
    theirs.close()
    return Worker(process, ours)


def _collect(world_size: int, timeout: float) -> tuple[dict[int, tuple[bool, Any]], int | None]:
    """Answers by rank, `(True, result)` or `(False, (error, traceback))`, and the first rank that failed."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    first_failure: int | None = None
    died = False
    deadline = time.monotonic() + timeout
    while len(outcomes) < world_size:
        pending = {_workers[rank].connection: rank for rank in range(world_size) if rank not in outcomes}
        ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            shut_down()
            if first_failure is None:
                raise TimeoutError(f"ranks {sorted(pending.values())} of {world_size} gave no answer in {timeout} s")
            break
        for connection in ready:
            rank = pending[connection]  # type: ignore[index]
            try:
                outcomes[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, ConnectionError):
                process = _workers[rank].process
                process.join()
                died = True
                outcomes[rank] = (False, (RuntimeError(f"rank {rank} died with exit code {process.exitcode}"), ""))
                deadline = min(deadline, time.monotonic())
                first_failure = rank  # the others only lost their connection to it, and may have said so earlier
            if first_failure is None and not outcomes[rank][0]:
                first_failure = rank
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if died:
        shut_down()
    return outcomes, first_failure


def _serve(connection: Connection) -> None:
    """A worker's life: say that it is ready, answer a call, clean up; until the pool hangs up or that fails."""
    from minitron_nemo.parallel import launch

    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    while True:
        connection.send_bytes(b"ready")
        try:
            call = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        answer = _answer(*call)
        # Sent before the groups go: their closing makes other ranks fail, and the first failure speaks for all.
        connection.send_bytes(answer)
        launch.shutdown()
        # Each gloo group has threads that wake up a hundred times a second until the models that know it are collected.
        if _threads() > MOST_THREADS:
            gc.collect()
        if _threads() > MOST_THREADS:  # something that a test broke off still holds them
            return


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _answer(rank: int, world_size: int, port: int, fn: Callable[..., Any], args: Any, kwargs: Any) -> bytes:
    import torch

    from minitron_nemo.parallel import launch

    try:
        store = TCPStore("127.0.0.1", port, is_master=False)
        launch.join_job(launch.Rendezvous(store, rank, world_size))
        result = fn(*args, **kwargs)
        # Nobody takes the process group down while another rank still needs it.
        torch.distributed.barrier()
        return pickle.dumps((True, result))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            return pickle.dumps((False, (pickle.loads(pickle.dumps(error)), trace)))
        except Exception:
            return pickle.dumps((False, (RuntimeError(f"{type(error).__name__}: {error}"), trace)))


atexit.register(shut_down)
