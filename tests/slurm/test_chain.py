"""The whole chain on two nodes, as a user submits it; stopped, it goes on by itself."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.chain import write_recipe
from tests.slurm.cluster import PATH, Cluster

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(900)


# For a checkout without .venv: the environment that runs the tests has a `minitron` too.
ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:{PATH}", "OMP_NUM_THREADS": "1"}
TWO_NODES = ("cluster.nodes=2", "cluster.processes_per_node=1")


def minitron(slurm: Cluster, directory: Path, *arguments: str) -> str:
    return slurm.run("minitron", *arguments, cwd=directory, env=ENVIRONMENT, timeout=120)


def submit(slurm: Cluster, directory: Path, recipe: Path | str, *overrides: str) -> int:
    return slurm.sbatch(REPOSITORY / "launch" / "distill.sh", str(recipe), *overrides, cwd=directory, env=ENVIRONMENT)


def status(run: Path) -> dict[str, Any]:
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {"state": None, "step": None, "iteration": None}


def wait_for_distillation(slurm: Cluster, job: int, run: Path, updates: int = 2) -> None:
    deadline = time.monotonic() + 240
    while (now := status(run))["step"] != "distill" or (now["iteration"] or 0) < updates:
        assert slurm.job(job)["JobState"] in ("PENDING", "RUNNING"), slurm.output(job)
        assert time.monotonic() < deadline, slurm.output(job)
        time.sleep(0.1)


def test_the_chain_completes_on_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    prepare = minitron(slurm, tmp_path, "submit", recipe.name, *TWO_NODES, "train.steps=3", "cluster.prune_nodes=2")
    pruning, job = (int(line.split()[1].rstrip(":")) for line in prepare.splitlines() if line.startswith("job "))
    assert slurm.wait(job, 300)["JobState"] == "COMPLETED", slurm.output(pruning) + slurm.output(job)
    assert "[prune] done" in slurm.output(pruning)
    assert "[distill]" not in slurm.output(pruning)
    assert "[prune] unchanged, not run again" in slurm.output(job)
    run = tmp_path / "run"
    assert {path.name for path in (run / "logs").iterdir()} == {f"{n}-{r}.log" for n in (pruning, job) for r in (0, 1)}
    assert status(run)["state"] == "done"
    manifest = json.loads((run / "manifest.json").read_text())["steps"]
    assert {step["processes"] for step in manifest.values()} == {2}
    assert json.loads((run / "evaluation.json").read_text())["distilled"]["loss"] > 0
    assert (run / "export" / "hf" / "model.safetensors").exists()


def test_a_signalled_job_saves_and_goes_on_by_itself(slurm: Cluster, tmp_path: Path) -> None:
    steps = 120
    recipe = write_recipe(
        tmp_path, teacher={"correction": {"steps": 0}}, train={"steps": steps, "save_interval": steps}
    )
    run = tmp_path / "run"
    job = submit(slurm, tmp_path, recipe.name)
    wait_for_distillation(slurm, job, run)
    slurm.run("scancel", "--signal=USR1", str(job))
    slurm.wait_for_output(job, "requeued (1 of at most 20)", 120)
    stopped = status(run)
    assert stopped["state"] == "stopped"
    assert 2 <= stopped["iteration"] < steps

    ended = slurm.wait(job, 300)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), slurm.output(job)
    assert status(run)["state"] == "done"
    assert "[calibrate] unchanged, not run again" in slurm.output(job)
    assert f"resumed after update {stopped['iteration']} " in slurm.output(job)


def test_a_recipe_that_does_not_fit_the_job_ends_with_one_line(slurm: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"global_batch_size": 5})
    job = submit(slurm, tmp_path, recipe.name, "parallel.pipeline_model_parallel_size=1")
    ended = slurm.wait(job, 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), slurm.output(job)
    assert slurm.output(job).startswith("minitron: error: ")
    assert slurm.output(job).count("\n") == 1
    assert not (tmp_path / "run").exists()


def crash_in_distillation(slurm: Cluster, directory: Path) -> int:
    """Crash the second node of a job in the middle of the distillation; the job."""
    steps = 200
    recipe = write_recipe(
        directory, teacher={"correction": {"steps": 0}}, train={"steps": steps, "save_interval": 20, "keep_last": 2}
    )
    run = directory / "run"
    script = REPOSITORY / "launch" / "distill.sh"
    job = slurm.sbatch("--partition=spare", script, recipe.name, cwd=directory, env=ENVIRONMENT)
    wait_for_distillation(slurm, job, run, updates=21)
    assert slurm.job(job)["NodeList"] == "n[1-2]"
    slurm.crash("n2")
    return job


@pytest.mark.soak
def test_a_node_that_crashes_in_the_middle_of_a_step_costs_the_work_since_the_last_checkpoint(
    slurm: Cluster, tmp_path: Path
) -> None:
    job = crash_in_distillation(slurm, tmp_path)  # Slurm notices first, and requeues
    ended = slurm.wait(job, 420)
    slurm.restart("n2")
    assert (ended["JobState"], ended["NodeList"]) == ("COMPLETED", "n[1,3]"), slurm.output(job)
    assert status(tmp_path / "run")["state"] == "done"
    assert re.search(r"resumed after update \d+0 ", slurm.output(job)), slurm.output(job)


@pytest.mark.soak
def test_a_crashed_node_that_slurm_has_not_missed_yet_is_noticed_by_the_job(tmp_path: Path) -> None:
    with Cluster(slurmd_timeout=600) as slurm:
        job = crash_in_distillation(slurm, tmp_path)
        slurm.wait_for_output(job, "a node does not answer; requeued (1 of at most 20)", 240)
        assert slurm.job(job)["Restarts"] == "1"


@pytest.mark.soak
def test_a_run_goes_on_with_fewer_nodes(slurm: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        teacher={"correction": {"steps": 0}},
        train={"steps": 120, "save_interval": 120},
        parallel={"pipeline_model_parallel_size": 1},
    )
    run = tmp_path / "run"
    job = submit(slurm, tmp_path, recipe.name, "cluster.max_requeues=0")
    wait_for_distillation(slurm, job, run)
    slurm.run("scancel", "--signal=USR1", str(job))
    assert slurm.wait(job, 120)["ExitCode"] == "75:0", slurm.output(job)
    stopped = status(run)["iteration"]
    script = REPOSITORY / "launch" / "distill.sh"
    job = slurm.sbatch("--nodes=1", script, recipe.name, cwd=tmp_path, env=ENVIRONMENT)
    assert slurm.wait(job, 300)["JobState"] == "COMPLETED", slurm.output(job)
    assert f"resumed after update {stopped} " in slurm.output(job)


@pytest.mark.soak
def test_the_quickstart_recipe_completes_on_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "recipes/quickstart.yaml", "train.steps=3")
    assert slurm.wait(job, 3000)["JobState"] == "COMPLETED", slurm.output(job)
    assert status(tmp_path / "runs" / "quickstart")["state"] == "done"
