"""`minitron search` with a job for every training: what a killed driver submitted is not submitted again."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.search.test_search import table, write_search
from tests.slurm.cluster import Cluster
from tests.slurm.test_chain import ENVIRONMENT

pytestmark = pytest.mark.timeout(900)

OVERRIDES = ("search.launcher=slurm", "search.jobs=2", "search.top_k=2", "search.rungs=[2]", "train.steps=2")


class Driver:
    """`minitron search` on the head node, in the background; its own process id there is in a file."""

    def __init__(self, slurm: Cluster, directory: Path, log: str) -> None:
        self.slurm, self.pid, self.log = slurm, directory / "driver.pid", directory / log
        start = f"echo $$ >{self.pid}; exec minitron search tiny.yaml {' '.join(OVERRIDES)}"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                slurm.command(["bash", "-c", start], directory),
                env=slurm.environment(ENVIRONMENT),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        self.slurm.run("kill", "-KILL", self.pid.read_text().strip())
        self.process.wait(30)


def jobs(slurm: Cluster) -> Counter[str]:
    """How many jobs of every name there have been, the search's own."""
    names = slurm.run("squeue", "--noheader", "--states=all", "--format=%j").split()
    return Counter(name for name in names if name.startswith("tiny-"))


def test_a_killed_driver_finds_its_jobs_again(slurm: Cluster, tmp_path: Path) -> None:
    write_search(tmp_path)
    slurm.run("scontrol", "update", "PartitionName=cpu", "State=DOWN")  # so that the first part stays in the queue
    try:
        driver = Driver(slurm, tmp_path, "log1")
        driver.wait_for(lambda: len(jobs(slurm)) == 1)
        driver.kill()
        driver = Driver(slurm, tmp_path, "log2")
        driver.wait_for(lambda: "in the queue from an earlier start" in driver.log.read_text())
    finally:
        slurm.run("scontrol", "update", "PartitionName=cpu", "State=UP")
    driver.wait_for(lambda: len(jobs(slurm)) == 3)  # the two trainings, side by side
    driver.kill()
    driver = Driver(slurm, tmp_path, "log3")
    assert driver.process.wait(300) == 0, driver.log.read_text()
    assert set(jobs(slurm).values()) == {1} and len(jobs(slurm)) == 3
    found = table(tmp_path)
    assert [row["steps"] for row in found] == [2, 2, 0]
    for row in found[:2]:
        run = tmp_path / "run/search" / row["name"]
        assert json.loads((run / "status.json").read_text())["state"] == "done"
        assert "distill.sh" not in (run / "2.log").read_text() and "[distill] done" in (run / "2.log").read_text()
    again = Driver(slurm, tmp_path, "log4")
    assert again.process.wait(120) == 0, again.log.read_text()
    assert len(jobs(slurm)) == 3
