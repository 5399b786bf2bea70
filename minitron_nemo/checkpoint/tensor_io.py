"""Exact reads and writes of tensors' bytes: by position, without a copy in between."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from minitron_nemo.checkpoint.files import reading
from minitron_nemo.errors import UserError

# ext4 takes up to seven times the CPU for larger writes at the end of a file (measured on Linux 6 with 1 to 8 MiB).
WRITE_BYTES = 128 * 2**10


class AppendingFile:
    """The few methods of a file that torch.save writes to, on an open descriptor, without a buffer."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.end = 0

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        write_bytes(self.descriptor, self.end, view)
        self.end += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""


def read_tensor(path: Path, offset: int, tensor: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor with the file's bytes from `offset`. Raises UserError where it cannot be read."""
    rest = as_bytes(tensor)
    with reading(path), open(path, "rb", buffering=0) as file:
        while rest:
            count = os.preadv(file.fileno(), [rest], offset)
            if count == 0:
                raise UserError(f"{path}: truncated: {len(rest)} bytes are missing at offset {offset}; copy it again")
            rest, offset = rest[count:], offset + count


def write_tensor(descriptor: int, offset: int, tensor: torch.Tensor) -> None:
    """Write a contiguous CPU tensor's bytes at `offset` of an open file."""
    write_bytes(descriptor, offset, as_bytes(tensor))


def write_bytes(descriptor: int, offset: int, content: memoryview) -> None:
    """Write all of `content` at `offset` of an open file, WRITE_BYTES at a time."""
    while content:
        count = os.pwrite(descriptor, content[:WRITE_BYTES], offset)
        content, offset = content[count:], offset + count


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
