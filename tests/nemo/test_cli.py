"""`nemo minitron ...` of the installed package, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from tests.documents import DOCUMENTS, blocks, commands
from tests.importance.synthetic import random_values, scores_from
from tests.tiny import write_tiny_llama


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose run directory has what pruning reads: teacher and scores."""
    source = write_tiny_llama(tmp_path / "source")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    convert(source, run_dir / "teacher", "megatron", progress=False)
    shape = Architecture.load(run_dir / "teacher")
    scores = scores_from(random_values(shape), shape)
    replace(scores, model_fingerprint=fingerprint(run_dir / "teacher")).save(run_dir / "scores.npz")
    (tmp_path / "text.txt").write_text("Nothing here is read.\n")
    path = tmp_path / "recipe.yaml"
    content = {
        "name": "tiny",
        "run_dir": str(run_dir),
        "model": {"source": str(source)},
        "prune": {"hidden_size": 48, "repair": {"ffn": False, "hidden": False}},  # no model runs here
        "data": {"train": [{"path": str(tmp_path / "text.txt")}], "sequence_length": 64},
        "train": {"steps": 1, "global_batch_size": 1},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def nemo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `nemo`, away from the checkout, so that it finds the installed package alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(Path(sys.executable).with_name("nemo")), *arguments]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**environment, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_prune_with_typed_options(recipe: Path, tmp_path: Path) -> None:
    done = nemo("minitron", "prune", f"recipe={recipe}", "recipe.prune.ffn_hidden_size=32", "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    pruned = Architecture.load(tmp_path / "run" / "pruned")
    assert (pruned.hidden_size, pruned.ffn_hidden_size) == (48, 32)


def test_wrong_input_is_said_in_one_line_with_exit_code_2(recipe: Path, tmp_path: Path) -> None:
    done = nemo("minitron", "prune", f"recipe={recipe}", "recipe.prune.ffn_hidden_size=1000", "--yes", cwd=tmp_path)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stderr.splitlines()[-1].startswith("minitron: error: prune.ffn_hidden_size: 1000")


@pytest.mark.parametrize("command", [("minitron", "run"), ("llm", "distill")], ids=" ".join)
def test_help_shows_the_factories(command: tuple[str, str], tmp_path: Path) -> None:
    done = nemo(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("minitron_llama31_4b_width", "minitron_llama31_4b_depth", "minitron_mistral_nemo_8b"):
        assert name in done.stdout


def test_a_factory_is_overridden_on_the_command_line(tmp_path: Path) -> None:
    changes = [f"recipe.run_dir={tmp_path}/run", "recipe.train.lr=5e-5", "recipe.prune.hidden_size=2048"]
    done = nemo("minitron", "plan", "--factory", "minitron_llama31_4b_width", *changes, "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "hidden 2048, ffn 9216" in done.stdout
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["train"]["lr"] == 5e-5


DRY_RUNS = """
import json, sys
from types import SimpleNamespace
from nemo.collections.llm.recipes.run import executor
from nemo_run.cli.api import create_cli
# Its factory asks for GPUs before it reads how many there are to be.
executor.torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True, device_count=lambda: 8))
for words in json.loads(sys.argv[1]):
    print(">", *words, flush=True)
    sys.argv = ["nemo", *words]  # decides which commands the application has
    create_cli()(words, standalone_mode=False)
"""


def test_what_the_documents_show_is_understood(recipe: Path, tmp_path: Path) -> None:
    """NeMo-Run reads every option and makes the task, and stops where it would start it. All in one process: NeMo's
    imports take half a minute."""
    (tmp_path / "4b.yaml").write_text(recipe.read_text())
    shown = [[word.replace("/data", str(tmp_path)) for word in each.words[1:]] for each in commands("nemo")]
    lines = json.dumps([[*words, "--dryrun"] for words in shown])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", DRY_RUNS, lines]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("Dry run for task ") == len(shown), done.stdout[-4000:] + done.stderr[-4000:]


def test_python_of_the_documents_makes_a_task_for_each_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    import nemo_run

    import minitron_nemo.nemo

    runs = []
    monkeypatch.setattr(nemo_run, "run", lambda task, executor: runs.append((task, executor)))
    (page,) = (path for path in DOCUMENTS if path.name == "nemo.md")
    first, *others = ("\n".join(block.lines) for block in blocks(page) if block.language == "python")
    exec(first, {})
    assert [type(executor).__name__ for _, executor in runs] == ["LocalExecutor", "SlurmExecutor"]
    assert {task.recipe.run_dir for task, _ in runs} == {"/data/4b"}
    for text in others:  # what they do is tested in test_training.py and test_importance.py
        used = set(compile(text, str(page), "exec").co_names) & set(dir(minitron_nemo.nemo))
        assert used
