"""`manifest.json`: what every step of a run read, wrote and was configured with.

A step whose key (fingerprints of its inputs + its settings) is recorded and whose output still has the recorded
fingerprint is not run again. The key leaves out what cannot change the result: layouts, intervals, console settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_nemo.checkpoint.files import read_json, write_atomic
from minitron_nemo.errors import UserError

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 1


def step_key(inputs: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Hash of all that decides a step's result."""
    text = json.dumps({"inputs": dict(inputs), "settings": dict(settings)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """sha256 of a file's bytes; the hash of all names and bytes below it for a directory."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


class Manifest:
    """The records of a run directory. Only rank 0 writes it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            data = read_json(self.path, "move the run directory away")
            version, self.steps = data.get("schema_version"), data.get("steps", {})
            if version != SCHEMA_VERSION:
                raise UserError(f"{self.path}: schema_version {version} is not {SCHEMA_VERSION}; use another run_dir")

    def record(self, step: str, entry: Mapping[str, Any]) -> None:
        """Add a finished step; the file is replaced atomically."""
        self.steps[step] = dict(entry)
        write_atomic(self.path, json.dumps({"schema_version": SCHEMA_VERSION, "steps": self.steps}, indent=2) + "\n")

    def done(self, step: str, key: str, output_fingerprint: str | None) -> bool:
        """Whether `step` ran with this key and its output is still what it wrote (None: the output is missing)."""
        entry = self.steps.get(step)
        return entry is not None and entry["key"] == key and entry["output"] == output_fingerprint
