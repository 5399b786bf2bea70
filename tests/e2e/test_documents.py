"""Every command that README and documents show, typed as it stands there, and every piece of Python.

Commands that only plan take the recipes that ship. All others find a tiny model's recipe under the names of those
recipes. What needs Slurm is typed in tests/slurm, what needs NeMo in tests/nemo; tests/test_documents.py has a list of
all programs.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT, Block, Shown, blocks, commands
from tests.e2e.chain import write_recipe

TUTORIAL = ROOT / "docs" / "tutorial.md"
REPORT = ROOT / "docs" / "report.md"
METRICS = ROOT / "docs" / "observability.md"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# The tiny model's sizes in place of those shown.
VALUES = {
    "train.steps=20": "train.steps=4",
    "train.steps=600": "train.steps=4",
    "train.lr=5e-5": "train.lr=5e-4",
    "data.sequence_length=512": "data.sequence_length=32",
    "parallel.context_parallel_size=2": "parallel.context_parallel_size=1",  # which asks for no TransformerEngine
    "prune.num_layers=20": "prune.num_layers=3",
    "prune.num_layers=32": "prune.num_layers=3",
    "prune.hidden_size=4096": "prune.hidden_size=48",
    "search.num_layers=[20,24,30]": "search.num_layers=[3,4]",
    "search.hidden_size=[504,576]": "search.hidden_size=[48,64]",
    "search.ffn_hidden_size=[864,1048,1200,1536]": "search.ffn_hidden_size=[64,96]",
    "search.budget={min_non_embedding_parameters: 69.0e+6, max_non_embedding_parameters: 73.0e+6}": (
        "search.budget={min_non_embedding_parameters: 50.0e+3, max_non_embedding_parameters: 100.0e+3}"
    ),
    "search.rungs=[10,20]": "search.rungs=[1,2]",
    "prune.calibration.samples=64": "prune.calibration.samples=4",
    "prune.calibration.samples=512": "prune.calibration.samples=4",
    "prune.calibration.first_sample=512": "prune.calibration.first_sample=4",
    "hellaswag": str(ROOT / "recipes" / "tasks" / "opposites.jsonl"),  # a task whose data is at hand
}
# What stands for something of the reader's own.
PLACEHOLDERS = {
    "RECIPE": "recipes/quickstart.yaml",
    "checkpoints/Llama-3.1-8B": "runs/quickstart/export/hf",
    "R.yaml": "recipes/quickstart.yaml",
    "recipe.yaml": "recipes/quickstart.yaml",
    "DIR": "runs/quickstart/distilled",
    "SRC": "runs/quickstart/teacher",
    "RUN": "runs/quickstart",
    "OTHER": "runs/depth",  # the tutorial's second run
    "FILE": "recipes/tasks/opposites.jsonl",
    "NAME": "decoder.final_layernorm.weight",
    "VERB": "plan",
    "A.npz": "first.npz",  # of the commands in docs/recipe.md
    "B.npz": "second.npz",
    "RUN/recipe.yaml": "runs/quickstart/recipe.yaml",
    "RUN/training": "runs/quickstart/training",
    "/data/4b/distilled": "runs/quickstart/distilled",
    "/data/that-nemo": "4b-nemo",  # as if NeMo had trained what was converted before
}
CACHED = ["teacher.placement=cached", "distill.intermediate.pairs=[]"]
STAGED = ["stages={minitron_4b: {prune: {ffn_hidden_size: 48}}}"]

# An interpreter that has imported what `minitron` imports; every command is a fork of it.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["minitron_nemo.search.driver", "minitron_nemo.verification", __name__])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the tutorial's first run is done, by a tiny model."""
    directory = tmp_path_factory.mktemp("reader")
    tiny = write_recipe(
        directory,
        parallel={"pipeline_model_parallel_size": 1},
        cluster={"launcher": "none"},
        data={"heldout_fraction": 0.4},  # enough for questions
        search={"ffn_hidden_size": [48, 64], "rungs": [2], "serving": {"prompt_tokens": 16, "new_tokens": 4}},
    )
    recipes = directory / "recipes"
    recipes.mkdir()
    (recipes / "tasks").symlink_to(ROOT / "recipes" / "tasks")
    text = tiny.read_text().replace("name: tiny", "name: quickstart").replace(f"run_dir: {directory / 'run'}\n", "")
    for shipped in (ROOT / "recipes").glob("*.yaml"):
        (recipes / shipped.name).write_text(text)
    done = typed(directory, ["run", "recipes/quickstart.yaml"])
    assert done.returncode == 0, done.stdout
    [random_weights] = [block for block in blocks(REPORT) if block.language == "python"]
    made = forked(directory, _python, ["\n".join(random_weights.lines)])
    assert made.returncode == 0, made.stdout
    return directory


