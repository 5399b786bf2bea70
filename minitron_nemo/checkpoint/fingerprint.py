"""Fingerprints: what weights a checkpoint holds, whatever its format and layout.

A tensor's hash is SHA-256 over its canonical name, data type, shape, and the bytes of its rows in order, read in fixed
blocks. The model's is SHA-256 over those of all tensors, in the order of the forward pass.
"""

from __future__ import annotations

import hashlib
import json
import os
from math import prod
from pathlib import Path
from typing import Any

from minitron_nemo.arch.architecture import FILE_NAME as ARCHITECTURE_FILE
from minitron_nemo.arch.tensors import NamedTensor, tensors
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.checkpoint.source import Source, open_source
from minitron_nemo.checkpoint.tensor_io import as_bytes

CACHE_FILE = "fingerprints.json"
SCHEMA_VERSION = 1
BLOCK_BYTES = 4 * 2**20


def fingerprint(path: Path) -> str:
    """Hash of the weights as 64 hexadecimal digits.

    Equal for equal weights in any format and layout. Kept in fingerprints.json inside a Megatron directory that carries
    its architecture, as long as sizes and times of the weight files stay as they are. Raises UserError.
    """
    source = open_source(Path(path))
    state = _file_state(source)
    cache = source.path / CACHE_FILE
    if source.path.is_dir() and cache.is_file():
        cached = json.loads(cache.read_text())
        if cached.get("schema_version") == SCHEMA_VERSION and cached["files"] == state:
            return str(cached["model"])
    hashes = {tensor.name: tensor_fingerprint(source, tensor) for tensor in tensors(source.architecture)}
    model = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
    # Somebody else's directory, or a read-only one, is left as it is.
    if (source.path / ARCHITECTURE_FILE).is_file() and os.access(source.path, os.W_OK):
        content = {"schema_version": SCHEMA_VERSION, "model": model, "files": state, "tensors": hashes}
        write_atomic(cache, json.dumps(content, indent=1) + "\n")
    return model


def tensor_fingerprint(source: Source, tensor: NamedTensor) -> str:
    """Hash of one canonical tensor."""
    shape = tensor.spec.shape(source.architecture)
    dtype = source.dtype(tensor.name)
    digest = hashlib.sha256(json.dumps([tensor.name, str(dtype), shape]).encode())
    step = max(1, BLOCK_BYTES // (prod(shape[1:]) * dtype.itemsize))
    for start in range(0, shape[0], step):
        block = source.read(tensor.name, start, min(start + step, shape[0]))
        digest.update(as_bytes(block))
    return digest.hexdigest()


def _file_state(source: Source) -> dict[str, Any]:
    """Size and modification time of the files that hold the weights."""
    states = {file.name: file.stat() for file in source.weight_files()}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
