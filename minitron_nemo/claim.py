"""Whose run directory it is: one start of one job at a time.

    RUN/.lock   {"token": "5f0c...", "job": "1234", "start": 2, "host": "n1", "pid": 4711}

Rank 0 holds a lock on the file for as long as the start lasts; the file says who that is. A node that loses its network
keeps its processes, and with them the lock, while Slurm starts the job again elsewhere. So a later start of the same
Slurm job does not wait for the lock: it puts a file of its own in the place, and every rank of the earlier one, which
looks at the file every few seconds, ends at once. The later start begins when they have had time to.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch

FILE_NAME = ".lock"
INTERVAL = 4.0  # seconds between two looks at the file

_held: set[Path] = set()  # by this process


@contextmanager
def claimed(run_dir: Path, *below: Path) -> Iterator[None]:
    """Hold `run_dir`, which is made if need be: a second job on it would overwrite what the first writes. Collective.

    `below` are the directories in it that files are written to; they are made, too. Within such a block the directory
    is held already, and nothing is done.

    Raises UserError if another job holds it, or if it cannot be written to.
    """
    place = run_dir.absolute()
    if place in _held:
        yield
        return
    with ExitStack() as held:
        mine = launch.from_rank_0(lambda: _claim(run_dir, held, *below))
        ended = threading.Event()
        threading.Thread(target=_watch, args=(run_dir / FILE_NAME, mine, ended), name="claim", daemon=True).start()
        _held.add(place)
        try:
            yield
        finally:
            _held.remove(place)
            ended.set()


def _claim(run_dir: Path, held: ExitStack, *below: Path) -> str:
    """On rank 0: the token of this claim, whose lock `held` releases."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        token = _lock(run_dir / FILE_NAME, held)
        for directory in (run_dir, *below):
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(".*.partial"):  # by processes that were killed while they wrote a file
                left.unlink(missing_ok=True)
        return token
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: cannot be written to ({error.strerror}); choose another one") from None


def _lock(path: Path, held: ExitStack) -> str:
    mine = {
        "token": secrets.token_hex(16),
        "job": os.environ.get("SLURM_JOB_ID"),
        "start": int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1,
        "host": os.uname().nodename,
        "pid": os.getpid(),
    }
    file = held.enter_context(path.open("a"))
    other = _read(path)
    cut_off = _is_later(mine, other)
    if not _locked(file):
        if not cut_off:
            raise UserError(
                f"{path.parent}: in use by another minitron ({_name(other)}); wait or stop it. If its node is lost for "
                f"good, remove {path}"
            )
        path.unlink()
        file = held.enter_context(path.open("a"))
        _locked(file)
    file.truncate(0)
    file.write(json.dumps(mine) + "\n")
    file.flush()
    os.fsync(file.fileno())
    held.callback(file.truncate, 0)  # so that an end like any other leaves nobody to wait for
    if cut_off:
        print(f"{_name(other)} did not end by itself: waiting until it must have noticed", flush=True)
        time.sleep(3 * INTERVAL)
    return str(mine["token"])


def _locked(file: TextIO) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_later(mine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether Slurm has ended the other start to make this one: both are of one job, and it came before."""
    return mine["job"] is not None and mine["job"] == other.get("job") and mine["start"] > other["start"]


def _read(path: Path) -> dict[str, Any]:
    """What the file says; nothing if it says nothing, or is just being written."""
    with suppress(FileNotFoundError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}


def _name(holder: Mapping[str, Any]) -> str:
    job = "" if holder.get("job") is None else f"job {holder['job']}, start {holder['start']}, "
    return f"{job}pid {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _watch(path: Path, mine: str, ended: threading.Event) -> None:
    """End this process, in the midst of whatever it does, when another start's token is in the file."""
    while not ended.wait(INTERVAL):
        with suppress(OSError):  # what cannot be read now is read the next time
            if _read(path).get("token", mine) != mine:
                said = f"rank {launch.job_rank()}: a later start has taken {path.parent} over"
                print(said, file=sys.stderr, flush=True)
                os._exit(1)
