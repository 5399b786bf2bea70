"""The matrices of a Plan: their file, and products with them in bounded memory.

A product sums over blocks of a matrix's rows in their order, in fp32, each block on one thread: the result depends on
the Plan and on the block of the student's rows alone, not on the number of processes or threads.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from minitron_nemo.arch import Plan
from minitron_nemo.arch.axes import Indices
from minitron_nemo.arch.blocks import EMBEDDING
from minitron_nemo.arch.matrix import ADD, Matrix
from minitron_nemo.arch.plan import MATRICES_NAME
from minitron_nemo.checkpoint.safetensors_files import StoredTensor, lay_out, read_header
from minitron_nemo.checkpoint.tensor_io import as_bytes, read_tensor, write_tensor
from minitron_nemo.errors import UserError

BLOCK_BYTES = 32 * 2**20


class MatrixFile:
    """A file of fp32 matrices that several processes write, each some of them; their shapes are known before."""

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.path = directory / MATRICES_NAME
        self.header, self.places = lay_out(self.path, {name: (torch.float32, shapes[name]) for name in sorted(shapes)})

    def prepare(self) -> None:
        """Make the file; one process, before any writes."""
        last = max(self.places.values(), key=lambda place: place.offset)
        self.path.write_bytes(self.header)
        os.truncate(self.path, last.offset + last.shape[0] * last.row_bytes)

    def write(self, name: str, kind: str, values: torch.Tensor) -> Matrix:
        """Write one matrix, fp32 on the CPU, bring it to the disk, and return its entry in the Plan."""
        values = values.contiguous()
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            write_tensor(descriptor, self.places[name].offset, values)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        rows, columns = values.shape
        return Matrix(kind, (rows, columns), hashlib.sha256(as_bytes(values)).hexdigest())

    def read(self, name: str) -> torch.Tensor:
        """A whole matrix, fp32 on the CPU."""
        return _read(self.places[name], 0, self.places[name].shape[0])

    def holds(self, name: str, matrix: Matrix) -> bool:
        """Whether the file has the bytes of a matrix that was written."""
        digest = hashlib.sha256()
        for _, block in matrix_blocks(self.places[name]):
            digest.update(as_bytes(block))
        return digest.hexdigest() == matrix.sha256


def open_matrices(plan: Plan) -> dict[str, StoredTensor]:
    """Where the values of a Plan's matrices are. Raises UserError when the file is missing, damaged, or another one."""
    if not plan.matrices:
        return {}
    if plan.directory is None or not (plan.directory / MATRICES_NAME).is_file():
        raise UserError(f"plan: {MATRICES_NAME} is not beside it in {plan.directory}; copy both files")
    path = plan.directory / MATRICES_NAME
    stored = read_header(path)
    for name, matrix in plan.matrices.items():
        found = stored.get(name)
        if found is None or found.dtype != torch.float32 or found.shape != matrix.shape:
            raise UserError(f"{path}: {name}: not the fp32 matrix {list(matrix.shape)} that the plan names")
    return stored


def check_matrices(plan: Plan) -> None:
    """Compare every matrix with the Plan's hash of it. Raises UserError for another or one that is not finite."""
    for name, place in open_matrices(plan).items():
        if name not in plan.matrices:
            raise UserError(f"{place.path}: {name} is not in the plan beside it; the two do not belong together")
        digest = hashlib.sha256()
        for _, block in matrix_blocks(place):
            digest.update(as_bytes(block))
            if not bool(torch.isfinite(block).all()):
                raise UserError(f"{place.path}: {name} is not finite everywhere; repair again")
        if digest.hexdigest() != plan.matrices[name].sha256:
            raise UserError(f"{place.path}: {name} is not what the plan was made with; copy both files again")


class DenseMaps:
    """Multiplies blocks of rows of a Plan's tensors by their matrices, from several threads."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.stored = open_matrices(plan)
        self.flops = 0
        self.seconds = 0.0  # summed over threads
        self._lock = threading.Lock()

    def columns(self, name: str, block: torch.Tensor, kept: Indices | None) -> torch.Tensor:
        """[rows, n] of the source times matrix `name` -> fp32 [rows, k]; `kept` are the columns of the plain cut."""
        start = time.perf_counter()
        block, matrix, place = block.float(), self.plan.matrices[name], self.stored[name]
        if matrix.kind == ADD:
            assert kept is not None, f"{name} adds to columns, but none are cut"
            result = block[:, kept]
            block = block[:, np.setdiff1d(np.arange(block.shape[1]), kept, assume_unique=True)]
        else:
            result = block.new_zeros(len(block), matrix.shape[1])
        for first, part in matrix_blocks(place):
            result.addmm_(block[:, first : first + len(part)], part)
        self._count(2 * len(block) * matrix.shape[0] * matrix.shape[1], start)
        return result

    def given(self, name: str, entries: slice) -> torch.Tensor:
        """These entries of a norm's gain or bias, fp32 [entries]."""
        return _read(self.stored[name], 0, 1)[0, entries]

    def add_rotated(self, result: torch.Tensor, block: torch.Tensor, first: int, rows: slice) -> None:
        """Add to `rows` [r, n] of P^T W, fp32, what the rows of W [m, n] from `first` on contribute: `block`."""
        start = time.perf_counter()
        part = _read(self.stored[EMBEDDING], first, first + len(block))[:, rows]  # [m, r] of P
        result.addmm_(part.t(), block.float())
        self._count(2 * block.numel() * len(result), start)

    def _count(self, flops: int, start: float) -> None:
        with self._lock:
            self.flops += flops
            self.seconds += time.perf_counter() - start


def matrix_blocks(place: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """A matrix in blocks of its rows, fp32 [rows, k], in their order, each with the number of its first row."""
    step = max(1, BLOCK_BYTES // place.row_bytes)
    for first in range(0, place.shape[0], step):
        yield first, _read(place, first, min(first + step, place.shape[0]))


def _read(place: StoredTensor, start: int, stop: int) -> torch.Tensor:
    block = torch.empty((stop - start, *place.shape[1:]), dtype=torch.float32)
    read_tensor(place.path, place.offset + start * place.row_bytes, block)
    return block
