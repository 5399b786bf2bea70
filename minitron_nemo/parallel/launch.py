"""How a process joins its job: torchrun, srun, or alone. Also the model-parallel groups of a layout.

Nothing here knows about models. `join_job` is called once per process by whatever starts it, `initialize` whenever a
step knows its layout. torch's default process group is this process's world: the whole job, unless `worlds` has split
it. `rank` and `world_size` are those of the world, `job_rank` and `job_size` those of the job.
"""

from __future__ import annotations

import errno
import io
import json
import os
import queue
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from minitron_nemo.errors import SaidByRankZero, UserError, on_every_rank
from minitron_nemo.parallel import device, optimizer_fixes
from minitron_nemo.parallel.layout import Layout

# Long enough for one rank to read or write a large checkpoint while the others wait at a barrier.
T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
# Ranks wait for each other's work on files here: one of them may tokenise for hours. A rank that dies ends the wait at
# once, since its connections close.
WAIT = timedelta(days=7)

# Said once per process by every run and nobody's fault: advice for CUDA streams, fall-backs that are chosen here, and
# deprecations between Megatron-core and torch.
KNOWN_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "When using (async grad allreduce|sequence parallelism) it is recommended",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "`torch.distributed.*` is deprecated",
)


class Rendezvous(NamedTuple):
    """A store that all processes of a job share, and this process's place among them."""

    store: distributed.Store
    rank: int
    world_size: int


_active_layout: Layout | None = None
_waiting_group: distributed.ProcessGroup | None = None
_joined: Rendezvous | None = None
_worlds = 0  # entered so far: each has keys of its own in the store


@dataclass(frozen=True)
class Job:
    """This process's place in its job. `local_size` counts the job's processes on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_address: str
    master_port: int


def job_from_environment(environment: Mapping[str, str]) -> Job | None:
    """Read the job from torchrun's or srun's variables; None for a process that nobody launched.

    A batch script's own shell carries SLURM_PROCID as well, but only an srun step has SLURM_STEP_ID: a plain call in
    the script is a process of its own. Raises UserError for an incomplete environment.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _torchrun_job(environment)
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        return _srun_job(environment)
    return None


def _torchrun_job(environment: Mapping[str, str]) -> Job:
    world_size = _integer(environment, "WORLD_SIZE")
    return Job(
        rank=_integer(environment, "RANK"),
        world_size=world_size,
        local_rank=_integer(environment, "LOCAL_RANK"),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        master_address=_required(environment, "MASTER_ADDR"),
        master_port=_integer(environment, "MASTER_PORT"),
    )


def _srun_job(environment: Mapping[str, str]) -> Job:
    world_size = _integer(environment, "SLURM_NTASKS")
    nodes = int(environment.get("SLURM_NNODES", 1))
    return Job(
        rank=_integer(environment, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environment, "SLURM_LOCALID"),
        local_size=-(-world_size // nodes),
        master_address=environment.get("MASTER_ADDR") or _first_host(environment),
        master_port=int(environment.get("MASTER_PORT") or _port(environment)),
    )


def _first_host(environment: Mapping[str, str]) -> str:
    """First host of the step, which is where rank 0 runs; the job's first host where the step has no list."""
    hosts = environment.get("SLURM_STEP_NODELIST") or _required(environment, "SLURM_JOB_NODELIST")
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], check=True, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"environment: MASTER_ADDR is not set and scontrol cannot list {hosts!r}: {error}") from None
    return listing.stdout.split()[0]


def _port(environment: Mapping[str, str]) -> int:
    """A port every task derives alike, another for other jobs and steps on the machine, below the ephemeral range."""
    job, step = _integer(environment, "SLURM_JOB_ID"), _integer(environment, "SLURM_STEP_ID")
    return 15000 + (job * 17 + step) % 15000


def _required(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UserError(f"environment: {name} is not set; start the job with torchrun or srun, or without either")
    return environment[name]


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = _required(environment, name)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment: {name} is {text!r}, not a whole number") from None


def silence_known_warnings() -> None:
    """Leave KNOWN_WARNINGS unsaid from here on; most come with Megatron-core's import."""
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


class _Log(io.FileIO):
    """A file that forgets what a full disk does not take."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return len(data)


def outlive_a_full_disk() -> None:
    """Let standard output and error lose lines where their file's disk is full: a training must not end of that."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        log = io.BufferedWriter(_Log(old.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(log, old.encoding, old.errors, write_through=True, line_buffering=True))


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
