"""Is a checkpoint what it was made to be? Its weights are read again, a block of rows at a time.

`verify` compares bit for bit with what a Plan makes of a source. That is worked out here once more, by plain indexing
of whole rows, apart from what wrote the student; products with matrices alone are taken from there, since sums in fp32
have the same bits only in the same order. So some rows of each product are compared with sums in fp64 as well, made
here. `verify_record` compares with the hashes that the writer left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minitron_nemo.arch import Architecture, Plan
from minitron_nemo.arch.axes import Indices
from minitron_nemo.arch.blocks import EMBEDDING
from minitron_nemo.arch.matrix import ADD
from minitron_nemo.arch.plan import FILE_NAME as PLAN_FILE
from minitron_nemo.arch.tensors import NamedTensor, tensors
from minitron_nemo.checkpoint import blocks
from minitron_nemo.checkpoint.blocks import Chunk, chunks
from minitron_nemo.checkpoint.dense import DenseMaps, check_matrices, matrix_blocks
from minitron_nemo.checkpoint.fingerprint import recorded_fingerprints, tensor_fingerprint
from minitron_nemo.checkpoint.slicer import rotated_rows
from minitron_nemo.checkpoint.source import Source, open_source
from minitron_nemo.checkpoint.transform import check_plan
from minitron_nemo.progress import track

READERS = 2
SAMPLED_ROWS = 3  # of each product with a matrix
T = TypeVar("T")
Array = NDArray[np.float64]


class Difference(NamedTuple):
    """What is wrong first: `place` orders the differences that the processes of a job find."""

    place: int
    text: str


def verify(
    source: Path, student: Path, plan: Plan | None = None, *, rank: int = 0, world_size: int = 1, progress: bool = True
) -> Difference | None:
    """The first tensor and row in which `student` is not what `plan` makes of `source`; None where all bits are.

    Without a plan it is the one in the student's directory, else the one that keeps everything. Values are rounded to
    the data type that the student stores. SAMPLED_ROWS of each product with a matrix are compared with sums in fp64 as
    well, to what rounding may come to. Process `rank` of `world_size` reads every `world_size`-th block. Raises
    UserError for what cannot be read, and for a plan for another source.
    """
    read, written = open_source(source), open_source(student)
    if plan is None:
        own = student / PLAN_FILE
        plan = Plan.load(own) if own.is_file() else Plan.identity(read.architecture)
    check_plan(read, plan)
    check_matrices(plan)
    for field in fields(Architecture):
        planned, found = getattr(plan.target, field.name), getattr(written.architecture, field.name)
        if planned != found:
            return Difference(-1, f"its {field.name} is {found}, the plan's {planned}")
    again = Again(read, plan)
    everything: list[Chunk] = []
    for tensor in tensors(plan.target):
        everything += chunks(tensor, plan.target, written.dtype(tensor.name))

    def compare(chunk: Chunk) -> str | None:
        found = written.read(chunk.tensor.name, chunk.start, chunk.stop)
        return _difference(chunk, found, again.rows(chunk).to(found.dtype)) or _far_off(chunk, found, again)

    return _first(compare, everything, student, rank, world_size, progress)


def verify_record(directory: Path, *, rank: int = 0, world_size: int = 1, progress: bool = True) -> Difference | None:
    """The first tensor of a checkpoint that does not have the hash in its fingerprints.json; None where all have.

    Process `rank` of `world_size` reads every `world_size`-th tensor. Raises UserError for what cannot be read, and
    where nothing is recorded.
    """
    source, recorded = open_source(directory), recorded_fingerprints(directory)

    def compare(tensor: NamedTensor) -> str | None:
        same = tensor_fingerprint(source, tensor) == recorded.get(tensor.name)
        return None if same else f"{tensor.name} is not what was written: its hash is another one"

    return _first(compare, list(tensors(source.architecture)), directory, rank, world_size, progress)


class Again:
    """What `plan` makes of the rows of `source`: the definitions of `Plan`, in the order in which they are stated."""

    def __init__(self, source: Source, plan: Plan) -> None:
        self.source, self.plan, self.maps = source, plan, DenseMaps(plan)

    def rows(self, chunk: Chunk) -> Tensor:
        """A block of the student, before it is rounded to the type that is stored."""
        tensor, plan = chunk.tensor, self.plan
        if plan.gives(tensor.name):
            return self.maps.given(tensor.name, slice(chunk.start, chunk.stop))
        kept = plan.kept(tensor.layer, tensor.expert)
        selections = [dim.select(plan.source, kept) for dim in tensor.spec.dims]
        columns = selections[1] if len(selections) > 1 else None
        matrix = plan.matrix_of(tensor)
        if plan.writes_rotated(tensor):
            block = rotated_rows(self.source, plan, self.maps, chunk, columns if matrix is None else None)
            return block if matrix is None else self.maps.columns(matrix, block, columns)
        block = self._cut_rows(chunk, selections[0])
        if matrix is not None:
            return self.maps.columns(matrix, block, columns)
        if columns is not None:
            block = torch.from_numpy(np.take(_bits(block), columns, axis=1)).view(block.dtype)
        return block.float() * plan.norm_scales[tensor.name] if tensor.name in plan.norm_scales else block

    def multiplies(self, tensor: NamedTensor) -> bool:
        """Whether a tensor of the student is a product with a matrix, or two."""
        return self.plan.matrix_of(tensor) is not None or self.plan.writes_rotated(tensor)

    def products(self, tensor: NamedTensor, rows: Sequence[int]) -> tuple[Array, Array]:
        """These rows of a product in fp64, and by how much sums in fp32 of any order may miss them, [rows, columns].

        A sum of n products misses at most n roundings of the sum of their absolute values.
        """
        plan = self.plan
        kept = plan.kept(tensor.layer, tensor.expert)
        selected, columns = (dim.select(plan.source, kept) for dim in tensor.spec.dims)
        if plan.writes_rotated(tensor):
            values, sizes = self._rotated(tensor, rows)
            terms = plan.source.hidden_size
        else:
            cut = [self._cut_rows(Chunk(tensor, row, row + 1), selected) for row in rows]
            values = torch.cat(cut).double().numpy()
            sizes, terms = np.abs(values), 0
        if (matrix := plan.matrix_of(tensor)) is not None:
            values, sizes = self._multiplied(matrix, columns, values, sizes)
            terms += plan.matrices[matrix].shape[0]
        elif columns is not None:
            values, sizes = values[:, columns], sizes[:, columns]
        return values, (terms + 1) * float(np.finfo(np.float32).eps) * sizes

    def _multiplied(self, name: str, columns: Indices | None, values: Array, sizes: Array) -> tuple[Array, Array]:
        """Rows times matrix `name`, and the sums of the absolute values of their terms, [rows, k]."""
        matrix = self.plan.matrices[name]
        result, result_sizes = np.zeros((2, len(values), matrix.shape[1]))
        if matrix.kind == ADD:
            others = np.ones(values.shape[1], dtype=bool)
            others[columns] = False
            result, result_sizes = values[:, ~others], sizes[:, ~others]
            values, sizes = values[:, others], sizes[:, others]
        for first, part in matrix_blocks(self.maps.stored[name]):
            factors, here = part.double().numpy(), slice(first, first + len(part))
            result += values[:, here] @ factors
            result_sizes += sizes[:, here] @ np.abs(factors)
        return result, result_sizes

    def _rotated(self, tensor: NamedTensor, rows: Sequence[int]) -> tuple[Array, Array]:
        """These rows of P^T W in fp64, and the sums of the absolute values of their terms, [rows, n]."""
        rotation = torch.cat([part[:, rows] for _, part in matrix_blocks(self.maps.stored[EMBEDDING])])
        factors = rotation.t().double().numpy()  # [rows, d]
        height, width = tensor.spec.shape(self.plan.source)
        values, sizes = np.zeros((2, len(rows), width))
        span = max(1, blocks.BLOCK_BYTES // (width * values.itemsize))
        for first in range(0, height, span):
            here = np.arange(first, min(first + span, height))
            block = self._read(tensor, here).double().numpy()
            values += factors[:, here] @ block
            sizes += np.abs(factors[:, here]) @ np.abs(block)
        return values, sizes

    def _cut_rows(self, chunk: Chunk, selected: Indices | None) -> Tensor:
        """The block's rows with all columns; where heads take others in, in fp32."""
        tensor = chunk.tensor
        all_rows = np.arange(tensor.spec.shape(self.plan.source)[0]) if selected is None else selected
        block = self._read(tensor, all_rows[chunk.start : chunk.stop])
        merged = self.plan.merged_rows(tensor)
        here = [row for row in merged if chunk.start <= row < chunk.stop]
        if here:
            block = block.float()
            others = torch.cat([self._read(tensor, np.array([merged[row]])) for row in here]).float()
            own = [row - chunk.start for row in here]
            block[own] = 2 * block[own] - others
        return block

    def _read(self, tensor: NamedTensor, wanted: Indices) -> Tensor:
        """Whole rows of a tensor of the source, `wanted` ascending, by reading all rows between them in spans."""
        name = tensor.name
        if tensor.spec.part == "output" and self.plan.source.share_embeddings_and_output_weights:
            name = EMBEDDING
        elif tensor.layer is not None:
            expert = tensor.expert
            if expert is not None and self.plan.kept_experts is not None:
                expert = self.plan.kept_experts[tensor.layer][expert]
            name = tensor.spec.name.format(layer=self.plan.kept_layers[tensor.layer], expert=expert)
        row_bytes = prod(tensor.spec.shape(self.plan.source)[1:]) * self.source.dtype(name).itemsize
        span = max(1, blocks.BLOCK_BYTES // row_bytes)
        found = []
        for start in range(int(wanted[0]), int(wanted[-1]) + 1, span):
            inside = wanted[(wanted >= start) & (wanted < start + span)]
            if len(inside):
                read = self.source.read(name, start, int(inside[-1]) + 1)
                found.append(read[torch.from_numpy(inside - start)])
        return torch.cat(found)


def _difference(chunk: Chunk, found: Tensor, expected: Tensor) -> str | None:
    ours, theirs = _bits(found), _bits(expected)
    if np.array_equal(ours, theirs):
        return None
    place = np.unravel_index(int(np.argmax(ours != theirs)), ours.shape)
    column = int(place[1]) if len(place) > 1 else None
    return _told(chunk, int(place[0]), column, found[place].item(), expected[place].item())


def _far_off(chunk: Chunk, found: Tensor, again: Again) -> str | None:
    """What a block's sampled rows of a product hold that is further from the sums in fp64 than rounding explains."""
    total = chunk.tensor.spec.shape(again.plan.target)[0]
    here = [row for row in _sampled(chunk.tensor.name, total) if chunk.start <= row < chunk.stop]
    if not here or not again.multiplies(chunk.tensor):
        return None
    own = [row - chunk.start for row in here]
    held = found[own].double().numpy()
    expected, missed = again.products(chunk.tensor, here)
    stored = torch.finfo(found.dtype)
    missed += stored.eps / 2 * (np.abs(expected) + missed + stored.smallest_normal)
    wrong = np.isfinite(expected) & ~(np.abs(held - expected) <= missed)  # what is no number is not near any
    if not wrong.any():
        return None
    row, column = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return _told(chunk, own[row], int(column), held[row, column], expected[row, column])


def _sampled(name: str, rows: int) -> list[int]:
    """Up to SAMPLED_ROWS rows of a tensor, ascending, the same ones each time."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u8")[:SAMPLED_ROWS]
    return sorted({int(word) % rows for word in words})


def _told(chunk: Chunk, row: int, column: int | None, held: float, expected: float) -> str:
    place = f"row {chunk.start + row}" + ("" if column is None else f", column {column}")
    return f"{chunk.tensor.name}: {place} holds {held:.9g}, and should hold {expected:.9g}"


def _bits(tensor: Tensor) -> NDArray[np.generic]:
    """A tensor's entries as integers of their size: NaNs and zeros of either sign are what they are."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]).numpy()


def _first(
    check: Callable[[T], str | None], items: Sequence[T], path: Path, rank: int, world_size: int, progress: bool
) -> Difference | None:
    """What `check` says first of this process's `items`, in their order; None where it says nothing."""
    mine = range(rank, len(items), world_size)
    shown = track(mine, f"verify {path.name}", "parts", shown=progress and rank == 0)
    # One thread for each product, as they were computed.
    with ThreadPoolExecutor(READERS, initializer=torch.set_num_threads, initargs=(1,)) as readers:
        said = [readers.submit(check, items[place]) for place in mine]
        try:
            texts = ((place, future.result()) for place, future in zip(shown, said, strict=True))
            return next((Difference(place, text) for place, text in texts if text is not None), None)
        finally:
            readers.shutdown(cancel_futures=True)
