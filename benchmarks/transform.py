"""Memory and speed of the streaming transform and of `verify`, beside copying the same bytes. Prints a markdown table.

    python benchmarks/transform.py [--layers 9] [--processes 1 2] [--directory DIR]
    python benchmarks/transform.py --layers 32 --vocab-size 128256 --passes "prune HF -> Megatron"    Llama 3.1 8B

Makes a random bfloat16 Llama of Llama 3.1 8B's widths, converts it to Megatron and back, prunes it to the widths of
Llama-3.1-Minitron 4B, and verifies each result. Every process reports its peak memory above interpreter + torch; the
largest counts. What copying takes is measured right after each pass, with as many processes: they read the source's
bytes and write as many as the result has, spread evenly, through the same system calls. Before every measurement the
files that it reads leave the page cache (unless `--warm`), and what is written is brought to the disk (fsync). CPU
seconds are user + system: on a machine with other work they say more than wall time. Needs about three times the
model's size of disk, less without the conversions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.huggingface import hf_config
from minitron_nemo.arch.matrix import ADD, REPLACE
from minitron_nemo.arch.plan import MATRICES_NAME
from minitron_nemo.checkpoint.dense import MatrixFile
from minitron_nemo.checkpoint.huggingface import INDEX_FILE, SHARD_BYTES, hf_shapes
from minitron_nemo.checkpoint.safetensors_files import lay_out
from minitron_nemo.checkpoint.tensor_io import as_bytes, write_bytes

GIB = 2**30
COPY_BYTES = 2**20  # read at once

# label: source, destination, format, whether it prunes
PASSES = {
    "convert HF -> Megatron": ("hf", "megatron", "megatron", False),
    "convert Megatron -> HF": ("megatron", "back", "hf", False),
    "prune Megatron -> Megatron": ("megatron", "student", "megatron", True),
    "prune HF -> HF": ("hf", "student-hf", "hf", True),
    "prune HF -> Megatron": ("hf", "student", "megatron", True),
}


class Cost(NamedTuple):
    seconds: float
    cpu: float
    mib: float


def write_model(directory: Path, architecture: Architecture) -> None:
    """Random weights in files as the hub has them."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(architecture, "bfloat16")))
    noise = (torch.randn(2**23) * 0.02).bfloat16()
    files: dict[str, str] = {}
    shard: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in [*hf_shapes(architecture).items(), ("", ())]:
        filled = sum(2 * torch.Size(size).numel() for _, size in shard.values())
        if not name or filled + 2 * torch.Size(shape).numel() > SHARD_BYTES:
            file = directory / f"model-{len(set(files.values())) + 1:05d}.safetensors"
            files |= dict.fromkeys(shard, file.name)
            write_shard(file, shard, noise)
            shard = {}
        shard[name] = (torch.bfloat16, shape)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": files}))


def write_shard(file: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], noise: torch.Tensor) -> None:
    header, places = lay_out(file, tensors)
    with open(file, "wb", buffering=0) as opened:
        opened.write(header)
        for place in places.values():
            end = place.offset + place.shape[0] * place.row_bytes
            for offset in range(place.offset, end, noise.nbytes):
                write_bytes(opened.fileno(), offset, as_bytes(noise)[: end - offset])
        os.fsync(opened.fileno())


def make_plan(source: Architecture) -> Plan:
    """The width cut of Llama-3.1-Minitron-4B: random 3072 of 4096 channels, 9216 of 14336 neurons of each layer."""
    generator = torch.Generator().manual_seed(0)

    def choose(total: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))

    return Plan(
        source=source,
        target=source.resized({Axis.HIDDEN: 3072, Axis.FFN: 9216}),
        kept_layers=tuple(range(source.num_layers)),
        kept_hidden=choose(4096, 3072),
        kept_ffn=tuple(choose(14336, 9216) for _ in range(source.num_layers)),
    )


