"""Memory and speed of the streaming transform, beside copying the same bytes. Prints a markdown table.

    python benchmarks/transform.py [--gib 4] [--directory DIR]

Makes a random bfloat16 Llama of about `--gib` GiB, converts it to Megatron and back, prunes it, each in a process of
its own that reports its peak memory above interpreter + torch. What copying takes is measured right after each pass:
reading the source's bytes and writing the result's, by `cp` where they are as many, by `cat` and `head` where the
result is smaller; files are brought to the disk (fsync) in both. CPU seconds are user + system: on a machine with
other work they say more than wall time. Needs about five times `--gib` of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.counts import parameters
from minitron_nemo.arch.huggingface import hf_config
from minitron_nemo.arch.plan import ADD, MATRICES_NAME, REPLACE
from minitron_nemo.checkpoint.dense import MatrixFile
from minitron_nemo.checkpoint.huggingface import hf_shapes
from minitron_nemo.checkpoint.safetensors_files import lay_out
from minitron_nemo.checkpoint.tensor_io import as_bytes

GIB = 2**30


def architecture_of(gib: float) -> Architecture:
    """Llama-3.1-8B's widths with as many layers as fill `gib` GiB; a smaller vocabulary leaves room for layers."""
    one = Architecture(1, 4096, 14336, 32, 8, 128, 32000, 8192, rotary_base=500000.0)
    layer = 2 * (parameters(one.resized({Axis.LAYERS: 2})) - parameters(one))
    layers = max(1, round((gib * GIB - 2 * parameters(one)) / layer) + 1)
    return one.resized({Axis.LAYERS: layers})


def write_model(directory: Path, architecture: Architecture) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(architecture, "bfloat16")))
    tensors = {name: (torch.bfloat16, shape) for name, shape in hf_shapes(architecture).items()}
    header, places = lay_out(directory / "model.safetensors", tensors)
    noise = torch.randint(0, 2**15, (2**23,), dtype=torch.int16)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(header)
        for place in places.values():
            rest = place.shape[0] * place.row_bytes
            while rest:
                rest -= file.write(as_bytes(noise)[:rest])
        os.fsync(file.fileno())


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


def weight_bytes(directory: Path) -> int:
    files = (file for file in directory.iterdir() if file.suffix in (".safetensors", ".distcp"))
    return sum(file.stat().st_size for file in files if file.name != MATRICES_NAME)


def copy_seconds(source: Path, result_bytes: int, scratch: Path) -> tuple[float, float]:
    """Wall and CPU time to read the source's weight files and to write `result_bytes` and bring them to the disk."""
    files = [file for file in source.iterdir() if file.suffix in (".safetensors", ".distcp")]
    started, cpu_before = time.perf_counter(), cpu_seconds()
    if result_bytes == weight_bytes(source):
        subprocess.run(["cp", *map(str, files), str(scratch)], check=True)
    else:
        with open(os.devnull, "wb") as nothing:
            subprocess.run(["cat", *map(str, files)], stdout=nothing, check=True)
        with open(scratch / "part", "wb") as part:
            subprocess.run(["head", "-c", str(result_bytes), *map(str, files)], stdout=part, check=True)
    for file in scratch.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_before
    for file in scratch.iterdir():
        file.unlink()
    return seconds, cpu


def cpu_seconds() -> float:
    """User and system time of this process and of those it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_child(arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(source: str, destination: str, to: str, plan: str) -> None:
    from minitron_nemo.checkpoint.transform import convert

    # torch loaded and warm, which is what the promise counts from
    torch.ones(8).bfloat16().float()
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu_before = time.perf_counter(), cpu_seconds()
    loaded = Plan.load(Path(plan)) if plan else None
    convert(Path(source), Path(destination), to, plan=loaded, progress=False)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mib": peak / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--directory", type=Path, default=None, help="where to work; default: a temporary directory")
    parser.add_argument("--repeat", type=int, default=3, help="the medians are printed")
    parser.add_argument("--dense", action="store_true", help="measure a plan with matrices instead")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    work = Path(tempfile.mkdtemp(prefix="transform-", dir=options.directory))
    try:
        measure(work, options.gib, options.repeat, options.dense)
    finally:
        shutil.rmtree(work)


def measure(work: Path, gib: float, repeat: int, dense: bool) -> None:
    architecture = architecture_of(gib)
    write_model(work / "hf", architecture)
    plain = make_plan(architecture)
    plain.save(work / "plan.json")
    if dense:
        save_repaired(plain, work / "repaired")
    scratch = work / "scratch"
    scratch.mkdir()
    passes = [
        ("convert HF -> Megatron", "hf", "megatron", "megatron", ""),
        ("convert Megatron -> HF", "megatron", "back", "hf", ""),
        ("prune Megatron -> Megatron", "megatron", "student", "megatron", str(work / "plan.json")),
        ("prune HF -> HF", "hf", "student-hf", "hf", str(work / "plan.json")),
    ]
    if dense:
        passes = [("prune HF -> HF, dense maps", "hf", "student-dense", "hf", str(work / "repaired" / "plan.json"))]
    size = weight_bytes(work / "hf") / GIB
    print(f"{size:.2f} GiB of bfloat16 weights, {architecture.num_layers} layers, one process, median of {repeat}\n")
    print("| pass | GiB read + written | s | s copying | speed / copying | CPU s | CPU s copying | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for label, source, destination, to, plan in passes:
        rows = []
        for _ in range(repeat):
            shutil.rmtree(work / destination, ignore_errors=True)
            ours = run_child([str(work / source), str(work / destination), to, plan])
            written = weight_bytes(work / destination)
            # cp, where nothing is cut: torch_dist blobs add a little to the bytes
            target = weight_bytes(work / source) if not plan else written
            rows.append((ours["seconds"], ours["cpu"], *copy_seconds(work / source, target, scratch), ours["mib"]))
        # Load from elsewhere changes within a run: a pass is compared with the copy that followed it.
        ratio = sorted(row[2] / row[0] for row in rows)[repeat // 2]
        seconds, cpu, copying, copying_cpu, _ = (sorted(column)[repeat // 2] for column in zip(*rows, strict=True))
        total = (weight_bytes(work / source) + weight_bytes(work / destination)) / GIB
        peak = max(row[-1] for row in rows)
        cells = f"{total:.2f} | {seconds:.1f} | {copying:.1f} | {ratio:.2f} | {cpu:.1f} | {copying_cpu:.1f}"
        print(f"| {label} | {cells} | {peak:.0f} |", flush=True)
        if destination.startswith(("student", "back")):
            shutil.rmtree(work / destination)


if __name__ == "__main__":
    main()
