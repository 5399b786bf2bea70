"""The whole chain on two nodes, as a user submits it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.documents import commands
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
    """Submitted as docs/cluster.md first shows it, with a tiny model under the name of its recipe."""
    in_page = (each.words[1:] for each in commands("minitron") if each.document == "docs/cluster.md")
    shown = next(words for words in in_page if words[0] == "submit" and "--dry-run" not in words)
    assert shown[1] == "recipes/llama31_8b_to_4b_width.yaml"
    (tmp_path / "recipes").mkdir()
    shutil.move(write_recipe(tmp_path), tmp_path / shown[1])
    prepare = minitron(slurm, tmp_path, *shown, *TWO_NODES, "train.steps=3", "cluster.prune_nodes=2")
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


def test_a_recipe_that_does_not_fit_the_job_ends_with_one_line(slurm: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"global_batch_size": 5})
    job = submit(slurm, tmp_path, recipe.name, "parallel.pipeline_model_parallel_size=1")
    ended = slurm.wait(job, 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), slurm.output(job)
    assert slurm.output(job).startswith("minitron: error: ")
    assert slurm.output(job).count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.soak
def test_a_crashed_node_that_slurm_has_not_missed_yet_is_noticed_by_the_job(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, teacher={"correction": {"steps": 0}}, train={"steps": 200, "save_interval": 20, "keep_last": 2}
    )
    with Cluster(slurmd_timeout=600) as slurm:
        job = submit(slurm, tmp_path, recipe.name)
        wait_for_distillation(slurm, job, tmp_path / "run", updates=21)
        slurm.crash("n2")
        slurm.wait_for_output(job, "a node does not answer; requeued (1 of at most 20)", 240)
        assert slurm.job(job)["Restarts"] == "1"


@pytest.mark.soak
@pytest.mark.timeout(3600)  # the real model: minutes on idle cores, much longer beside other work
def test_the_quickstart_recipe_completes_on_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "recipes/quickstart.yaml", "train.steps=3")
    assert slurm.wait(job, 3000)["JobState"] == "COMPLETED", slurm.output(job)
    assert status(tmp_path / "runs" / "quickstart")["state"] == "done"
