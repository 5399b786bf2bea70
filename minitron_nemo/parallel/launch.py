"""How a process joins its job: torchrun, srun, or alone. Also the model-parallel groups of a layout.

Nothing here knows about models. `join_job` is called once per process by whatever starts it, `initialize` whenever a
step knows its layout. torch's default process group is this process's world: the whole job, unless `worlds` has split
it. `rank` and `world_size` are those of the world, `job_rank` and `job_size` those of the job.
"""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from minitron_nemo.errors import SaidByRankZero, UserError, on_every_rank
from minitron_nemo.parallel import device, optimizer_fixes
from minitron_nemo.parallel.console import silence_known_warnings
from minitron_nemo.parallel.environment import Job, job_from_environment
from minitron_nemo.parallel.layout import Layout

T = TypeVar("T")

# Long enough for one rank to read or write a large checkpoint while the others wait at a barrier.
TIMEOUT = timedelta(minutes=30)
# Ranks wait for each other's work on files here: one of them may tokenise for hours. A rank that dies ends the wait at
# once, since its connections close.
WAIT = timedelta(days=7)


class Rendezvous(NamedTuple):
    """A store that all processes of a job share, and this process's place among them."""

    store: distributed.Store
    rank: int
    world_size: int


_active_layout: Layout | None = None
_waiting_group: distributed.ProcessGroup | None = None
_joined: Rendezvous | None = None
_worlds = 0  # entered so far: each has keys of its own in the store


def join_job(rendezvous: Rendezvous | None = None, gpu: str | None = None) -> None:
    """Join the process group of this job and prepare torch and Megatron-core for this device. Idempotent.

    The job is `rendezvous`, or what the environment says. With several processes on one machine and no
    OMP_NUM_THREADS, each computes with one thread. `gpu` is what the recipe's cluster.gpu names: then every process
    needs one, and a UserError ends the job on every rank where one has none.
    """
    silence_known_warnings()
    job = job_from_environment(os.environ)
    if job is not None:
        device.choose(job.local_rank)
        if job.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
    device.install()
    optimizer_fixes.install()
    _save_without_manager()
    global _joined, _worlds
    if _joined is None:
        _joined, _worlds = rendezvous or _meet(job), 0
        if gpu is not None:
            on_every_rank(lambda: device.check_gpu(gpu), job_rank(), _gather_by_store)
        enter_world("job", _joined.rank, _joined.world_size)


def _meet(job: Job | None) -> Rendezvous:
    """Raises what torch raises when the job's processes do not find each other."""
    if job is None:
        return Rendezvous(distributed.HashStore(), 0, 1)
    address = f"tcp://{job.master_address}:{job.master_port}"
    return Rendezvous(*next(distributed.rendezvous(address, job.rank, job.world_size, timeout=TIMEOUT)))


def enter_world(name: str, rank: int, world_size: int) -> None:
    """Make a world of `world_size` processes of the job, which all pass the same `name`. Collective over them."""
    global _waiting_group, _worlds
    _worlds += 1
    store = job_store(f"world/{name}")
    distributed.init_process_group(device.backend(), store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    _waiting_group = distributed.new_group(backend="gloo", timeout=WAIT)


def leave_world() -> None:
    """Drop model-parallel state and the process groups; other ranks must not be using them any more."""
    global _waiting_group
    _drop_groups()
    _waiting_group = None
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _save_without_manager() -> None:
    """Give Megatron-core's checkpoint writer a queue within the process.

    Its default (filesystem_async.py:54) is the proxy of a spawned manager process, made for asynchronous saves: it
    re-imports the main script and takes seconds. Saves here are synchronous, the queue is read where it is filled.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def initialize(layout: Layout, seed: int) -> None:
    """Make Megatron's process groups for `layout` and seed its random states. Collective.

    Groups of the layout that is active already are kept; those of another one are dropped first, and models built on
    them must not be used any more. Data-parallel ranks share `seed`; tensor-parallel ranks differ where Megatron wants
    it.
    """
    from megatron.core import parallel_state, tensor_parallel

    global _active_layout
    layout.check_processes(world_size())
    if layout != _active_layout or not parallel_state.model_parallel_is_initialized():
        _drop_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
            context_parallel_size=layout.context_parallel_size,
        )
        _active_layout = layout
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


@contextmanager
def virtual_stages(layout: Layout) -> Iterator[None]:
    """Let Megatron-core see the virtual stages of `layout`, whose groups are those of the active one.

    It keeps their number in its global state, reads it while a model is built, loaded and run, and so knows one model
    at a time; a teacher on the student's ranks may have others.
    """
    from megatron.core import parallel_state

    active = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    parallel_state.set_virtual_pipeline_model_parallel_world_size(layout.virtual_pipeline_model_parallel_size)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(active)


def _drop_groups() -> None:
    from megatron.core import parallel_state

    global _active_layout
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    _active_layout = None


def shutdown() -> None:
    """Leave the job."""
    global _joined
    leave_world()
    _joined = None


def rank() -> int:
    return distributed.get_rank()


def world_size() -> int:
    return distributed.get_world_size()


def job_rank() -> int:
    return _rendezvous().rank


def job_size() -> int:
    return _rendezvous().world_size


def job_store(name: str) -> distributed.Store:
    """A part of the store that all processes of the job share, for callers that were in as many worlds each."""
    return distributed.PrefixStore(f"{name}/{_worlds}", _rendezvous().store)


def _rendezvous() -> Rendezvous:
    assert _joined is not None, "join_job has not been called"
    return _joined


def barrier() -> None:
    """Wait for all ranks of the world, however long one of them works on files."""
    distributed.barrier(group=_waiting_group)


def gather(value: T) -> list[T]:
    """The values of all ranks of the world, by rank, on every rank, however long one of them works on files."""
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=_waiting_group)
    return values


def _gather_by_store(value: Any) -> list[Any]:
    """The same before there are groups, which ranks with a GPU and ranks without one could not form. Once a job."""
    store, ranks = job_store("gather"), range(job_size())
    store.set(f"{job_rank()}", json.dumps(value))
    values = [json.loads(content) for content in store.multi_get([f"{rank}" for rank in ranks])]
    store.set(f"{job_rank()} has read", "")
    if job_rank() == 0:  # whose process keeps the store, and may end now
        store.wait([f"{rank} has read" for rank in ranks])
    return values


def from_rank_0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result on every rank; a UserError of it ends the call on every rank."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0, group=_waiting_group)
    if outcome[1] is not None:
        raise outcome[1] if rank() == 0 else SaidByRankZero(*outcome[1].args)
    result: T = outcome[0]
    return result
