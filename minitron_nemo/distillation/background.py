"""The tensors of a checkpoint on their way to the disk while training goes on.

    foreground, collective     plan who writes what; copy to host memory what training will change
    a thread of each rank      write, sync, checksum: no collectives, no device
    foreground, collective     every rank's part is written: gather what they wrote
    a thread of rank 0         write .metadata and what belongs to no rank, publish (`TrainingState`)

torch's own FileSystemWriter and Megatron's planner write the files. Megatron's asynchronous writer forks processes, and
waits for ever where one of them dies; a thread shares the process's fate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.distillation.integrity import Checksums, checksum
from minitron_nemo.parallel import launch

# Megatron gathers these into host memory of their own; everything else is what training works on.
FRESH = "optimizer."


T = TypeVar("T")


class Task(Generic[T]):
    """Work on files in a thread."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._results: list[T] = []
        self._problem = ""
        self._work = work
        # A daemon: a process that ends in an error does not wait for a checkpoint that nobody will publish.
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def finished(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for its end, well or not."""
        self._thread.join()

    def join(self) -> T:
        """Wait for its end and return the result. Raises OSError saying what could not be done."""
        self._thread.join()
        if not self._results:
            raise OSError(self._problem)
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except Exception as error:  # on a full disk torch raises whatever its writer happened to do; `join` tells all
            self._problem = str(error) or type(error).__name__


class Part(NamedTuple):
    """What one rank wrote."""

    results: list[WriteResult]
    files: Checksums
    seconds: float


class BackgroundWrite:
    """This rank's files of one checkpoint, made collectively and written by `task`."""

    def __init__(self, directory: Path, by_key: dict[str, list[Any]], others: Mapping[str, bytes]) -> None:
        """`by_key` are Megatron's sharded tensors and objects by their keys; `others` are whole files of this rank."""
        for key, shards in by_key.items():
            for shard in shards:
                if isinstance(shard, ShardedTensor) and not (key.startswith(FRESH) and shard.data.is_cpu):
                    shard.data = shard.data.detach().to("cpu", copy=True)
        self.directory = directory
        self.others = others
        # Nothing is copied ahead: all tensors are in host memory, and the thread must not touch a device.
        self.writer = FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0)
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._plan, self.metadata = self._planned(mcore_to_pyt_state_dict(by_key, False))
        self.task = Task(self._run, f"write {directory.name}")

    def _planned(self, state: dict[str, Any]) -> tuple[SavePlan, Metadata | None]:
        """This rank's plan, and on rank 0 the metadata of all."""
        coordinator = launch.rank() == 0
        self._planner.set_up_planner(state, self.writer.storage_meta(), coordinator)
        self.writer.set_up_storage_writer(coordinator)
        local = self.writer.prepare_local_plan(self._planner.create_local_plan())
        plans: list[Any] = [None] * launch.world_size()
        torch.distributed.gather_object(local, plans if coordinator else None)
        metadata: Metadata | None = None
        if coordinator:
            plans, metadata = self._planner.create_global_plan(plans)
            plans = self.writer.prepare_global_plan(plans)
        mine: list[Any] = [None]
        torch.distributed.scatter_object_list(mine, plans if coordinator else None)
        return self._planner.finish_plan(mine[0]), metadata

    def _run(self) -> Part:
        start = time.perf_counter()
        results = self.writer.write_data(self._plan, self._planner).wait()
        for name, content in self.others.items():
            write_atomic(self.directory / name, content)
        tensors = self.directory.glob(f"__{launch.rank()}_*.distcp")
        paths = [*tensors, *(self.directory / name for name in self.others)]
        files = {path.name: checksum(path) for path in paths}
        return Part(results, files, time.perf_counter() - start)
