"""Bad input gets one clear line and exit code 2, and nothing is left half-written under a final name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import load_recipe
from minitron_nemo.errors import UserError
from minitron_nemo.steps import inputs_of
from tests.e2e.chain import refusal
from tests.pool import run_distributed
from tests.test_command_line import chain_steps
from tests.tiny import write_tiny_llama


def refused_by_process(*arguments: str) -> str:
    """As `refused`, in a process of its own, for commands that join a job."""
    command = [sys.executable, "-m", "minitron_nemo.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2, result.stdout + result.stderr
    return refusal(result.stderr)


@pytest.mark.slow
def test_a_recipe_for_gpus_computes_on_them_and_converts_anywhere(tmp_path: Path, recipe: Path) -> None:
    overrides = ("cluster.gpu=h100-80gb", f"run_dir={tmp_path / 'run'}")
    said = refused_by_process("calibrate", str(recipe), *overrides)
    assert said.endswith("cluster.gpus_per_node, or set cluster.gpu=null to compute on the CPU")
    command = [sys.executable, "-m", "minitron_nemo.cli", "convert", str(recipe), *overrides]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "run" / "teacher" / "architecture.json").is_file()


@pytest.mark.e2e
def test_an_empty_data_file_is_named(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    broken = yaml.safe_load(recipe.read_text())
    broken["data"]["train"] = [{"path": str(tmp_path / "empty.jsonl")}]
    broken["run_dir"] = str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(broken))
    assert "empty.jsonl" in refused_by_process("run", str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "run" / "data" / "prepared.json").exists()


@pytest.mark.e2e
def test_a_step_says_which_step_comes_before_it(tmp_path: Path, recipe: Path) -> None:
    said = refused_by_process("distill", str(recipe), f"run_dir={tmp_path / 'fresh'}")
    assert said.endswith("corrected: not there, but distill reads it as its teacher; run correct first")


@pytest.mark.e2e
def test_every_input_that_is_missing_is_laid_to_the_step_that_makes_it(recipe: Path) -> None:
    steps = run_distributed(1, chain_steps, load_recipe(recipe, ["evaluate.tasks=[hellaswag]"]))[0]
    makers = {}
    for step in steps:
        for name, path in step.inputs.items():
            with pytest.raises(UserError) as error:
                inputs_of(replace(step, inputs={name: path}), steps)
            makers[step.name, name] = str(error.value).rpartition("; ")[2]
    said = {
        ("prepare", "tokenizer"): "convert",
        ("correct", "teacher"): "convert",
        ("correct", "data"): "prepare",
        ("calibrate", "source"): "correct",
        ("score-depth", "data"): "prepare",
        ("repair", "scores"): "calibrate",
        ("repair", "depth"): "score-depth",
        ("prune", "plan"): "repair",
        ("distill", "pruned"): "prune",
        ("evaluate", "distilled"): "distill",
        ("tasks", "source"): "convert",
        ("report", "evaluation"): "evaluate",
        ("report", "tasks"): "tasks",
    }
    assert {key: makers[key] for key in said} == {key: f"run {maker} first" for key, maker in said.items()}
    assert makers["report", "recipe"] == "put it there first"  # no step's, but the start's


@pytest.mark.e2e
@pytest.mark.parametrize("launcher", ["none", "local"])
def test_a_run_directory_that_cannot_be_written_to_is_refused(tmp_path: Path, recipe: Path, launcher: str) -> None:
    (tmp_path / "file").touch()
    said = refused_by_process(
        "run", str(recipe), f"run_dir={tmp_path / 'file' / 'run'}", f"cluster.launcher={launcher}"
    )
    assert f"run_dir {tmp_path / 'file' / 'run'}: cannot be written to (Not a directory); choose another one" in said


@pytest.mark.e2e
def test_a_job_of_another_size_than_the_layout_is_refused_before_any_step(tmp_path: Path, recipe: Path) -> None:
    said = refused_by_process(
        "run", str(recipe), f"run_dir={tmp_path / 'run'}", "parallel.pipeline_model_parallel_size=2"
    )
    assert "tp=1 pp=2 needs a multiple of 2 processes, and this job has 1" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.e2e
def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path, recipe: Path) -> None:
    run = tmp_path / "run"
    convert(write_tiny_llama(tmp_path / "teacher", vocab_size=300), run / "teacher", "megatron")
    convert(write_tiny_llama(tmp_path / "student"), run / "pruned", "megatron")
    (run / "data").mkdir()
    (run / "data" / "prepared.json").write_text("{}")
    said = refused_by_process("distill", str(recipe), f"run_dir={run}", "teacher.correction.steps=0")
    assert f"{run / 'pruned'}: vocab_size 259 is not the 300 of {run / 'teacher'}" in said


def test_damaged_sources_leave_nothing_under_the_final_name(refused: Callable[..., str], tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused("convert", str(model), str(tmp_path / "out"), "--to", "megatron")
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_a_second_job_on_the_same_run_directory_is_refused(tmp_path: Path, recipe: Path) -> None:
    import fcntl

    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use" in refused_by_process("run", str(recipe), f"run_dir={run}")


@pytest.mark.e2e
def test_a_full_disk_ends_a_step_with_one_line_and_the_next_start_goes_on(recipe: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        arguments = [str(recipe), f"run_dir={disk}/run"]
        subprocess.run([sys.executable, "-m", "minitron_nemo.cli", "convert", *arguments], timeout=120, check=True)
        prepare = [sys.executable, "-m", "minitron_nemo.cli", "prepare", *arguments]
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        result = subprocess.run(prepare, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
        said = [line for line in result.stderr.splitlines() if line.startswith("minitron: ")]
        assert len(said) == 1 and said[0].startswith(f"minitron: failed: {disk}/run"), result.stderr
        assert said[0].endswith(": No space left on device; make room and start again, and it goes on")
        filler.unlink()
        result = subprocess.run(prepare, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        assert "[prepare] done" in result.stdout
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
