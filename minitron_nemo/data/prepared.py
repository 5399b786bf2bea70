"""What prepared data consists of: prepared.json, and for every source a directory of Megatron indexed datasets.

    prepared.json                       this module's Prepared
    00-NAME/source.json                 what the directory was made from, for skipping it when nothing changed
    00-NAME/{train,heldout}.bin, .idx   one document an entry: the separator, then the document's tokens
    00-NAME/{train,heldout}.ids         sha256 of every document's text, 32 bytes each, in the same order

A split without documents has no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_nemo.checkpoint.files import read_json
from minitron_nemo.errors import UserError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Split:
    """One indexed dataset; `prefix` is its path without suffix, relative to the directory of prepared.json."""

    prefix: str
    documents: int
    tokens: int  # separators included
    characters: int
    sha256: str  # of all token ids and document lengths, in order


@dataclass(frozen=True)
class PreparedSource:
    name: str
    path: str  # as in the recipe
    held_out: bool  # as a whole
    train: Split | None
    heldout: Split | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PreparedSource:
        splits = {key: None if data[key] is None else Split(**data[key]) for key in ("train", "heldout")}
        return cls(data["name"], data["path"], data["held_out"], splits["train"], splits["heldout"])


@dataclass(frozen=True)
class Prepared:
    schema_version: int
    fingerprint: str  # of all tokens, their order and the separator
    tokenizer: str  # its fingerprint
    separator_id: int
    vocab_size: int
    sources: tuple[PreparedSource, ...]


def load_prepared(directory: Path) -> Prepared:
    """Read prepared.json. Raises UserError if it is missing, damaged or of another schema."""
    path = directory / "prepared.json"
    again = "delete it and run `minitron prepare` again"
    if not path.exists():
        raise UserError(f"{path}: not there; run `minitron prepare` first")
    data = read_json(path, again)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {data.get('schema_version')}, expected {SCHEMA_VERSION}; {again}")
    try:
        return Prepared(**{**data, "sources": tuple(map(PreparedSource.from_dict, data["sources"]))})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not what `minitron prepare` writes ({error}); {again}") from None
