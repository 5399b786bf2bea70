"""What README and documents tell a reader to type exists. That it works is tests/e2e/test_documents.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minitron_nemo.command_line import command_line
from minitron_nemo.config import load_recipe
from tests.documents import DOCUMENTS, ROOT, Shown, commands

TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("shown", commands("minitron"), ids=str)
def test_every_command_is_one_that_the_command_line_takes(shown: Shown) -> None:
    options = command_line().parse_args(shown.words[1:])
    recipe = getattr(options, "recipe", None)
    if recipe is not None and recipe.parts[0] == "recipes":
        load_recipe(ROOT / recipe, options.overrides)


@pytest.mark.parametrize("shown", commands("make"), ids=str)
def test_every_target_exists(shown: Shown) -> None:
    assert TARGETS is not None and shown.words[1] in TARGETS[1].split()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_of_the_repository_that_is_named_exists(document: Path) -> None:
    named = re.findall(r"\b(?:recipes|benchmarks|launch|docker|tests|minitron_nemo)/[\w/]+\.\w+", document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
