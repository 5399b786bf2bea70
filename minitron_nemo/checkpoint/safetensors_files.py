"""The safetensors format: a JSON header that says where each tensor's bytes are, then the bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from minitron_nemo.checkpoint.files import reading
from minitron_nemo.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place: file, offset of its first byte in it, and what the bytes mean. Stored row by row."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file. Raises UserError for a truncated or malformed one, or what cannot be read."""
    with reading(path), open(path, "rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: truncated: the header is cut off; copy it again")
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None


def _stored(path: Path, name: str, entry: dict, data_start: int, file_size: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: tensor {name} is stored as {entry['dtype']}; supported: {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if start < 0 or stop - start != prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: tensor {name}: {stop - start} bytes do not hold {list(shape)} of {entry['dtype']}")
    if data_start + stop > file_size:
        raise UserError(
            f"{path}: truncated: tensor {name} ends at byte {data_start + stop} of {file_size}; copy it again"
        )
    return StoredTensor(path, data_start + start, dtype, shape)


def lay_out(
    path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, StoredTensor]]:
    """The header of a new file holding `tensors` in this order, and where each of them will lie."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start aligned
    start = 8 + len(header)
    places = {}
    for name, (dtype, shape) in tensors.items():
        places[name] = StoredTensor(path, start, dtype, shape)
        start += prod(shape) * dtype.itemsize
    return len(header).to_bytes(8, "little") + header, places
