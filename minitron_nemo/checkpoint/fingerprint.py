"""Fingerprints: what weights a checkpoint holds, whatever its format and layout; identities: what else decides results.

A block's hash is BLAKE3 over the bytes of its rows: as safe as SHA-256, and 3.7 times as fast on one core (1.4 and 5.1
GiB/s). A tensor's is SHA-256 over its canonical name, data type, shape and the hashes of its blocks, the model's over
those of all tensors, in the order of the forward pass. So processes may hash blocks in any order, and `transform` does
while it has them in memory.

    fingerprints.json   the model's hash and those of its tensors, sizes and times of the files they were taken of
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.architecture import FILE_NAME as ARCHITECTURE_FILE
from minitron_nemo.arch.tensors import NamedTensor, tensors
from minitron_nemo.checkpoint.blocks import chunks
from minitron_nemo.checkpoint.files import read_json, write_atomic
from minitron_nemo.checkpoint.source import Source, file_state, open_source
from minitron_nemo.checkpoint.tensor_io import as_bytes
from minitron_nemo.checkpoint.tokenizer import FILES, directory_of
from minitron_nemo.errors import UserError

CACHE_FILE = "fingerprints.json"
SCHEMA_VERSION = 3


def fingerprint(path: Path) -> str:
    """Hash of the weights as 64 hexadecimal digits.

    Equal for equal weights in any format and layout. Taken from fingerprints.json as long as sizes and times of the
    weight files stay as they are, and kept there in a Megatron directory that carries its architecture. Raises
    UserError.
    """
    return _of_weights(open_source(Path(path)))


def model_identity(path: Path) -> str:
    """Hash of what decides a model's logits: its weights and its architecture, whose rotary base no tensor tells.

    Raises UserError.
    """
    source = open_source(Path(path))
    return _digest(_of_weights(source), source.architecture.to_dict())


def checkpoint_identity(path: Path) -> str:
    """Hash of all that a step reads of a Hugging Face or Megatron directory: of `model_identity` and tokenizer files.

    Equal for equal ones in any layout. Raises UserError.
    """
    directory = directory_of(Path(path))
    files = [directory / name for name in FILES if (directory / name).is_file()]
    return _digest(model_identity(path), {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})


def _of_weights(source: Source) -> str:
    state = file_state(source.path, source.weight_files())
    if source.path.is_dir() and (source.path / CACHE_FILE).is_file():
        cached = read_json(source.path / CACHE_FILE, "remove it, and the weights are read again")
        if cached.get("schema_version") == SCHEMA_VERSION and cached.get("files") == state and "model" in cached:
            return str(cached["model"])
    hashes = {tensor.name: tensor_fingerprint(source, tensor) for tensor in tensors(source.architecture)}
    # Somebody else's directory, or a read-only one, is left as it is.
    if (source.path / ARCHITECTURE_FILE).is_file() and os.access(source.path, os.W_OK):
        _write(source.path, hashes, state)
    return _of_model(hashes)


def record_fingerprints(
    directory: Path,
    architecture: Architecture,
    dtypes: Mapping[str, torch.dtype],
    blocks: Iterable[tuple[str, str]],
    files: Sequence[Path],
) -> None:
    """Write fingerprints.json of weights that have just been written to `files`.

    `blocks` are the tensors' names and the blocks' hashes, all of them in order.
    """
    digests: dict[str, list[str]] = {}
    for name, digest in blocks:
        digests.setdefault(name, []).append(digest)
    hashes = {
        tensor.name: _of_tensor(tensor, architecture, dtypes[tensor.name], digests[tensor.name])
        for tensor in tensors(architecture)
    }
    _write(directory, hashes, file_state(directory, files))


def recorded_fingerprints(directory: Path) -> dict[str, str]:
    """Hashes of a checkpoint's tensors as they were recorded. Raises UserError where there are none."""
    path = directory / CACHE_FILE
    if not path.is_file():
        raise UserError(f"{path}: not there, so nothing says what was written; give the source as well")
    recorded = read_json(path, "give the source as well")
    if recorded.get("schema_version") != SCHEMA_VERSION or not isinstance(recorded.get("tensors"), dict):
        raise UserError(f"{path}: not the fingerprints of this version; give the source as well")
    return dict(recorded["tensors"])


def tensor_fingerprint(source: Source, tensor: NamedTensor) -> str:
    """Hash of one canonical tensor."""
    dtype = source.dtype(tensor.name)
    blocks = chunks(tensor, source.architecture, dtype)
    digests = [block_hash(source.read(tensor.name, chunk.start, chunk.stop)) for chunk in blocks]
    return _of_tensor(tensor, source.architecture, dtype, digests)


def block_hash(rows: torch.Tensor) -> str:
    """Hash of a block's bytes."""
    return blake3(as_bytes(rows)).hexdigest()


def _of_tensor(tensor: NamedTensor, architecture: Architecture, dtype: torch.dtype, digests: Sequence[str]) -> str:
    return hashlib.sha256(
        json.dumps([tensor.name, str(dtype), tensor.spec.shape(architecture), digests]).encode()
    ).hexdigest()


def _of_model(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(hashes.values()).encode()).hexdigest()


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(directory: Path, hashes: Mapping[str, str], state: Mapping[str, list[int]]) -> None:
    content = {"schema_version": SCHEMA_VERSION, "model": _of_model(hashes), "files": state, "tensors": hashes}
    write_atomic(directory / CACHE_FILE, json.dumps(content, indent=1) + "\n")
