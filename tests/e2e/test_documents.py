"""Every `minitron` command that README and documents show, typed as it stands there, for a model that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.documents import ROOT, Shown, commands
from tests.e2e.chain import write_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# The tiny model's sizes in place of those shown.
VALUES = {
    "train.steps=20": "train.steps=4",
    "train.steps=600": "train.steps=4",
    "train.lr=5e-5": "train.lr=5e-4",
    "data.sequence_length=512": "data.sequence_length=32",
    "prune.num_layers=20": "prune.num_layers=3",
}
CACHED = ["teacher.placement=cached", "distill.intermediate.pairs=[]"]
NEEDS = {"cluster.md", "nemo.md", "search.md"}  # Slurm, NeMo, candidates: tests/slurm, tests/nemo, tests/search


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished tiny run in `run`."""
    directory = tmp_path_factory.mktemp("reader")
    write_recipe(directory, parallel={"pipeline_model_parallel_size": 1}, cluster={"launcher": "none"})
    done = typed(directory, ["run", str(directory / "tiny.yaml")])
    assert done.returncode == 0, done.stderr
    made = python(directory, ["-c", random_weights().replace("runs/quickstart", "run")])
    assert made.returncode == 0, made.stderr
    return directory


def random_weights() -> str:
    """What docs/report.md says makes the baseline's source."""
    text = (ROOT / "docs" / "report.md").read_text()
    [block] = [block for block in text.split("\n\n") if block.startswith("    from transformers")]
    return textwrap.dedent(block)


def typed(directory: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    return python(directory, ["-m", "minitron_nemo.cli", *words])


def python(directory: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        check=False,
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def tiny(word: str, place: Path, number: int) -> str:
    """What stands in a document, as the tiny run calls it."""
    if word.startswith("recipes/tasks/"):
        return str(ROOT / word)
    if word.endswith((".yaml", "RECIPE")):
        return str(place / "tiny.yaml")
    names = {"DIR": "run/distilled", "SRC": "run/teacher", "DST": f"converted_{number}"}
    word = names.get(word, word).replace("runs/quickstart", "run").replace("NAME", "decoder.final_layernorm.weight")
    return str(place / "elsewhere") if word.startswith("/") else VALUES.get(word, word)


SHOWN = [shown for shown in commands("minitron") if Path(shown.document).name not in NEEDS]


@pytest.mark.parametrize(("number", "shown"), list(enumerate(SHOWN)), ids=[str(shown) for shown in SHOWN])
def test_a_command_that_is_shown_works(place: Path, number: int, shown: Shown) -> None:
    words = [tiny(word, place, number) for word in shown.words[1:]]
    if shown.words[1:] == ("verify", "SRC", "DST"):
        words[1:] = ["run/corrected", "run/pruned"]
    if words[0] == "submit" and "--dry-run" not in words:
        words.append("--dry-run")
    if shown.document.endswith("teacher-cache.md"):
        words += CACHED
    done = typed(place, words)
    assert done.returncode == (2 if shown.error else 0), done.stderr
    if shown.error:
        key = shown.error.split(": ")[2]
        assert f"minitron: error: {key}: " in done.stderr