def save_repaired(plan: Plan, directory: Path) -> None:
    """Write the plan with random maps of every linear_fc2 and every reader of the residual stream, as repairs have."""
    before, after = plan.source, plan.target
    removed = before.ffn_hidden_size - after.ffn_hidden_size
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for layer in range(after.num_layers):
        prefix = f"decoder.layers.{layer}."
        shapes[prefix + "mlp.linear_fc2.weight"] = ADD, (removed, after.ffn_hidden_size)
        for reader in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            shapes[f"{prefix}{reader}.weight"] = REPLACE, (before.hidden_size, after.hidden_size)
    directory.mkdir()
    file = MatrixFile(directory, {name: shape for name, (_, shape) in shapes.items()})
    file.prepare()
    matrices = {name: file.write(name, kind, torch.randn(shape) * 0.01) for name, (kind, shape) in shapes.items()}
    replace(plan, matrices=matrices).save(directory / "plan.json")


def weight_files(directory: Path) -> list[Path]:
    files = (file for file in sorted(directory.iterdir()) if file.suffix in (".safetensors", ".distcp"))
    return [file for file in files if file.name != MATRICES_NAME]


def weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(directory))


class Gather:
    """What `launch.gather` is to a job, for processes that share a barrier and a directory."""

    def __init__(self, barrier: Any, directory: str, rank: int, world_size: int) -> None:
        self.barrier, self.directory, self.rank, self.world_size = barrier, Path(directory), rank, world_size

    def __call__(self, value: Any) -> list[Any]:
        (self.directory / str(self.rank)).write_bytes(pickle.dumps(value))
        self.barrier.wait()
        values = [pickle.loads((self.directory / str(rank)).read_bytes()) for rank in range(self.world_size)]
        self.barrier.wait()
        return values


def transform(rank: int, world_size: int, gather: Gather, work: Path, label: str, plan: Path) -> None:
    from minitron_nemo.checkpoint.transform import convert

    source, destination, to, prunes = PASSES[label]
    convert(
        work / source,
        work / destination,
        to,
        plan=Plan.load(plan) if prunes else None,
        rank=rank,
        world_size=world_size,
        gather=gather,
        progress=False,
    )


def verify(rank: int, world_size: int, gather: Gather, work: Path, label: str) -> None:
    from minitron_nemo.checkpoint.verify import verify

    source, destination, *_ = PASSES[label]
    found = verify(work / source, work / destination, rank=rank, world_size=world_size, progress=False)
    assert found is None, found


def copy(rank: int, world_size: int, gather: Gather, source: Path, written: int, scratch: Path) -> None:
    """Read this process's share of the source's bytes and write its share of `written` on the way."""
    share, buffer = written / weight_bytes(source), bytearray(COPY_BYTES)
    with open(scratch / f"copy-{rank}", "wb", buffering=0) as out:
        due, end = 0.0, 0
        for file in weight_files(source):
            size = file.stat().st_size
            with open(file, "rb", buffering=0) as opened:
                for offset in range(size * rank // world_size, size * (rank + 1) // world_size, COPY_BYTES):
                    count = os.preadv(opened.fileno(), [buffer], offset)
                    due += count * share
                    content = memoryview(buffer)[: min(count, round(due) - end)]
                    write_bytes(out.fileno(), end, content)
                    end += len(content)
        os.fsync(out.fileno())


def child(connection: Connection, gather: Gather, function: Callable, args: tuple) -> None:
    from minitron_nemo.checkpoint import transform as _  # noqa: F401 - what is imported is not what is measured

    torch.ones(8).bfloat16().float()  # torch loaded and warm, which is what the promise counts from
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import_module("torch.distributed.checkpoint")  # ends a Megatron directory: its memory counts, its second does not
    gather.barrier.wait()
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    function(gather.rank, gather.world_size, gather, *args)
    gather.barrier.wait()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    connection.send(Cost(time.perf_counter() - started, cpu, (after.ru_maxrss - baseline) / 1024))


def measured(processes: int, reads: list[Path], warm: bool, function: Callable, *args: Any) -> Cost:
    """What `function(rank, world size, gather, *args)` takes in that many processes that are new."""
    if not warm:
        for directory in reads:
            for file in weight_files(directory):
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    with tempfile.TemporaryDirectory() as directory:
        started = [
            context.Process(
                target=child,
                args=(pipes[rank][1], Gather(barrier, directory, rank, processes), function, args),
            )
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
            assert process.exitcode == 0
    costs = [receiving.recv() for receiving, _ in pipes]
    return Cost(max(c.seconds for c in costs), sum(c.cpu for c in costs), max(c.mib for c in costs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help="0.41 GiB each")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--directory", type=Path, default=None, help="where to work; default: a temporary directory")
    parser.add_argument("--repeat", type=int, default=3, help="the medians are printed")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES)[:4])
    parser.add_argument("--dense", action="store_true", help="prune with a plan that has matrices")
    parser.add_argument("--warm", action="store_true", help="leave what is read in the page cache")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="transform-", dir=options.directory))
    try:
        measure(work, options)
    finally:
        shutil.rmtree(work)


