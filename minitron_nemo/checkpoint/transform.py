"""The one streaming pass: source -> Plan -> sink, a block of rows at a time.

Import, export, resharding and pruning are all this pass. Memory is bounded by a few blocks whatever the model's size.
The blocks are fixed by the result alone and dealt out to the processes, so any number of them writes the same bytes.
What a Plan does to a block beyond selecting from it is computed in fp32 and rounded once.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minitron_nemo.arch import Architecture, Plan
from minitron_nemo.arch.axes import Indices
from minitron_nemo.arch.plan import FILE_NAME as PLAN_FILE
from minitron_nemo.arch.plan import MATRICES_NAME
from minitron_nemo.arch.tensors import NamedTensor, tensors
from minitron_nemo.checkpoint.dense import DenseMaps, check_matrices
from minitron_nemo.checkpoint.files import commit_partial, make_partial, partial_path
from minitron_nemo.checkpoint.sink import Chunk, Sink, open_sink
from minitron_nemo.checkpoint.source import Source, open_source
from minitron_nemo.errors import UserError

BLOCK_BYTES = 8 * 2**20
BLOCKS_AHEAD = 2  # read while one is written


def _alone() -> None:
    """The barrier of a single process."""


def convert(
    source: Path,
    destination: Path,
    to: str,
    *,
    plan: Plan | None = None,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = _alone,
    progress: bool = True,
) -> None:
    """Write `source`, cut to `plan`, to directory `destination` in format `to` (one of `sink.FORMATS`).

    Weights keep their data type where `dtype` is None; GGUF becomes bfloat16. All processes of a job call this with
    their `rank`. An existing checkpoint at `destination` is replaced at the end, in one piece. Raises UserError.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and source.exists() and destination.samefile(source):
        raise UserError(f"{destination}: is the source itself; give another destination")
    opened = open_source(source)
    plan = plan or Plan.identity(opened.architecture)
    _check_plan(opened, plan)
    if dtype is None and opened.format == "gguf":
        dtype = torch.bfloat16
    dtypes = {tensor.name: dtype or opened.dtype(plan.source_name(tensor)) for tensor in tensors(plan.target)}
    sink = open_sink(destination, to, plan.target, dtypes)
    transform(opened, plan, sink, rank=rank, world_size=world_size, barrier=barrier, progress=progress)


