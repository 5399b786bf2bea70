"""What a Plan makes of a block of rows: selections, merged heads, factors on norms, products with matrices.

What is done beyond selecting is computed in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod

import numpy as np
import torch

from minitron_nemo.arch import Plan
from minitron_nemo.arch.axes import Indices
from minitron_nemo.arch.tensors import NamedTensor
from minitron_nemo.checkpoint import blocks
from minitron_nemo.checkpoint.blocks import Chunk
from minitron_nemo.checkpoint.dense import DenseMaps
from minitron_nemo.checkpoint.source import Source

BLOCKS_AHEAD = 2  # read while one is written
CUT_BYTES = 2**20  # whole rows copied before their columns are: what stays in a core's cache


class Slicer:
    """Computes a block of the result when called: [rows, columns] or [rows], of the data type in `dtypes`."""

    def __init__(self, source: Source, plan: Plan, maps: DenseMaps, dtypes: Mapping[str, torch.dtype]) -> None:
        self.source, self.plan, self.maps, self.dtypes = source, plan, maps, dtypes
        once = lru_cache(maxsize=BLOCKS_AHEAD)  # the blocks of a tensor follow each other
        self._selections = once(self._select)
        self._partners = once(plan.merged_rows)

    def __call__(self, chunk: Chunk) -> torch.Tensor:
        name, plan = chunk.tensor.name, self.plan
        if plan.gives(name):
            return self.maps.given(name, slice(chunk.start, chunk.stop)).to(self.dtypes[name])
        rows, *others = self._selections(chunk.tensor)
        columns = others[0] if others else None
        if (matrix := plan.matrix_of(chunk.tensor)) is not None:
            block = self.maps.columns(matrix, self._block(chunk, rows, None), columns)
        else:
            block = self._block(chunk, rows, columns)
        if name in plan.norm_scales:
            block = block.float() * plan.norm_scales[name]
        return block.to(self.dtypes[name])

    def _select(self, tensor: NamedTensor) -> list[Indices | None]:
        kept = self.plan.kept(tensor.layer, tensor.expert)
        return [dim.select(self.plan.source, kept) for dim in tensor.spec.dims]

    def _block(self, chunk: Chunk, rows: Indices | None, columns: Indices | None) -> torch.Tensor:
        """The chunk's rows of the plain cut; in fp32 rotated ones, and where some have a partner: twice less that."""
        if self.plan.writes_rotated(chunk.tensor):
            return rotated_rows(self.source, self.plan, self.maps, chunk, columns)
        if rows is None:
            name = self.plan.source_name(chunk.tensor)
            return _take(self.source.read(name, chunk.start, chunk.stop), columns, 1)
        block = self._gather(chunk.tensor, rows[chunk.start : chunk.stop], columns)
        partners = self._partners(chunk.tensor).items()
        pairs = {row - chunk.start: partner for row, partner in partners if chunk.start <= row < chunk.stop}
        if not pairs:
            return block
        wanted, order = np.unique(list(pairs.values()), return_inverse=True)
        subtracted = self._gather(chunk.tensor, wanted, columns).float()[torch.from_numpy(order)]
        block = block.float()
        block[list(pairs)] = 2 * block[list(pairs)] - subtracted
        return block

    def _gather(self, tensor: NamedTensor, wanted: Indices, columns: Indices | None) -> torch.Tensor:
        """The `wanted` rows (ascending) of a tensor of the source, their `columns` alone where given."""
        name, width = self.plan.source_name(tensor), tensor.spec.shape(self.plan.source)[1:]
        dtype = self.source.dtype(name)
        window = max(1, blocks.BLOCK_BYTES // (prod(width) * dtype.itemsize))
        block = torch.empty((len(wanted), *(width if columns is None else (len(columns),))), dtype=dtype)
        for position, part, rows in _windows(self.source, name, wanted, window):
            _cut(part, rows, columns, block[position : position + len(rows)])
        return block


def rotated_rows(source: Source, plan: Plan, maps: DenseMaps, chunk: Chunk, columns: Indices | None) -> torch.Tensor:
    """The chunk's rows of P^T W in fp32, `columns` alone where given: every row of W has a part in them."""
    name, width = plan.source_name(chunk.tensor), chunk.tensor.spec.shape(plan.source)[1]
    result = torch.zeros(chunk.stop - chunk.start, width if columns is None else len(columns))
    window = max(1, blocks.BLOCK_BYTES // (width * source.dtype(name).itemsize))
    for first in range(0, plan.source.hidden_size, window):
        part = _take(source.read(name, first, min(first + window, plan.source.hidden_size)), columns, 1)
        maps.add_rotated(result, part, first, slice(chunk.start, chunk.stop))
    return result


def _windows(source: Source, name: str, wanted: Indices, window: int) -> Iterator[tuple[int, torch.Tensor, Indices]]:
    """The `wanted` rows (ascending) of a tensor: position of the first among them, rows read, which of these they are.

    At most `window` rows are read at a time, and no gap longer than that.
    """
    position = 0
    while position < len(wanted):
        first = int(wanted[position])
        end = int(np.searchsorted(wanted, first + window))
        yield position, source.read(name, first, int(wanted[end - 1]) + 1), wanted[position:end] - first
        position = end


def _cut(block: torch.Tensor, rows: Indices, columns: Indices | None, out: torch.Tensor) -> None:
    """Put some rows of a block, their `columns` alone where given, into `out`."""
    if columns is None:
        _take(block, rows, 0, out=out)
        return
    step = max(1, CUT_BYTES // (prod(block.shape[1:]) * block.dtype.itemsize))
    for first in range(0, len(rows), step):
        some = slice(first, first + step)
        _take(_take(block, rows[some], 0), columns, 1, out=out[some])


def _take(block: torch.Tensor, indices: Indices | None, dim: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """`block.index_select(dim, indices)`, into `out` where given; None takes all.

    By way of numpy, which is several times faster on columns.
    """
    if indices is None or len(indices) == block.shape[dim]:
        return block if out is None else out.copy_(block)
    word = _WORDS[block.dtype.itemsize]
    target = None if out is None else out.view(word).numpy()
    # The indices are in range (the Plan checks them); "clip" spares numpy a buffered copy.
    taken = np.take(block.view(word).numpy(), indices, axis=dim, mode="clip", out=target)
    return torch.from_numpy(taken).view(block.dtype)


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
