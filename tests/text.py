"""English that every Python carries: the docstrings of the standard library, as text files."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path


def write_documents(directory: Path, count: int = 60) -> Path:
    """Write `count` modules' docstrings (each >= 600 characters) as .txt files; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    written = 0
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(module.read_text(encoding="utf-8"))
        nodes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef))]
        text = "\n\n".join(docstring for node in nodes if (docstring := ast.get_docstring(node)))  # type: ignore[arg-type]
        if len(text) >= 600:
            (directory / f"{module.stem}.txt").write_text(text)
            written += 1
        if written == count:
            return directory
    raise AssertionError(f"only {written} documents")