def transform(
    source: Source,
    plan: Plan,
    sink: Sink,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = _alone,
    progress: bool = True,
) -> None:
    """Carry `plan` out: fill `sink` from `source` and put it in place, with the plan in it unless it keeps everything.

    `progress` shows the way on process 0, and the speed of the products with the Plan's matrices.

    Process `rank` of `world_size` writes its share of the blocks; `barrier` waits for all. Process 0 puts the result in
    place after all have written. When one fails nothing takes the final name; it raises UserError for a full disk.
    """
    _check_plan(source, plan)
    partial = partial_path(sink.path)
    try:
        if rank == 0:
            check_matrices(plan)
            make_partial(sink.path)
            sink.prepare()
        barrier()
        maps = DenseMaps(plan)
        mine = share(chunks(plan.target, sink.dtypes), rank, world_size)
        sink.write(_ahead(_shown(mine, sink, progress and rank == 0), Slicer(source, plan, maps, sink.dtypes)), rank)
        if maps.flops and progress and rank == 0:
            gflops = maps.flops / 1e9
            print(f"[transform] dense maps: {gflops:.1f} GFLOP, {gflops / maps.seconds:.1f} GFLOP/s a thread")
        barrier()
        if rank == 0:
            sink.finish(source)
            if plan != Plan.identity(source.architecture):
                _save_plan(plan, partial)
            commit_partial(sink.path)
        barrier()
    except OSError as error:
        raise UserError(f"{sink.path}: not written: {error.strerror or error}; what was there is untouched") from error
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def chunks(architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> list[Chunk]:
    """All rows of all tensors in blocks of at most BLOCK_BYTES (one row at least), in the order of the forward pass."""
    blocks = []
    for tensor in tensors(architecture):
        rows, *columns = tensor.spec.shape(architecture)
        step = max(1, BLOCK_BYTES // (prod(columns) * dtypes[tensor.name].itemsize))
        blocks += [Chunk(tensor, start, min(start + step, rows)) for start in range(0, rows, step)]
    return blocks


def share(blocks: Sequence[Chunk], rank: int, world_size: int) -> Sequence[Chunk]:
    """The run of blocks that process `rank` of `world_size` writes: about equal rows of about equal size."""
    return blocks[len(blocks) * rank // world_size : len(blocks) * (rank + 1) // world_size]


def _ahead(blocks: Iterable[Chunk], rows: Callable[[Chunk], torch.Tensor]) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """Blocks with their rows, in order; threads read the next ones while the caller writes one."""
    # Sums of products are in the same order for any number of threads if each product has one.
    with ThreadPoolExecutor(BLOCKS_AHEAD, initializer=torch.set_num_threads, initargs=(1,)) as readers:
        pending: deque[tuple[Chunk, Future[torch.Tensor]]] = deque()
        for chunk in blocks:
            pending.append((chunk, readers.submit(rows, chunk)))
            if len(pending) > BLOCKS_AHEAD:
                ready, future = pending.popleft()
                yield ready, future.result()
        for ready, future in pending:
            yield ready, future.result()


class Slicer:
    """Computes a block of the result when called: [rows, columns] or [rows], of the data type in `dtypes`."""

    def __init__(self, source: Source, plan: Plan, maps: DenseMaps, dtypes: Mapping[str, torch.dtype]) -> None:
        self.source, self.plan, self.maps, self.dtypes = source, plan, maps, dtypes
        once = lru_cache(maxsize=BLOCKS_AHEAD)  # the blocks of a tensor follow each other
        self._selections = once(self._select)
        self._partners = once(plan.merged_rows)

    def __call__(self, chunk: Chunk) -> torch.Tensor:
        name, plan = chunk.tensor.name, self.plan
        rows, *others = self._selections(chunk.tensor)
        columns = others[0] if others else None
        if name in plan.matrices:
            block = self.maps.columns(name, self._block(chunk, rows, None), columns)
        else:
            block = self._block(chunk, rows, columns)
        if name in plan.folded_norms:
            block = torch.ones_like(block)
        elif name in plan.norm_scales:
            block = block.float() * plan.norm_scales[name]
        return block.to(self.dtypes[name])

    def _select(self, tensor: NamedTensor) -> list[Indices | None]:
        kept = self.plan.kept(tensor.layer)
        return [dim.select(self.plan.source, kept) for dim in tensor.spec.dims]

    def _block(self, chunk: Chunk, rows: Indices | None, columns: Indices | None) -> torch.Tensor:
        """The chunk's rows of the plain cut; in fp32 rotated ones, and where some have a partner: twice less that."""
        if self.plan.writes_rotated(chunk.tensor):
            return self._rotated(chunk, columns)
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

    def _rotated(self, chunk: Chunk, columns: Indices | None) -> torch.Tensor:
        """The chunk's rows of P^T W in fp32: every row of W has a part in them, a window at a time."""
        name, width = self.plan.source_name(chunk.tensor), chunk.tensor.spec.shape(self.plan.source)[1]
        result = torch.zeros(chunk.stop - chunk.start, width if columns is None else len(columns))
        size = self.plan.source.hidden_size
        window = max(1, BLOCK_BYTES // (width * self.source.dtype(name).itemsize))
        for first in range(0, size, window):
            part = _take(self.source.read(name, first, min(first + window, size)), columns, 1)
            self.maps.add_rotated(result, part, first, slice(chunk.start, chunk.stop))
        return result

    def _gather(self, tensor: NamedTensor, wanted: Indices, columns: Indices | None) -> torch.Tensor:
        """The `wanted` rows (ascending) of a tensor of the source, their `columns` alone where given."""
        name, width = self.plan.source_name(tensor), tensor.spec.shape(self.plan.source)[1:]
        dtype = self.source.dtype(name)
        window = max(1, BLOCK_BYTES // (prod(width) * dtype.itemsize))
        block = torch.empty((len(wanted), *(width if columns is None else (len(columns),))), dtype=dtype)
        for position, part in _selected_rows(self.source, name, wanted, window):
            _take(part, columns, 1, out=block[position : position + len(part)])
        return block


def _save_plan(plan: Plan, directory: Path) -> None:
    """The Plan and its matrices; the same file once more where the file system can."""
    plan.save(directory / PLAN_FILE)
    if plan.matrices and plan.directory is not None:
        try:
            os.link(plan.directory / MATRICES_NAME, directory / MATRICES_NAME)
        except OSError:
            shutil.copyfile(plan.directory / MATRICES_NAME, directory / MATRICES_NAME)


def _selected_rows(source: Source, name: str, wanted: Indices, window: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The `wanted` rows (ascending) of a tensor in parts, each with its position among them.

    At most `window` rows are read at a time, and no gap longer than that.
    """
    position = 0
    while position < len(wanted):
        first = int(wanted[position])
        end = int(np.searchsorted(wanted, first + window))
        last = int(wanted[end - 1])
        yield position, _take(source.read(name, first, last + 1), wanted[position:end] - first, 0)
        position = end


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


def _check_plan(source: Source, plan: Plan) -> None:
    for field in fields(Architecture):
        planned, found = getattr(plan.source, field.name), getattr(source.architecture, field.name)
        if planned != found:
            raise UserError(f"{source.path}: the plan is for another model: {field.name} is {found}, planned {planned}")
    if plan.rotated and not plan.matrices:
        raise UserError(f"{source.path}: the plan is to rotate hidden channels and has no matrices yet; repair first")


def _shown(blocks: Sequence[Chunk], sink: Sink, show: bool) -> Iterator[Chunk]:
    """The blocks, with a progress bar over their bytes."""

    def size(chunk: Chunk) -> int:
        columns = chunk.tensor.spec.shape(sink.architecture)[1:]
        return (chunk.stop - chunk.start) * prod(columns) * sink.dtypes[chunk.tensor.name].itemsize

    with tqdm(total=sum(map(size, blocks)), desc=sink.path.name, unit="B", unit_scale=True, disable=not show) as bar:
        for chunk in blocks:
            yield chunk
            bar.update(size(chunk))
