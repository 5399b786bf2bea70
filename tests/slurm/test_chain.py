"""The whole chain on two nodes, as a user submits it; stopped and submitted again."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.chain import write_recipe
from tests.slurm.cluster import PATH, Cluster

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(900)


def submit(slurm: Cluster, directory: Path, recipe: Path | str, *overrides: str) -> int:
    # For a checkout without .venv: the environment that runs the tests has a `minitron` too.
    env = {"PATH": f"{Path(sys.executable).parent}:{PATH}", "OMP_NUM_THREADS": "1"}
    script = REPOSITORY / "launch" / "distill.sh"
    return slurm.sbatch(script, str(recipe), *overrides, cwd=directory, env=env)


def status(run: Path) -> dict[str, Any]:
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {"state": None, "step": None, "iteration": None}


def test_the_chain_completes_on_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    job = submit(slurm, tmp_path, recipe.name, "train.steps=3")
    assert slurm.wait(job, 300)["JobState"] == "COMPLETED", slurm.output(job)
    run = tmp_path / "run"
    assert status(run)["state"] == "done"
    manifest = json.loads((run / "manifest.json").read_text())["steps"]
    assert {step["processes"] for step in manifest.values()} == {2}
    assert json.loads((run / "evaluation.json").read_text())["distilled"]["loss"] > 0
    assert (run / "export" / "hf" / "model.safetensors").exists()


def test_a_signalled_job_saves_and_the_next_one_goes_on(slurm: Cluster, tmp_path: Path) -> None:
    steps = 120
    recipe = write_recipe(
        tmp_path, teacher={"correction": {"steps": 0}}, train={"steps": steps, "save_interval": steps}
    )
    run = tmp_path / "run"
    job = submit(slurm, tmp_path, recipe.name)
    deadline = time.monotonic() + 240
    while (now := status(run))["step"] != "distill" or (now["iteration"] or 0) < 2:
        assert slurm.job(job)["JobState"] in ("PENDING", "RUNNING"), slurm.output(job)
        assert time.monotonic() < deadline, slurm.output(job)
        time.sleep(0.1)
    slurm.run("scancel", "--signal=USR1", str(job))
    state = slurm.wait(job, 120)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "75:0"), slurm.output(job)
    stopped = status(run)
    assert stopped["state"] == "stopped"
    assert 2 <= stopped["iteration"] < steps

    job = submit(slurm, tmp_path, recipe.name)
    assert slurm.wait(job, 300)["JobState"] == "COMPLETED", slurm.output(job)
    assert status(run)["state"] == "done"
    assert "[calibrate] unchanged, not run again" in slurm.output(job)
    assert f"resumed after update {stopped['iteration']} " in slurm.output(job)


@pytest.mark.soak
def test_the_quickstart_recipe_completes_on_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "recipes/quickstart.yaml", "train.steps=3")
    assert slurm.wait(job, 3000)["JobState"] == "COMPLETED", slurm.output(job)
    assert status(tmp_path / "runs" / "quickstart")["state"] == "done"
