"""How a model's tensors are cut into what is held, hashed and written at once.

A block is some rows of a tensor; a part is a run of blocks. Both follow from the model alone, whoever works on them:
one process or many, in one go or interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.tensors import NamedTensor, tensors

BLOCK_BYTES = 8 * 2**20  # fingerprints are hashes of blocks: with another size their SCHEMA_VERSION has to change
PART_BYTES = 256 * 2**20


class Chunk(NamedTuple):
    """Rows [start, stop) of a canonical tensor: what is computed, hashed, written and stored at once."""

    tensor: NamedTensor
    start: int
    stop: int

    def nbytes(self, architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> int:
        columns = self.tensor.spec.shape(architecture)[1:]
        return (self.stop - self.start) * prod(columns) * dtypes[self.tensor.name].itemsize


def chunks(tensor: NamedTensor, architecture: Architecture, dtype: torch.dtype) -> list[Chunk]:
    """All rows of a tensor in blocks of at most BLOCK_BYTES, one row at least."""
    rows, *columns = tensor.spec.shape(architecture)
    step = max(1, BLOCK_BYTES // (prod(columns) * dtype.itemsize))
    return [Chunk(tensor, start, min(start + step, rows)) for start in range(0, rows, step)]


def parts(architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> list[list[Chunk]]:
    """All blocks of all tensors in the order of the forward pass, in runs of at most PART_BYTES, one block at least."""
    runs: list[list[Chunk]] = [[]]
    filled = 0
    for tensor in tensors(architecture):
        for chunk in chunks(tensor, architecture, dtypes[tensor.name]):
            size = chunk.nbytes(architecture, dtypes)
            if runs[-1] and filled + size > PART_BYTES:
                runs.append([])
                filled = 0
            runs[-1].append(chunk)
            filled += size
    return runs
