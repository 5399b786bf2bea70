"""The one streaming pass: source -> Plan -> sink, a block of rows at a time.

Import, export, resharding and pruning are all this pass. Memory is bounded by a few blocks whatever the model's size.
Blocks and the parts that they make up are fixed by the result alone: any number of processes, each with its share of
the parts, writes the same bytes, and what one attempt has finished the next one does not do again.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from minitron_nemo.arch import Architecture, Plan
from minitron_nemo.arch.plan import FILE_NAME as PLAN_FILE
from minitron_nemo.arch.plan import MATRICES_NAME
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.checkpoint.blocks import Chunk, parts
from minitron_nemo.checkpoint.dense import DenseMaps, check_matrices
from minitron_nemo.checkpoint.files import commit_partial, partial_path
from minitron_nemo.checkpoint.fingerprint import block_hash, record_fingerprints
from minitron_nemo.checkpoint.journal import Finished, Journal
from minitron_nemo.checkpoint.sink import Sink, open_sink
from minitron_nemo.checkpoint.slicer import BLOCKS_AHEAD, Slicer
from minitron_nemo.checkpoint.source import Source, open_source
from minitron_nemo.errors import UserError
from minitron_nemo.progress import Progress


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
    check_plan(opened, plan)
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

    Process `rank` of `world_size` writes every `world_size`-th part; `barrier` waits for all. Process 0 puts the result
    in place after all have written, with the fingerprints of what was computed. What a killed or stopped job has
    finished stays beside `sink.path` and is not done again by the next one. After a write or a read that fails nothing
    stays: it raises UserError, for a full disk as well.
    """
    check_plan(source, plan)
    partial = partial_path(sink.path)
    journal = Journal(source, plan, sink)
    try:
        if rank == 0:
            check_matrices(plan)
            if not journal.begin():
                sink.prepare()
                journal.commit_layout()
        barrier()
        _write_parts(source, plan, sink, journal, rank, world_size, progress and rank == 0)
        barrier()
        if rank == 0:
            _finish(source, plan, sink, journal)
        barrier()
    except (OSError, UserError) as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{sink.path}: not written: {error.strerror or error}; what was there is untouched") from error


def _write_parts(
    source: Source, plan: Plan, sink: Sink, journal: Journal, rank: int, world_size: int, show: bool
) -> None:
    """Write this process's parts that are not finished; each goes to the disk while the next one is computed."""
    numbered = list(enumerate(parts(plan.target, sink.dtypes)))
    mine = [(number, part) for number, part in numbered[rank::world_size] if journal.finished(number) is None]
    done = sum(journal.finished(number) is not None for number, _ in numbered)
    if show and done:
        print(f"[transform] {sink.path.name}: {done} of {len(numbered)} parts are finished already", flush=True)
    maps = DenseMaps(plan)
    blocks = _shown([chunk for _, part in mine for chunk in part], sink, show)
    computed = _ahead(blocks, Slicer(source, plan, maps, sink.dtypes))
    with ThreadPoolExecutor(1) as syncing:
        behind: Future[None] | None = None
        for number, part in mine:
            digests: list[str] = []
            files, places = sink.write(_noting(islice(computed, len(part)), digests), number)
            if behind is not None:
                behind.result()
            behind = syncing.submit(journal.record, number, Finished(files, places, digests))
        if behind is not None:
            behind.result()
    if maps.flops and show:
        gflops = maps.flops / 1e9
        print(f"[transform] dense maps: {gflops:.1f} GFLOP, {gflops / maps.seconds:.1f} GFLOP/s a thread")


def _finish(source: Source, plan: Plan, sink: Sink, journal: Journal) -> None:
    """Write what is not weights, and put the whole in place."""
    partial = partial_path(sink.path)
    runs = parts(plan.target, sink.dtypes)
    finished = [journal.finished(number) for number in range(len(runs))]
    if None in finished:
        raise UserError(f"{sink.path}: part {finished.index(None)} was not written; start again")
    records = [record for record in finished if record is not None]
    sink.finish(source, [place for record in records for place in record.places])
    if plan != Plan.identity(source.architecture):
        _save_plan(plan, partial)
    names = (chunk.tensor.name for part in runs for chunk in part)
    hashes = zip(names, (digest for record in records for digest in record.digests), strict=True)
    files = sorted({partial / name for record in records for name in record.files})
    record_fingerprints(partial, plan.target, sink.dtypes, hashes, files)
    journal.end()
    commit_partial(sink.path)


class Computed(NamedTuple):
    """A block of the result, of the data type that it is written in, and its hash."""

    chunk: Chunk
    rows: torch.Tensor
    digest: str


def _noting(computed: Iterable[Computed], digests: list[str]) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """Blocks with their rows; their hashes go to `digests`."""
    for chunk, rows, digest in computed:
        digests.append(digest)
        yield chunk, rows


def _ahead(blocks: Iterable[Chunk], slicer: Callable[[Chunk], torch.Tensor]) -> Iterator[Computed]:
    """Blocks in order; threads compute the next ones while the caller writes one."""

    def compute(chunk: Chunk) -> Computed:
        rows = slicer(chunk)
        return Computed(chunk, rows, block_hash(rows))

    # Sums of products are in the same order for any number of threads if each product has one.
    with ThreadPoolExecutor(BLOCKS_AHEAD, initializer=torch.set_num_threads, initargs=(1,)) as readers:
        pending: deque[Future[Computed]] = deque()
        for chunk in blocks:
            pending.append(readers.submit(compute, chunk))
            if len(pending) > BLOCKS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _save_plan(plan: Plan, directory: Path) -> None:
    """The Plan and its matrices; the same file once more where the file system can."""
    plan.save(directory / PLAN_FILE)
    if plan.matrices and plan.directory is not None:
        (directory / MATRICES_NAME).unlink(missing_ok=True)
        try:
            os.link(plan.directory / MATRICES_NAME, directory / MATRICES_NAME)
        except OSError:
            shutil.copyfile(plan.directory / MATRICES_NAME, directory / MATRICES_NAME)


def check_plan(source: Source, plan: Plan) -> None:
    """Raise UserError unless `plan` is for the source's architecture."""
    for field in fields(Architecture):
        planned, found = getattr(plan.source, field.name), getattr(source.architecture, field.name)
        if planned != found:
            raise UserError(f"{source.path}: the plan is for another model: {field.name} is {found}, planned {planned}")
    if plan.rotated and not plan.matrices:
        raise UserError(f"{source.path}: the plan is to rotate hidden channels and has no matrices yet; repair first")


def _shown(blocks: list[Chunk], sink: Sink, show: bool) -> Iterator[Chunk]:
    """The blocks, with a progress bar over their bytes."""
    sizes = [chunk.nbytes(sink.architecture, sink.dtypes) for chunk in blocks]
    with Progress(f"write {sink.path.name}", sum(sizes), "bytes", shown=show) as bar:
        for chunk, size in zip(blocks, sizes, strict=True):
            yield chunk
            bar.advance(size)
