"""The one streaming pass: source -> Plan -> sink, a block of rows at a time.

Import, export, resharding and pruning are all this pass. Memory is bounded by a few blocks whatever the model's size.
Blocks and the parts that they make up are fixed by the result alone: any number of processes, each with its share of
the parts, writes the same bytes, and what one attempt has finished the next one does not do again.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from minitron_nemo.arch import Architecture, Plan
from minitron_nemo.arch.plan import FILE_NAME as PLAN_FILE
from minitron_nemo.arch.plan import MATRICES_NAME
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.checkpoint.blocks import Chunk, parts
from minitron_nemo.checkpoint.dense import DenseMaps, check_matrices
from minitron_nemo.checkpoint.files import commit_partial, fsync_below, partial_path
from minitron_nemo.checkpoint.fingerprint import block_hash, record_fingerprints
from minitron_nemo.checkpoint.journal import Finished, Journal
from minitron_nemo.checkpoint.sink import Sink, check_destination, open_sink
from minitron_nemo.checkpoint.slicer import BLOCKS_AHEAD, Slicer
from minitron_nemo.checkpoint.source import Source, open_source
from minitron_nemo.errors import UserError, alone, on_every_rank
from minitron_nemo.progress import Progress

T = TypeVar("T")


def convert(
    source: Path,
    destination: Path,
    to: str,
    *,
    plan: Plan | None = None,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Any], list[Any]] = alone,
    progress: bool = True,
) -> None:
    """Write `source`, cut to `plan`, to directory `destination` in format `to` (one of `sink.FORMATS`).

    Weights keep their data type where `dtype` is None; GGUF becomes bfloat16. All processes of a job call this with
    their `rank` and the job's `gather` (see `on_every_rank`). An existing checkpoint at `destination` is replaced at
    the end, in one piece. Raises UserError, on every rank if on one.
    """

    def opened() -> tuple[Source, Plan, Sink]:
        read = open_source(Path(source))
        wanted = plan or Plan.identity(read.architecture)
        check_plan(read, wanted)
        to_dtype = torch.bfloat16 if dtype is None and read.format == "gguf" else dtype
        dtypes = {tensor.name: to_dtype or read.dtype(wanted.source_name(tensor)) for tensor in tensors(wanted.target)}
        written = open_sink(Path(destination), to, wanted.target, dtypes)
        # A network file system may take what another process has looked for in vain as missing for half a minute.
        if rank == 0:
            check_destination(written, Path(source))
        return read, wanted, written

    read, wanted, written = on_every_rank(opened, rank, gather)
    transform(read, wanted, written, rank=rank, world_size=world_size, gather=gather, progress=progress)


def transform(
    source: Source,
    plan: Plan,
    sink: Sink,
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Any], list[Any]] = alone,
    progress: bool = True,
) -> None:
    """Carry `plan` out: fill `sink` from `source` and put it in place, with the plan in it unless it keeps everything.

    `progress` shows the way on process 0, and the speed of the products with the Plan's matrices.

    Process `rank` of `world_size` writes every `world_size`-th part; `gather` is the job's (see `on_every_rank`).
    Process 0 puts the result in place after all have written, with the fingerprints of what was computed. What a job
    has finished that was killed, or stopped, or could not read or write, stays beside `sink.path` and is not done again
    by the next one. Raises UserError, on every rank if on one, for a full disk as well.
    """
    journal = Journal(source, plan, sink)

    def everywhere(work: Callable[[], T]) -> T:
        return on_every_rank(lambda: _told(sink.path, work), rank, gather)

    try:
        everywhere(lambda: _begin(source, plan, sink, journal) if rank == 0 else None)
        mine = everywhere(lambda: _write_parts(source, plan, sink, journal, rank, world_size, progress and rank == 0))
        # By the job's own connections: a file that another node has just written may not be seen here yet.
        finished = {number: record for records in gather(mine) for number, record in records.items()}
        everywhere(lambda: _finish(source, plan, sink, journal, finished) if rank == 0 else None)
    except UserError:
        if rank == 0:
            journal.clean()
        raise


def _told(path: Path, work: Callable[[], T]) -> T:
    """What `work` returns. Raises UserError for what the file system refuses."""
    try:
        return work()
    except OSError as error:
        raise UserError(
            f"{path}: not written: {error.strerror or error}; what was there is untouched; start again to go on"
        ) from error


def _begin(source: Source, plan: Plan, sink: Sink, journal: Journal) -> None:
    """Check what the Plan brings along, and lay the files out unless an earlier attempt is gone on with."""
    check_plan(source, plan)
    check_matrices(plan)
    if not journal.begin():
        sink.prepare()
        journal.commit_layout()


def _write_parts(
    source: Source, plan: Plan, sink: Sink, journal: Journal, rank: int, world_size: int, show: bool
) -> dict[int, str]:
    """Write this process's parts that are not finished, and return the records of all that are its own.

    Each part goes to the disk while the next one is computed. Records are as their files have them, so that what is
    made of them has the same bytes whoever wrote the part, and when.
    """
    numbered = list(enumerate(parts(plan.target, sink.dtypes)))
    own = numbered[rank::world_size]
    records = {number: record for number, _ in own if (record := journal.finished(number)) is not None}
    left = [(number, part) for number, part in own if number not in records]
    if show and (done := sum(journal.finished(number) is not None for number, _ in numbered)):
        print(f"[transform] {sink.path.name}: {done} of {len(numbered)} parts are finished already", flush=True)
    maps = DenseMaps(plan)
    blocks = _shown([chunk for _, part in left for chunk in part], sink, show)
    computed = _ahead(blocks, Slicer(source, plan, maps, sink.dtypes))
    with ThreadPoolExecutor(1) as syncing:
        behind: Future[None] | None = None
        for number, part in left:
            digests: list[str] = []
            files, places = sink.write(_noting(islice(computed, len(part)), digests), number)
            if behind is not None:
                behind.result()
            records[number] = Finished(files, places, digests).to_json()
            behind = syncing.submit(journal.record, number, records[number])
        if behind is not None:
            behind.result()
    if maps.flops and show:
        gflops = maps.flops / 1e9
        print(f"[transform] dense maps: {gflops:.1f} GFLOP, {gflops / maps.seconds:.1f} GFLOP/s a thread")
    return records


def _finish(source: Source, plan: Plan, sink: Sink, journal: Journal, finished: Mapping[int, str]) -> None:
    """Write what is not weights, and put the whole in place; `finished` are the records of all parts."""
    partial = partial_path(sink.path)
    runs = parts(plan.target, sink.dtypes)
    records = [Finished.from_json(finished[number]) for number in range(len(runs))]
    sink.finish(source, [place for record in records for place in record.places])
    if plan != Plan.identity(source.architecture):
        _save_plan(plan, partial)
    names = (chunk.tensor.name for part in runs for chunk in part)
    hashes = zip(names, (digest for record in records for digest in record.digests), strict=True)
    files = sorted({partial / name for record in records for name in record.files})
    record_fingerprints(partial, plan.target, sink.dtypes, hashes, files)
    fsync_below(partial)  # while the parts can still be gone on with
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
