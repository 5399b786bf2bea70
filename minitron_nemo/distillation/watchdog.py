"""Notices that a training stands still, says which rank holds it up, and ends the job.

A thread of each rank looks at its main thread's progress, and writes it where all ranks can read it:

    RUN/heartbeats/rank_00003.json   {"tick": 17, "iteration": 41, "point": 1, "paused": false, "waits": true, ...}
    RUN/heartbeats/verdict.txt       what the first rank to notice said; the others repeat it
    RUN/heartbeats/stacks_00003.txt  every thread's stack of that rank, when it gave up

Files, not the process group's store: that lives in a process which may be the one that hangs. While a rank is in what
may take as long as it likes (the first step, checkpoints, validation) nothing is noticed; torch's own timeouts hold.

Ranks of a teacher in a world of its own write heartbeats, too. They judge nobody, and are at fault only where they owe
what the student's ranks stand still for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

from minitron_nemo.parallel import launch

HEARTBEATS = "heartbeats"  # under the run directory
READING, COMPUTING = 0, 1
POINTS = ("reading its batch", "computing")
# Ranks that wait for another one are found in these files.
COMMUNICATION = ("torch/distributed/", "pipeline_parallel/p2p_communication.py", "minitron_nemo/parallel/worlds.py")
LONGEST_INTERVAL = 10.0
# A rank that cannot even say what it found, since the file system hangs, ends after this many seconds.
LAST_WORDS = 60.0


class Beat(NamedTuple):
    """What a rank says of itself. `tick` counts its signs of life; `waits`: its main thread waits for another rank.

    `iteration` of a `teacher` is the update whose states it computes; `idle`: it is asked for none.
    """

    tick: int
    iteration: int
    point: int
    paused: bool
    waits: bool
    where: str
    teacher: bool = False
    idle: bool = False

    def __str__(self) -> str:
        whose = "of the teacher, " if self.teacher else ""
        return f"{whose}update {self.iteration + 1}, {POINTS[self.point]}, in {self.where}"


class Heartbeat:
    """Context manager around the loop of a teacher's rank: says what that does, for the student's watchdog."""

    def __init__(self, directory: Path, timeout: float) -> None:
        """`timeout` is that of the watchdog. Main thread only."""
        self.directory = directory
        self.timeout = timeout
        self._interval = min(timeout / 4, LONGEST_INTERVAL)
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._iteration, self._idle = 0, False

    def __enter__(self) -> Heartbeat:
        if self.timeout > 0:
            threading.Thread(target=self._tell, name="heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def beat(self, iteration: int) -> None:
        """The main thread begins what update `iteration`, counted from 0, needs."""
        self._iteration = iteration

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Within, nothing is asked of this rank."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def _tell(self) -> None:
        tick = 0
        while not self._ended.wait(self._interval):
            tick += 1
            where, waits = _place(sys._current_frames().get(self._main))
            _write(self.directory, Beat(tick, self._iteration, COMPUTING, False, waits, where, True, self._idle))


class Watchdog:
    """Context manager around a training loop that calls `beat`. `timeout` is in seconds, 0 for none.

    `report` gets the verdict in the process that ends. Main thread only.
    """

    def __init__(self, directory: Path, timeout: float, report: Callable[[str], None]) -> None:
        self.directory = directory
        self.timeout = timeout
        self.report = report
        self._interval = min(timeout / 4, LONGEST_INTERVAL)
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._iteration, self._point = 0, 0
        self._first: int | None = None
        self._since = time.monotonic()
        self._pauses = 0

    def __enter__(self) -> Watchdog:
        """Collective."""
        if launch.rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                path.unlink(missing_ok=True)  # a teacher's rank may be renaming its own
        launch.barrier()
        if self.timeout > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def beat(self, iteration: int, point: int) -> None:
        """The main thread has finished `iteration` updates and is at `POINTS[point]` of the next."""
        if self._first is None:
            self._first = iteration
        self._iteration, self._point, self._since = iteration, point, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within may take as long as it likes."""
        self._pauses += 1
        try:
            yield
        finally:
            self._since = time.monotonic()
            self._pauses -= 1

    def verdict(self) -> str | None:
        """What some rank said when it gave up; None if none did."""
        with suppress(FileNotFoundError):
            return (self.directory / "verdict.txt").read_text()
        return None

    def _watch(self) -> None:
        tick, before = 0, time.monotonic()
        while not self._ended.wait(self._interval):
            tick, now = tick + 1, time.monotonic()
            if now - before > self.timeout / 2:  # this thread stood still as well: the whole process was suspended
                self._since = now
            before = now
            self._write(tick)
            if self._standing_still():
                self._give_up(tick)

    def _standing_still(self) -> bool:
        first_step = self._first is None or self._iteration == self._first
        return not self._pauses and not first_step and time.monotonic() - self._since > self.timeout

    def _write(self, tick: int) -> None:
        where, waits = _place(sys._current_frames().get(self._main))
        paused = self._pauses > 0 or self._first is None or self._iteration == self._first
        _write(self.directory, Beat(tick, self._iteration, self._point, paused, waits, where))

    def _read(self) -> dict[int, Beat]:
        """The last beat of every rank that ever gave one."""
        beats = {}
        for rank in range(launch.job_size()):
            with suppress(OSError, ValueError):
                beats[rank] = Beat(**json.loads(_path(self.directory, rank).read_text()))
        return beats

    def _give_up(self, tick: int) -> None:
        """End the process, unless others have a reason to be slow or things move again meanwhile."""
        earlier = self._read()
        if any(beat.paused for beat in earlier.values()):
            return
        # Twice, so that ranks that noticed nothing yet have said where they are, and silent ones are found out.
        for _ in range(2):
            if self._ended.wait(self._interval):
                return
            tick += 1
            self._write(tick)
        if not self._standing_still():
            return
        ending = threading.Timer(LAST_WORDS, os._exit, (1,))
        ending.daemon = True
        ending.start()
        said = self._agree(diagnosis(earlier, self._read(), launch.job_size(), self.timeout))
        print(f"rank {launch.rank()}: {said}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        with suppress(OSError), (self.directory / f"stacks_{launch.rank():05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        try:
            self.report(said)
        finally:
            os._exit(1)

    def _agree(self, said: str) -> str:
        """The verdict of the first rank that had one."""
        mine = self.directory / f".verdict_{launch.rank():05d}"
        with suppress(OSError):
            mine.write_text(said)
            os.link(mine, self.directory / "verdict.txt")  # fails where there is one
        return self.verdict() or said


def _path(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:05d}.json"


def _write(directory: Path, beat: Beat) -> None:
    """This rank's, whole or not at all."""
    beside = directory / f".rank_{launch.job_rank():05d}"
    with suppress(OSError):  # a full disk must not end a training; the rank seems silent meanwhile
        beside.write_text(json.dumps(beat._asdict()))
        os.replace(beside, _path(directory, launch.job_rank()))


def diagnosis(earlier: Mapping[int, Beat], later: Mapping[int, Beat], processes: int, seconds: float) -> str:
    """Which ranks of the job hold the others up, from two readings some time apart.

    Ranks that gave no sign of life in between; else those that are furthest behind; else those whose main thread is
    not waiting for another rank. A teacher's rank counts while it computes what the furthest of the student's need.
    """
    silent = [rank for rank in range(processes) if rank not in later or earlier.get(rank) == later[rank]]
    furthest = max((beat.iteration, beat.point) for beat in later.values() if not beat.teacher)
    owing = {rank: beat for rank, beat in later.items() if not beat.idle and beat.iteration <= furthest[0]}
    behind = [rank for rank, beat in owing.items() if (beat.iteration, beat.point) < furthest]
    at_work = [rank for rank, beat in owing.items() if not beat.waits]
    culprits: list[int] = silent or behind or (at_work if len(at_work) < len(owing) else [])
    start = f"no progress for {seconds:g} s at update {furthest[0] + 1}"
    if not culprits:
        return f"{start}: no rank stands out among {processes}; rank 0: {later[min(later)]}"
    named = "; ".join(
        f"rank {rank} ({'gives no sign of life' if rank in silent else later[rank]})" for rank in culprits[:8]
    )
    more = f" and {len(culprits) - 8} more" if len(culprits) > 8 else ""
    return f"{start}: did not arrive: {named}{more}"


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, as "function (file:line)", and whether that is in communication."""
    if frame is None:
        return "a thread that has ended", False
    while frame.f_code.co_filename == threading.__file__ and frame.f_back is not None:  # whoever waits for an event
        frame = frame.f_back
    path = frame.f_code.co_filename
    where = f"{frame.f_code.co_name} ({Path(path).name}:{frame.f_lineno})"
    return where, any(part in path for part in COMMUNICATION)
