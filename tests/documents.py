"""The commands that README and documents show, as a reader would copy them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))


class Shown(NamedTuple):
    """A command line of a document, and the error that the document says it ends in."""

    document: str
    words: tuple[str, ...]
    error: str | None

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.words)}"


def commands(program: str) -> list[Shown]:
    """Every line of a code block that begins with `program`, without the remark behind it."""
    shown = []
    for document in DOCUMENTS:
        lines = document.read_text().splitlines()
        for number, line in enumerate(lines):
            if not line.startswith(f"    {program} "):
                continue
            command = line.strip().partition("   ")[0]
            while command.endswith("\\"):
                number += 1
                command = command[:-1] + lines[number].strip()
            below = [text.strip() for text in lines[number + 1 : number + 3]]
            error = next((text for text in below if text.startswith("minitron: error: ")), None)
            words = tuple(shlex.split(command, comments=True))
            shown.append(Shown(str(document.relative_to(ROOT)), words, error))
    return shown
