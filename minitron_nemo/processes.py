"""The processes of one machine that `cluster.launcher: local` starts, each of which runs the command again."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

# Seconds for the others once one has stopped, as srun's --wait in launch/common.sh: who waits for it within torch hears
# no signal.
WAIT = 60.0
LOCAL = "MINITRON_LOCAL"  # set in the processes that cluster.launcher=local and search.launcher=local start


def launch_locally(processes: int, arguments: Sequence[str], stopped: int) -> int:
    """Start `minitron` with these arguments in so many processes of this machine, as torchrun would.

    Signals are passed on. Returns the exit code of the first process that fails; the others are killed then, since
    they would wait for it. The code `stopped` is no failure: every process saves and stops by itself, or is killed
    `WAIT` seconds after the first one that did.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LOCAL: "1",
    }
    common = {"OMP_NUM_THREADS": "1", **os.environ, **common}
    command = [sys.executable, "-m", "minitron_nemo.cli", *arguments]
    workers = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, frame: _pass_on(received, workers))
    codes = [worker.poll() for worker in workers]
    until = math.inf
    while None in codes and not set(codes) - {None, 0, stopped} and time.monotonic() < until:
        time.sleep(0.05)
        codes = [worker.poll() for worker in workers]
        if stopped in codes:
            until = min(until, time.monotonic() + WAIT)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()
    failed = [code for code in codes if code]
    return 0 if not failed else max(failed[0], 1)  # killed by a signal: negative


def die_with_parent() -> None:
    """Of a process that was started so: ask Linux for SIGKILL when its launcher is gone.

    So no worker is left to write beside a rerun.
    """
    if LOCAL in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of Linux


def _pass_on(received: int, workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.send_signal(received)
