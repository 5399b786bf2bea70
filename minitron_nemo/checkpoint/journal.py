"""What an interrupted `transform` has finished, beside the parts themselves.

    NAME.partial/.parts/transform.json    what is being made of what
    NAME.partial/.parts/7.json            part 7 is on the disk: where its blocks lie, their hashes

A part is recorded after its bytes are on the disk. The next start goes on if it is to make the same of the same: source
files of the same names, sizes and times, the same Plan, format and data types, the same version of this package.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import minitron_nemo
from minitron_nemo.arch import Plan
from minitron_nemo.checkpoint import blocks, fingerprint
from minitron_nemo.checkpoint.files import fsync, make_partial, partial_path, write_atomic
from minitron_nemo.checkpoint.sink import Sink
from minitron_nemo.checkpoint.source import Source, file_state

DIRECTORY = ".parts"
SCHEMA_VERSION = 1


class Finished(NamedTuple):
    """A part on the disk: the files it is in, what `Sink.finish` needs of it, and its blocks' hashes in their order."""

    files: list[str]
    places: list[Any]
    digests: list[str]

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @staticmethod
    def from_json(text: str) -> Finished:
        return Finished(**json.loads(text))


class Journal:
    """The records in a partial directory. One process calls `begin`, `end` and `clean`, each its own `record`."""

    def __init__(self, source: Source, plan: Plan, sink: Sink) -> None:
        self.path, self.source, self.plan, self.sink = sink.path, source, plan, sink
        self.directory = partial_path(sink.path) / DIRECTORY
        self.state = self.directory / "transform.json"

    @cached_property
    def identity(self) -> bytes:
        """What is being made of what, as its file has it."""
        content = {"schema_version": SCHEMA_VERSION, "transform": _identity(self.source, self.plan, self.sink)}
        return json.dumps(content).encode()

    def begin(self) -> bool:
        """Whether what lies there is to be gone on with; else there is an empty partial directory now."""
        if self.state.is_file() and self.state.read_bytes() == self.identity:
            return True
        make_partial(self.path)
        self.directory.mkdir()
        return False

    def commit_layout(self) -> None:
        """From here on the directory can be gone on with: its files are laid out."""
        write_atomic(self.state, self.identity)

    def finished(self, part: int) -> str | None:
        """The record of a part as its file has it, if there is one."""
        file = self.directory / f"{part}.json"
        return file.read_text() if file.is_file() else None

    def record(self, part: int, record: str) -> None:
        """Bring a part's files to the disk, then say that they are."""
        for name in Finished.from_json(record).files:
            file = partial_path(self.path) / name
            fsync(file)
            fsync(file.parent)
        write_atomic(self.directory / f"{part}.json", record)

    def end(self) -> None:
        """Remove the records, first the one without which the others say nothing."""
        self.state.unlink()
        shutil.rmtree(self.directory)

    def clean(self) -> None:
        """Remove the partial directory where nothing in it can be gone on with; no process may be writing any more."""
        if not (self.state.is_file() and any(self.directory.glob("[0-9]*.json"))):
            shutil.rmtree(self.directory.parent, ignore_errors=True)


def _identity(source: Source, plan: Plan, sink: Sink) -> str:
    content: Mapping[str, Any] = {
        "source": file_state(source.path, source.weight_files()),
        "plan": plan.to_json(),
        "format": type(sink).__name__,
        "dtypes": {name: str(dtype) for name, dtype in sink.dtypes.items()},
        "blocks": [blocks.BLOCK_BYTES, blocks.PART_BYTES],
        "hashes": fingerprint.SCHEMA_VERSION,
        "version": minitron_nemo.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
