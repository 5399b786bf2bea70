"""The cluster is one: nodes are separate hosts, and processes started by srun find each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.slurm.cluster import Cluster

REPOSITORY = Path(__file__).parents[2]


def test_nodes_have_their_own_hostname_network_and_processes(slurm: Cluster) -> None:
    look = "hostname; readlink /proc/self/ns/net /proc/self/ns/pid"
    lines = slurm.run("srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", look).split()
    assert {"n1", "n2"} <= set(lines)
    assert len(set(lines)) == 6


def test_processes_under_plain_srun_join_one_job(slurm: Cluster) -> None:
    tasks = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]
    lines = slurm.run("srun", *tasks, sys.executable, "-m", "tests.slurm.all_reduce", cwd=REPOSITORY, timeout=200)
    reports = sorted((json.loads(line) for line in lines.splitlines() if line.startswith("{")), key=lambda r: r["rank"])
    places = [(report["rank"], report["host"], report["local_rank"]) for report in reports]
    assert places == [(0, "n1", 0), (1, "n1", 1), (2, "n2", 0), (3, "n2", 1)]
    assert {(report["world_size"], report["total"]) for report in reports} == {(4, 10.0)}
