"""What README and documents show, as a reader would copy it: commands, Python, pieces of recipes.

An indented block is typed into a shell, or is a piece of a recipe where its first word ends with a colon. All other
blocks are fenced, with their language.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# The tutorial first: it makes the run that the other pages are about.
DOCUMENTS = (
    ROOT / "docs" / "tutorial.md",
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "tutorial.md"),
)
# What a command within a sentence begins with. In a block any word may.
PROGRAMS = {"docker", "enroot", "make", "minitron", "nemo", "pip", "pytest", "python", "sbatch", "scancel", "sudo"}
PROGRAMS |= {"tensorboard", "torchrun"}
INDENT = "    "


class Block(NamedTuple):
    """A code block: its document, the number of its first line, its language (`shell`, `yaml`, ...) and its lines."""

    document: Path
    start: int
    language: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document.name}:{self.start}"


class Shown(NamedTuple):
    """A command line of a document, and the error that the document says it ends in."""

    document: str
    line: int
    words: tuple[str, ...]
    error: str | None

    def __str__(self) -> str:
        return f"{Path(self.document).name}: {' '.join(self.words)}"


def blocks(document: Path) -> Iterator[Block]:
    """The code blocks of a document in their order."""
    lines = document.read_text().splitlines()
    start = 0
    while start < len(lines):
        end, opening = start + 1, lines[start]
        if opening.startswith("```"):
            while lines[end] != "```":
                end += 1
            yield Block(document, start + 1, opening[3:], tuple(lines[start + 1 : end]))
            end += 1
        elif opening.startswith(INDENT) and (start == 0 or lines[start - 1] == ""):
            while end < len(lines) and lines[end].startswith(INDENT):
                end += 1
            language = "yaml" if opening.split()[0].endswith(":") else "shell"
            yield Block(document, start, language, tuple(line.removeprefix(INDENT) for line in lines[start:end]))
        start = end


def shown() -> list[Shown]:
    """Every command of every document, those within sentences included, in the order of reading."""
    found = []
    for document in DOCUMENTS:
        name, here = str(document.relative_to(ROOT)), list(blocks(document))
        inside = {block.start + number for block in here for number in range(len(block.lines))}
        of_document = [each for block in here if block.language == "shell" for each in _typed(name, block, here)]
        for number, line in enumerate(document.read_text().splitlines()):
            if number not in inside:
                of_document += [Shown(name, number, words, None) for words in _within(line)]
        found += sorted(of_document, key=lambda each: each.line)
    return found


def commands(*programs: str) -> list[Shown]:
    """Those that begin with one of `programs`."""
    return [each for each in shown() if each.words[0] in programs]


def _typed(name: str, block: Block, all_blocks: list[Block]) -> Iterator[Shown]:
    """A block's command lines, without the remarks behind them; a backslash goes on in the next line."""
    after = all_blocks[all_blocks.index(block) + 1 :]
    below = after[0].lines if after and after[0].start - block.start < len(block.lines) + 3 else ()
    error = next((line for line in below if line.startswith("minitron: error: ")), None)
    text, begun = "", block.start
    for number, line in enumerate(block.lines):
        text += line.strip().partition("   ")[0]
        if text.endswith("\\"):
            text = text[:-1]
            continue
        yield Shown(name, begun, tuple(shlex.split(text, comments=True)), error)
        text, begun = "", block.start + number + 1


def _within(line: str) -> Iterator[tuple[str, ...]]:
    """The commands in a line of text. One that is only named, without what it is to work on, is none."""
    for code in re.findall(r"`([^`]+)`", line):
        if code.split()[0] not in PROGRAMS or "..." in code:
            continue
        words = tuple(shlex.split(re.sub(r"\[(--.*)\]", r"\1", code)))  # what may be left out is tried, too
        named = {"minitron": 2, "nemo": 3, "sbatch": 2, "scancel": 2}.get(words[0], 1)
        if len(words) > named and (words[0] != "minitron" or not words[2].startswith("-")):
            yield words