def typed(directory: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """`minitron WORDS` in a directory."""
    return forked(directory, _minitron, words)


def forked(directory: Path, work: Callable[..., None], words: list[str]) -> subprocess.CompletedProcess[str]:
    """`work` in a process of its own, with these arguments of the command line; all that it printed is in `stdout`."""
    printed = directory / "printed.txt"
    process = _forks.Process(target=_with_arguments, args=(directory, printed, work, words))  # type: ignore[attr-defined]
    process.start()
    process.join(240)
    if process.exitcode is None:
        process.kill()
        process.join()
    return subprocess.CompletedProcess(words, process.exitcode, printed.read_text())


def _with_arguments(directory: Path, printed: Path, work: Callable[..., None], words: list[str]) -> None:
    os.chdir(directory)
    file = os.open(printed, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = words
    work()


def _minitron() -> None:
    from minitron_nemo.cli import main

    sys.argv.insert(0, "minitron")
    sys.exit(main())


def _python() -> None:
    exec(sys.argv[0], {})


def tiny(word: str, number: int) -> str:
    """What stands in a document, as the tiny run calls it."""
    word = PLACEHOLDERS.get(word, VALUES.get(word, word)).replace("runs/NAME/", "runs/quickstart/")
    return f"converted_{number}" if word in ("DST", "/data/that") else word.removeprefix("/data/")


def unlike(*programs: str) -> list[Shown]:
    """The commands of these programs, each once. Calibration passes are merged when there are two."""
    all_shown = {each.words: each for each in commands(*programs)}
    return sorted(all_shown.values(), key=lambda each: each.words[:2] == ("minitron", "merge-scores"))


def only_plans(shown: Shown) -> bool:
    return shown.words[1] in ("plan", "submit") and shown.words[2].startswith("recipes/")


SHOWN = unlike("minitron", "cp", "tail")


@pytest.mark.parametrize(("number", "shown"), list(enumerate(SHOWN)), ids=map(str, SHOWN))
def test_a_command_that_is_shown_works(place: Path, tmp_path: Path, number: int, shown: Shown) -> None:
    directory, words = place, [tiny(word, number) for word in shown.words[1:] if word != "..."]
    if shown.words[0] != "minitron":
        subprocess.run([shown.words[0], *words], cwd=place, check=True)
        return
    if only_plans(shown):
        directory, words = tmp_path, list(shown.words[1:])
        (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    if shown.words[1:] == ("verify", "SRC", "DST"):
        words[1:] = ["runs/quickstart/corrected", "runs/quickstart/pruned"]
    if words[0] == "submit" and "--dry-run" not in words:
        words.append("--dry-run")
    if "cache-teacher" in words or shown.document.endswith("teacher-cache.md"):
        words += CACHED
    if "--stage" in words:
        words += STAGED
    done = typed(directory, words)
    assert done.returncode == (2 if shown.error else 0), done.stdout
    if shown.error:
        assert shown.error in done.stdout.splitlines()


TORCHRUN = unlike("torchrun")
OURS = [shown for shown in TORCHRUN if "minitron_nemo.cli" in shown.words]


@pytest.mark.parametrize("shown", OURS, ids=str)
def test_a_job_of_torchrun_works(place: Path, shown: Shown) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", *(tiny(word, 0) for word in shown.words[1:])]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


BENCHMARKS = [shown for shown in unlike("python", "torchrun") if "venv" not in shown.words and shown not in OURS]


@pytest.mark.parametrize("shown", BENCHMARKS, ids=str)
def test_a_benchmark_starts_with_the_options_that_are_shown(tmp_path: Path, shown: Shown) -> None:
    """They take minutes to hours: each is run to where its options are read, or where it joins a job."""
    words = list(shown.words[1:])
    if shown.words[0] == "torchrun":
        from torch.distributed.run import parse_args

        options = parse_args(words)
        words = [options.training_script, *options.training_script_args]
    done = forked(tmp_path, _benchmark, words)
    assert done.stdout.splitlines()[-1:] == ["begins"], done.stdout


def _benchmark() -> None:
    from minitron_nemo.parallel import launch

    read = argparse.ArgumentParser.parse_args

    def begins(*unused: Any) -> None:
        print("begins", flush=True)
        os._exit(0)

    def read_and_begin(parser: argparse.ArgumentParser) -> None:
        read(parser)
        begins()

    argparse.ArgumentParser.parse_args = read_and_begin  # type: ignore[assignment, method-assign]
    launch.join_job = begins  # type: ignore[assignment]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        if sys.argv[0].startswith("tests."):  # no options, no job
            assert hasattr(importlib.import_module(sys.argv[0]), "_table")
            begins()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


@pytest.mark.parametrize("shown", unlike("pytest"), ids=str)
def test_the_tests_that_are_named_are_there(tmp_path: Path, shown: Shown) -> None:
    words = [str(ROOT / word) if word.startswith("tests/") else word for word in shown.words[1:]]
    done = forked(tmp_path, _collect, words)
    assert done.returncode == 0, done.stdout


def _collect() -> None:
    sys.exit(pytest.main([*sys.argv, "--collect-only", "-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]))


@pytest.mark.parametrize("shown", unlike("tensorboard"), ids=str)
def test_tensorboard_takes_the_directory(place: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it then shows is compared in tests/distillation/test_display.py."""
    from tensorboard.program import TensorBoard

    monkeypatch.chdir(place)
    board = TensorBoard()
    board.configure(argv=[tiny(word, 0) for word in shown.words])
    assert list(Path(board.flags.logdir).rglob("events.out.tfevents.*"))


PYTHON = [block for block in (*blocks(TUTORIAL), *blocks(METRICS)) if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_that_is_shown_runs(place: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    metrics, *_ = (place / "runs/quickstart/training").glob("distilled-*/metrics.jsonl")
    text = re.sub(r"RUN/training/distilled-\w+/metrics.jsonl", str(metrics), "\n".join(block.lines))
    exec(text, {})
