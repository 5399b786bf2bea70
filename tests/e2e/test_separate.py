"""The chain with a teacher on a process of its own: stopped early, a teacher killed, and on to the end."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.chain import Command, write_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def process_of_rank(command: Command, rank: int) -> psutil.Process:
    [found] = [
        process
        for process in psutil.Process(command.process.pid).children()
        if process.environ().get("RANK") == str(rank)
    ]
    return found


def test_the_chain_stops_survives_its_teachers_death_and_ends(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        teacher={"correction": {"steps": 0}, "placement": "separate", "processes": 1, "layout": {}},
        train={"steps": 20, "save_interval": 1, "hang_timeout": 60},
        parallel={"pipeline_model_parallel_size": 1},
    )
    run = tmp_path / "run"

    stopped = Command(tmp_path / "stopped", "run", str(recipe))
    stopped.wait_for(lambda: "[distill] ->" in stopped.output)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75, stopped.output
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"

    killed = Command(tmp_path / "killed", "run", str(recipe))
    killed.wait_for(lambda: list(run.glob("training/distilled-*/iter_*2")))
    process_of_rank(killed, 1).kill()
    start = time.monotonic()
    assert killed.wait() == 1, killed.output
    assert time.monotonic() - start < 30

    last = Command(tmp_path / "last", "run", str(recipe))
    assert last.wait() == 0, last.output
    assert "resumed after update" in last.output
    manifest = json.loads((run / "manifest.json").read_text())["steps"]
    assert manifest["distill"]["processes"] == 2
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["distilled"]["delta_vs_pruned"] < -2 * evaluation["distilled"]["delta_vs_pruned_se"]
    [metrics] = run.glob("training/distilled-*/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["iteration"] for record in records if "train/loss" in record] == list(range(1, 21))
    assert all(record["teacher/wait_seconds"] >= 0 for record in records if "train/loss" in record)
    # The held-out documents are measured without the teacher, which is not on the student's ranks.
    measured = [record for record in records if "validation/loss" in record]
    assert measured and all("validation/kl_to_teacher" not in record for record in measured)
