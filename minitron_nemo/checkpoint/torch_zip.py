"""The zips that torch.save writes: where the bytes of a tensor in one are, without loading it.

`data.pkl` says which storage a tensor is a view of; `data/KEY` holds that storage's bytes.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

LOCAL_HEADER_BYTES = 30  # of a zip entry, before its name


STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
}


class Window(io.RawIOBase):
    """`length` bytes of an open file from `offset`, as a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self.descriptor, self.offset, self.length = descriptor, offset, length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if base + position < 0:
            raise OSError("seek before the start")
        self.position = base + position
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.length - self.position))
        data = os.pread(self.descriptor, count, self.offset + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def entries_of(blob: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by name, without the directory that torch puts all of them into."""
    return {entry.filename.split("/", 1)[-1]: entry for entry in blob.infolist()}


def check_byte_order(window: Window, entries: Mapping[str, zipfile.ZipInfo]) -> None:
    """Raise ValueError for tensors of a machine with the other byte order."""
    if "byteorder" in entries and content(window, entries["byteorder"]) != b"little":
        raise ValueError("is not little-endian")


def rows_offset(
    window: Window,
    entries: Mapping[str, zipfile.ZipInfo],
    view: tuple[tuple[Any, str, int], int, tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
) -> int:
    """Where in the window a tensor's first byte is, given what `TensorUnpickler` makes of it.

    Raises ValueError unless it is stored row by row, and whole, in an uncompressed entry.
    """
    (_, key, _), first, shape, stride = view
    contiguous = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    if any(step != wanted for step, wanted, size in zip(stride, contiguous, shape, strict=True) if size > 1):
        raise ValueError(f"is not stored row by row: strides {list(stride)}")
    payload = entries[f"data/{key}"]
    if first < 0 or payload.file_size < (first + prod(shape)) * dtype.itemsize:
        raise ValueError(f"holds {payload.file_size} bytes for {list(shape)} of {dtype}")
    return content_offset(window, payload) + first * dtype.itemsize


def content_offset(window: Window, entry: zipfile.ZipInfo) -> int:
    """Where an uncompressed entry's bytes start in the zip; its local header repeats the name and pads it."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("is compressed")
    window.seek(entry.header_offset)
    header = window.read(LOCAL_HEADER_BYTES) or b""
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + LOCAL_HEADER_BYTES + name_length + extra_length


def content(window: Window, entry: zipfile.ZipInfo) -> bytes:
    """An entry's bytes, without its CRC32, which torch.save may have left out."""
    window.seek(content_offset(window, entry))
    return window.read(entry.file_size) or b""
