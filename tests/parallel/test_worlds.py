"""A job that splits into a student's and a teacher's world, and is told to stop meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

# As a step has it: the signal raises, in whatever Python code the main thread is.
SPLITTING = """
import signal, sys, time
from minitron_nemo.parallel import launch, worlds
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
launch.join_job()
print("joined", flush=True)
if launch.job_rank() == 1:
    time.sleep(600)
with worlds.split(1):
    pass
"""


@pytest.mark.slow
def test_a_rank_that_waits_for_the_split_hears_signals() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SPLITTING],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.stdout.readline() for rank in ranks if rank.stdout] == ["joined\n"] * 2
        time.sleep(1)
        ranks[0].send_signal(signal.SIGTERM)
        assert ranks[0].wait(30) == 75
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
