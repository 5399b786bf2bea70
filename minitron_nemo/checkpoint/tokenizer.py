"""Tokenizer files that travel with a checkpoint; how many entries they have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from minitron_nemo.checkpoint.files import read_json
from minitron_nemo.errors import UserError

DIRECTORY = "tokenizer"  # inside a Megatron checkpoint
GENERATION_FILE = "generation_config.json"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_FILE,
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_files(source: Path, destination: Path) -> None:
    """Copy the tokenizer files and generation_config.json of a checkpoint, or of a plain directory, that exist.

    A missing generation_config.json is made from the special token ids in config.json, which would be lost otherwise.
    """
    destination.mkdir(exist_ok=True)
    source = directory_of(source)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    if not (source / GENERATION_FILE).is_file() and (source / "config.json").is_file():
        write_generation_config(destination, read_json(source / "config.json"))


def directory_of(checkpoint: Path) -> Path:
    """Where a Hugging Face or Megatron checkpoint keeps its tokenizer files."""
    inner = checkpoint / DIRECTORY
    return inner if inner.is_dir() else checkpoint


def write_generation_config(directory: Path, config: dict[str, Any]) -> None:
    """generation_config.json with the special token ids among `config`, if there are any."""
    ids = {key: config[key] for key in SPECIAL_IDS if config.get(key) is not None}
    if ids:
        (directory / GENERATION_FILE).write_text(json.dumps(ids, indent=2) + "\n")


def special_ids(directory: Path) -> dict[str, Any]:
    """The special token ids that a directory's generation_config.json gives."""
    if not (directory / GENERATION_FILE).is_file():
        return {}
    config = read_json(directory / GENERATION_FILE)
    return {key: config[key] for key in SPECIAL_IDS if config.get(key) is not None}


def tokenizer_size(directory: Path) -> int | None:
    """Highest token id + 1, from tokenizer.json or else vocab.json and added_tokens.json; None without them."""
    path = directory / "tokenizer.json"
    try:
        if path.is_file():
            tokenizer = read_json(path)
            vocabulary = tokenizer["model"]["vocab"]
            largest = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
            return 1 + max([largest, *(token["id"] for token in tokenizer.get("added_tokens", []))])
        ids: list[int] = []
        for path in (directory / "vocab.json", directory / "added_tokens.json"):
            if path.is_file():
                ids += read_json(path).values()
        return 1 + max(ids) if ids else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a tokenizer: {error}") from None
