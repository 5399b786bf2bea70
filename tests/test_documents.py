"""What README and documents tell a reader to type is there, and every program of theirs has a test that runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from minitron_nemo.arch import blocks as table_blocks
from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Axis, AxisDim
from minitron_nemo.arch.families import qwen2
from minitron_nemo.arch.tensors import TensorSpec
from minitron_nemo.command_line import command_line
from minitron_nemo.config import Recipe, load_recipe
from tests.documents import DOCUMENTS, PROGRAMS, ROOT, Block, Shown, blocks, commands, shown

# The test that runs a program's commands, whole or as far as it says.
RUN_BY = {
    ".": "tests/test_documents.py",
    "cp": "tests/e2e/test_documents.py",
    "make": "tests/test_documents.py",
    "minitron": "tests/e2e/test_documents.py",
    "nemo": "tests/nemo/test_cli.py",
    "pip": "tests/test_documents.py",
    "pytest": "tests/e2e/test_documents.py",
    "python": "tests/e2e/test_documents.py",
    "sbatch": "tests/slurm/test_launch.py",
    "scancel": "tests/slurm/test_launch.py",
    "tail": "tests/e2e/test_documents.py",
    "tensorboard": "tests/e2e/test_documents.py",
    "torchrun": "tests/e2e/test_documents.py",
}
# Not run: there is no container engine where the tests run, and packages of the system are the reader's. What they
# name is compared with the files of the repository, below.
NOT_RUN = {"docker", "enroot", "sudo"}
MAKEFILE = (ROOT / "Makefile").read_text()
RUN_OF_IMAGE = re.search(r"RUN python -m (pip .*?) \\\n", (ROOT / "docker" / "Dockerfile").read_text())


def test_every_program_that_is_shown_has_a_test() -> None:
    assert {each.words[0] for each in shown()} == RUN_BY.keys() | NOT_RUN
    for program, test in RUN_BY.items():
        assert re.search(rf'(commands|unlike)\([^)]*"{re.escape(program)}"', (ROOT / test).read_text()), program


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_fences_hide_no_command(document: Path) -> None:
    for block in blocks(document):
        assert block.language in ("shell", "yaml", "python", "json", "text"), block
        if block.language != "shell":
            assert [line for line in block.lines if line.split(" ")[0] in PROGRAMS] == [], block


@pytest.mark.parametrize("shown", commands("minitron"), ids=str)
@pytest.mark.fast_cases(20)
def test_every_command_is_one_that_the_command_line_takes(shown: Shown) -> None:
    options = command_line().parse_args(
        ["plan" if word == "VERB" else word for word in shown.words[1:] if word != "..."]
    )
    recipe = getattr(options, "recipe", None)
    if recipe is not None and recipe.parts[0] == "recipes":
        load_recipe(ROOT / recipe, options.overrides)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_verb_that_is_named_is_one(document: Path) -> None:
    (verbs,) = (action.choices for action in command_line()._actions if isinstance(action.choices, dict))
    named = re.findall(r"`minitron ([a-z][a-z-]*)", document.read_text())
    assert [name for name in named if name not in verbs] == []


@pytest.mark.parametrize("shown", dict.fromkeys(commands("make")), ids=str)
def test_a_target_runs_what_is_there(shown: Shown) -> None:
    """CI runs `make test` and `make docs`. `make demo` is what the tutorial shows as `minitron run`."""
    dry_run = ["make", "--always-make", "--dry-run", "--no-print-directory", *shown.words[1:]]
    done = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True)
    tools = re.findall(r"^\.venv/bin/(\S+)", done.stdout, re.MULTILINE)
    assert [name for name in tools if shutil.which(name, path=Path(sys.executable).parent) is None] == []
    assert [path for path in re.findall(r"^bash (\S+)", done.stdout, re.MULTILINE) if not (ROOT / path).exists()] == []
    if shown.words[1] == "demo":
        assert done.stdout.splitlines()[-1] == ".venv/bin/minitron run recipes/quickstart.yaml"


def test_an_environment_without_pip_is_made_anew(tmp_path: Path) -> None:
    """As `python3 -m venv` leaves one on a Debian without python3-venv."""
    (tmp_path / "Makefile").write_text(MAKEFILE)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    broken = tmp_path / ".venv" / "bin" / "python"
    broken.parent.mkdir(parents=True)
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\n[ \"$*\" = '-m venv --clear .venv' ] && ln -sf /bin/true {broken}\n")
    python.chmod(0o755)
    broken.symlink_to("/bin/false")
    subprocess.run(["make", "install", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / ".venv" / ".installed").exists()


@pytest.mark.parametrize("shown", [*commands("."), *(each for each in commands("python") if "venv" in each.words)])
def test_an_environment_is_made_and_entered(tmp_path: Path, shown: Shown) -> None:
    line = " ".join(shown.words).replace("-m venv ", "-m venv --without-pip ").replace(". .venv/", f". {sys.prefix}/")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-ec", f"{line}; command -v python"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent.name == "bin"


@pytest.mark.parametrize("shown", commands("pip"), ids=str)
def test_pip_is_told_what_makefile_and_dockerfile_tell_it(shown: Shown) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if "--no-deps" in shown.words:
        assert RUN_OF_IMAGE is not None
        assert " ".join(shown.words) == RUN_OF_IMAGE[1].replace("--no-cache-dir ", "")
        return
    for word in shown.words[2:]:
        if extra := re.fullmatch(r"\.\[(\w+)\]", word):
            assert extra[1] in extras
        elif word != "-c":
            assert f" {word}\n" in MAKEFILE or f"--constraint {word} '.[nemo]'" in MAKEFILE


@pytest.mark.parametrize("shown", commands("docker", "enroot"), ids=str)
def test_images_are_made_of_files_that_say_the_same(shown: Shown) -> None:
    if shown.words[0] == "docker":
        file = ROOT / shown.words[shown.words.index("-f") + 1]
        assert f"#   {' '.join(shown.words)}\n" in file.read_text()
    else:
        built = {each.words[each.words.index("-t") + 1] for each in commands("docker")}
        assert shown.words[-1].removeprefix("dockerd://") in built


def test_both_pages_name_the_same_packages_of_the_system() -> None:
    asked = {each.words for each in commands("sudo")}
    assert asked == {("sudo", "apt", "install", "python3-venv", "make", "git")}


RECIPES = [block for document in DOCUMENTS for block in blocks(document) if block.language == "yaml"]


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_a_piece_of_a_recipe_has_keys_and_types_of_one(block: Block) -> None:
    OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.create("\n".join(block.lines)))


def test_the_table_of_a_family_that_is_shown_is_one() -> None:
    line, table = (block for block in blocks(ROOT / "docs" / "family.md") if block.language == "python")
    names: dict[str, Any] = {"TensorSpec": TensorSpec, "AxisDim": AxisDim, "Axis": Axis, "pieces": None}
    there = table_blocks.mlp_output()
    spec = eval("\n".join(line.lines), names)
    assert (spec.name, spec.dims, spec.tp_dim, spec.part) == (there.name, there.dims, there.tp_dim, there.part)
    names = {**vars(qwen2)}
    exec("\n".join(table.lines), names)
    shape = Architecture(
        family="qwen2",
        model_type="qwen2",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=259,
        max_position_embeddings=512,
    )
    assert [spec.name for spec in names["table"](shape)] == [spec.name for spec in qwen2.table(shape)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_of_the_repository_that_is_named_exists(document: Path) -> None:
    named = re.findall(r"\b(?:recipes|benchmarks|launch|docker|tests|minitron_nemo)/[\w/]+\.\w+", document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