def measure(work: Path, options: argparse.Namespace) -> None:
    architecture = Architecture(
        options.layers, 4096, 14336, 32, 8, 128, options.vocab_size, 131072, rotary_base=500000.0
    )
    write_model(work / "hf", architecture)
    plain = make_plan(architecture)
    plan = work / "plan.json"
    plain.save(plan)
    if options.dense:
        save_repaired(plain, work / "repaired")
        plan = work / "repaired" / "plan.json"
    size = weight_bytes(work / "hf") / GIB
    cache = "warm" if options.warm else "cold"
    print(f"{size:.2f} GiB of bfloat16 weights, {options.layers} layers, {cache}, medians of {options.repeat}\n")
    print(
        "| pass | processes | GiB read + written | s | s copying | speed / copying | CPU s | CPU s copying | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for label in options.passes:
        for processes in options.processes:
            for row in rows(work, label, plan, processes, options):
                print(row, flush=True)


def rows(work: Path, label: str, plan: Path, processes: int, options: argparse.Namespace) -> list[str]:
    """A line for the pass, one for verifying its result."""
    source, destination = (work / name for name in PASSES[label][:2])
    passes, checks = [], []
    for _ in range(options.repeat):
        shutil.rmtree(destination, ignore_errors=True)
        ours = measured(processes, [source], options.warm, transform, work, label, plan)
        checked = measured(processes, [source, destination], options.warm, verify, work, label)
        written = weight_bytes(destination)
        if destination.name != "megatron":  # which later passes read
            shutil.rmtree(destination)
        scratch = work / "scratch"
        scratch.mkdir()
        copied = measured(processes, [source], options.warm, copy, source, written, scratch)
        shutil.rmtree(scratch)
        passes.append((ours, copied))
        checks.append((checked, copied))
    total = (weight_bytes(source) + written) / GIB
    return [
        line(label, processes, total, passes),
        line(f"verify {label.split(maxsplit=1)[1]}", processes, total, checks),
    ]


def line(label: str, processes: int, total: float, pairs: list[tuple[Cost, Cost]]) -> str:
    middle = len(pairs) // 2
    # Load from elsewhere changes within a run: a pass is compared with the copy that followed it.
    ratio = sorted(copied.seconds / ours.seconds for ours, copied in pairs)[middle]
    ours, copied = (
        Cost(*(sorted(values)[middle] for values in zip(*costs, strict=True))) for costs in zip(*pairs, strict=True)
    )
    peak = max(cost.mib for cost, _ in pairs)
    return (
        f"| {label} | {processes} | {total:.2f} | {ours.seconds:.1f} | {copied.seconds:.1f} | {ratio:.2f} | "
        f"{ours.cpu:.1f} | {copied.cpu:.1f} | {peak:.0f} |"
    )


if __name__ == "__main__":
    main()
