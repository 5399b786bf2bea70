"""`minitron submit`: what it says to sbatch, before any Slurm is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_nemo import cli
from tests.e2e.chain import write_recipe

HOME = Path(__file__).parents[2]


def dry_run(capsys: pytest.CaptureFixture[str], recipe: Path, *overrides: str) -> list[str]:
    assert cli.main(["submit", str(recipe), *overrides, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


def test_one_job_runs_the_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert dry_run(capsys, recipe, "train.lr=1e-4") == [
        "sbatch --parsable --job-name=tiny --nodes=1 --ntasks-per-node=2 --signal=USR1@300 "
        f"{HOME}/launch/distill.sh {recipe} train.lr=1e-4"
    ]


def test_the_cluster_section_becomes_options_and_further_ones_come_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_CONTAINER_MOUNTS", "/home/me:/home/me")
    cluster = {
        "nodes": 4,
        "prune_nodes": 1,
        "gpus_per_node": 2,
        "time": "4:00:00",
        "partition": "batch",
        "account": "me",
        "qos": "high",
        "signal_seconds": 600,
        "sbatch": ["--nodes=3", "--comment=two words"],
        "container_mounts": ["/data:/data", "/models:/models:ro"],
    }
    recipe = write_recipe(tmp_path, cluster=cluster, train={"global_batch_size": 12})
    mounts = "MINITRON_CONTAINER_MOUNTS=/data:/data,/models:/models:ro,/home/me:/home/me"
    common = (
        "--ntasks-per-node=2 --signal=USR1@600 --gpus-per-node=2 --time=4:00:00 --partition=batch --account=me "
        "--qos=high --nodes=3 '--comment=two words'"
    )
    assert dry_run(capsys, recipe) == [
        f"{mounts} sbatch --parsable --job-name=tiny --nodes=1 {common} {HOME}/launch/prune.sh {recipe}",
        f"{mounts} sbatch --parsable --job-name=tiny --nodes=4 {common} --dependency=afterok:JOB "
        f"--kill-on-invalid-dep=yes {HOME}/launch/distill.sh {recipe}",
    ]


@pytest.mark.parametrize("within", ["cluster: {nodes: 1, container: img.sqsh}\n", "cluster:\n  container: img.sqsh\n"])
def test_the_container_reaches_the_job_however_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nprintf %s "$MINITRON_CONTAINER" >{tmp_path}/container\necho 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    recipe = write_recipe(tmp_path, parallel={"pipeline_model_parallel_size": 1})
    recipe.write_text(recipe.read_text().partition("cluster:")[0] + within)
    for environment, container in (("", "img.sqsh"), ("site.sqsh", "site.sqsh")):
        monkeypatch.setenv("MINITRON_CONTAINER", environment)
        assert dry_run(capsys, recipe)[0].startswith(f"MINITRON_CONTAINER={container} sbatch --parsable ")
        assert cli.main(["submit", str(recipe)]) == 0
        assert capsys.readouterr().out.startswith("job 7: ")
        assert (tmp_path / "container").read_text() == container


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.gpus_per_node=8", "cluster.gpus_per_node: 8 is not the 2 of cluster.processes_per_node"),
        ("cluster.max_requeues=-1", "cluster.max_requeues: -1 must not be negative"),
        ("cluster.container_mounts=[/data]", "cluster.container_mounts: '/data' is not SRC:DST"),
        ("cluster.prune_nodes=0", "cluster.prune_nodes: 0 must be greater than 0"),
        # Four processes fit, the three of the pruning do not.
        ("cluster={nodes: 2, prune_nodes: 3, processes_per_node: 1}", "3"),
        ("cluster.nodes=1", "sbatch: not found"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    message: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch there
    assert cli.main(["submit", str(write_recipe(tmp_path)), override]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_what_is_not_here_is_not_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\ntouch {tmp_path}/submitted\necho 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    large, tiny = str(HOME / "recipes" / "llama31_8b_to_4b_width.yaml"), str(write_recipe(tmp_path))
    model = "model.source: checkpoints/Llama-3.1-8B is not here; "
    text = "data.train[0].path: nowhere/*.txt is not here; "
    for arguments, missing in (([large], model), ([tiny, "data.train=[{path: nowhere/*.txt}]"], text)):
        assert cli.main(["submit", *arguments]) == 2
        said = capsys.readouterr()
        assert said.err == f"minitron: error: {missing}put it there first (relative paths count from {tmp_path})\n"
        assert said.out == "" and not (tmp_path / "submitted").exists()
    # Only said where nothing is submitted, and where a container may have it.
    assert cli.main(["submit", large, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("sbatch ") and said.err.startswith(f"minitron: warning: {model}without --dry-run")
    assert cli.main(["submit", large, "cluster.container=image.sqsh"]) == 0
    assert capsys.readouterr().err.startswith(f"minitron: warning: {model}a mount has to bring it\n")
    assert (tmp_path / "submitted").exists()
    monkeypatch.setenv("MINITRON_CONTAINER", "null")
    assert cli.main(["submit", large, "cluster.container=image.sqsh"]) == 2


def test_what_sbatch_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert cli.main(["submit", str(write_recipe(tmp_path))]) == 2
    assert capsys.readouterr().err.startswith("minitron: error: sbatch: sbatch: error: invalid partition (of: sbatch ")


def test_the_script_for_login_nodes_submits(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = ["bash", HOME / "launch" / "minitron.sh", recipe, "--dry-run"]
    # For a checkout without .venv: the environment that runs the tests has a `minitron` too.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sbatch --parsable --job-name=tiny ")
