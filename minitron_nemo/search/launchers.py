"""Who runs the candidates' recipes outside this job: processes of this machine, or Slurm jobs of their own.

Both call `minitron` on a file and say when that has ended; whether it ended well is for the files to tell. Called again
after having been killed, they begin nothing twice: processes ended with the one that started them, and a job that is
still in Slurm's queue is found there by its name and waited for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from minitron_nemo.config import Recipe
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.device import visible_gpus
from minitron_nemo.processes import LOCAL
from minitron_nemo.steps import Stopped
from minitron_nemo.submit import queued_names, submit_script

POLL_SECONDS = 0.2
QUEUE_SECONDS = 3.0


@dataclass(frozen=True)
class Task:
    """`minitron VERB ARGUMENTS`. Its name is no other task's of this user; `recipe` has its `cluster` section."""

    name: str
    verb: str  # run | search
    arguments: tuple[str, ...]
    recipe: Recipe
    log: Path


@dataclass(frozen=True)
class LocalProcesses:
    """As many at once as there are `shares` of the GPUs: CUDA_VISIBLE_DEVICES of a task, None for this process's.

    `patience` is how many seconds a task's files may take to be seen here.
    """

    shares: Sequence[str | None]
    patience: float = 0.0

    def left_over(self) -> set[str]:
        """Names of tasks of an earlier call that have not ended: none, since processes end with their call."""
        return set()

    def run(self, tasks: Sequence[Task]) -> Iterator[str]:
        """The name of every task as it ends, however it ends.

        Raises Stopped after a signal, which the processes get as well, when the last of them has ended.
        """
        waiting, active = list(tasks), dict[str, subprocess.Popen[bytes]]()
        free, taken = list(self.shares), dict[str, str | None]()
        with _passed_on(active) as received:
            while active or (waiting and not received):
                while waiting and free and not received:
                    task = waiting.pop(0)
                    taken[task.name] = free.pop(0)
                    active[task.name] = _start(task, taken[task.name])
                ended = [name for name, process in active.items() if process.poll() is not None]
                for name in ended:
                    del active[name]
                    free.append(taken.pop(name))
                    if not received:  # what ended well now is found by the next search
                        yield name
                if not ended:
                    time.sleep(POLL_SECONDS)
        if received:
            raise Stopped(signal.Signals(received[0]).name)


@dataclass(frozen=True)
class SlurmJobs:
    """At most `jobs` in the queue at once. Signals end this process at once, and the jobs go on."""

    jobs: int
    patience: float = 60.0

    def left_over(self) -> set[str]:
        """Names of tasks of an earlier call that have not ended, other jobs of this user among them."""
        return queued_names()

    def run(self, tasks: Sequence[Task]) -> Iterator[str]:
        """The name of every task as its job leaves the queue. Raises UserError for what sbatch refuses."""
        present = self.left_over()
        active = {task.name for task in tasks if task.name in present}
        for name in sorted(active):
            print(f"[search] {name}: in the queue from an earlier start", flush=True)
        waiting = [task for task in tasks if task.name not in active]
        while waiting or active:
            while waiting and len(active) < self.jobs:
                task = waiting.pop(0)
                print(f"[search] {task.name}: job {_submit(task)}", flush=True)
                active.add(task.name)
            time.sleep(QUEUE_SECONDS)
            for name in sorted(active - queued_names()):
                active.remove(name)
                yield name


Launcher = LocalProcesses | SlurmJobs


def gpu_shares(jobs: int, processes: int) -> list[str | None]:
    """What each of so many trainings at once, of `processes` each, gets of this machine's GPUs, if there are any.

    Raises UserError for more processes than GPUs. A training that runs alone is left to find its GPUs itself.
    """
    gpus = visible_gpus()
    if jobs == 1 or not gpus:
        return [None] * jobs
    if jobs * processes > len(gpus):
        raise UserError(
            f"search.jobs: {jobs} trainings at once, of {processes} processes each, need {jobs * processes} GPUs, and "
            f"there are {len(gpus)}; set it to {max(len(gpus) // processes, 1)}"
        )
    return [",".join(gpus[job * processes : (job + 1) * processes]) for job in range(jobs)]


def _start(task: Task, gpus: str | None) -> subprocess.Popen[bytes]:
    print(f"[search] {task.name}: {task.log}", flush=True)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "minitron_nemo.cli", task.verb, *task.arguments],
            env={**os.environ, LOCAL: "1", **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _submit(task: Task) -> str:
    script = {"run": "distill.sh", "search": "search.sh"}[task.verb]
    task.log.parent.mkdir(parents=True, exist_ok=True)
    output = f"--output={str(task.log.absolute()).replace('%', '%%')}"
    cluster = replace(task.recipe.cluster, sbatch=[*task.recipe.cluster.sbatch, output])
    return submit_script(script, replace(task.recipe, name=task.name, cluster=cluster), task.arguments)


@contextmanager
def _passed_on(active: Mapping[str, subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hand signals to the processes that run at the time; yields the list of those that came."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in active.values():
            process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in active.values():  # after an error here: nothing may be left to write beside a rerun
            process.kill()
            process.wait()
