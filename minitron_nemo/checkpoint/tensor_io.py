"""Exact reads and writes of tensors' bytes: by position, without a copy in between."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from minitron_nemo.errors import UserError


def read_tensor(path: Path, offset: int, tensor: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor with the file's bytes from `offset`. Raises UserError at its end."""
    rest = as_bytes(tensor)
    with open(path, "rb", buffering=0) as file:
        while rest:
            count = os.preadv(file.fileno(), [rest], offset)
            if count == 0:
                raise UserError(f"{path}: truncated: {len(rest)} bytes are missing at offset {offset}; copy it again")
            rest, offset = rest[count:], offset + count


def write_tensor(descriptor: int, offset: int, tensor: torch.Tensor) -> None:
    """Write a contiguous CPU tensor's bytes at `offset` of an open file."""
    rest = as_bytes(tensor)
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
