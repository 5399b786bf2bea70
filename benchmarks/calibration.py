"""What calibration costs beyond the bare forward pass, in time and in memory.

    python benchmarks/calibration.py [--layers 12] [--hidden-size 576] [--sequence-length 1024] [--precision fp32]
    torchrun --nproc-per-node 2 benchmarks/calibration.py --microbatches 16 [--pipeline 2]

A model of SmolLM2-135M's width with random weights; both passes go through the same Megatron calls and neither
computes logits. Passes alternate without other threads. Ratios are of the least CPU time of each on rank 0; wall time,
between two barriers, is what layouts differ in: the same microbatches, dealt out to data-parallel ranks or sent through
the stages. Memory is the peak of the process's resident set (Linux), from a fresh high-water mark before each pass.
Measured on a CPU only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from minitron_nemo.arch import Architecture
from minitron_nemo.importance.collect import Collector
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout

TIME_TARGET, MEMORY_TARGET = 1.10, 1.05


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    launch.join_job()
    layout = Layout(pipeline_model_parallel_size=options.pipeline)
    launch.initialize(layout, seed=1)
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = random_batches(options)[dp_rank::dp_size]
    model = random_model(options, layout)

    def bare() -> None:
        shape = options.sequence_length, options.micro_batch_size
        forward_only(model, batches, len(batches), *shape, lambda output, batch: None)

    def calibration() -> None:
        collector = Collector(
            model.chunks, model.architecture, batches, sequence_parallel=False, on_microbatch=lambda: None
        )
        with collector:
            bare()
        collector.scores(model_fingerprint="", data_fingerprint="", settings={})

    passes = {"bare forward": bare, "calibration": calibration}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    walls: dict[str, list[float]] = {name: [] for name in passes}
    peaks: dict[str, list[int]] = {name: [] for name in passes}
    for run in passes.values():
        run()
    for _ in range(options.repeat):
        for name, run in passes.items():
            peak, taken, wall = measured(run)
            seconds[name].append(taken)
            walls[name].append(wall)
            peaks[name].append(peak)
    if launch.rank() == 0:
        report(options, model.architecture, seconds, walls, peaks)
    launch.shutdown()


def report(
    options: argparse.Namespace,
    shape: Architecture,
    seconds: dict[str, list[float]],
    walls: dict[str, list[float]],
    peaks: dict[str, list[int]],
) -> None:
    tokens = options.microbatches * options.micro_batch_size * options.sequence_length
    print(
        f"{shape.num_layers} layers, hidden {shape.hidden_size}, ffn {shape.ffn_hidden_size}, {options.precision}, "
        f"{options.microbatches} x {options.micro_batch_size} x {options.sequence_length} tokens, "
        f"{launch.world_size()} processes, pp={options.pipeline}"
    )
    print(f"{'':<14}{'CPU s':>8}{'wall s':>8}{'tokens/s':>10}{'peak MiB':>10}")
    for name, times in seconds.items():
        taken, wall, peak = min(times), sorted(walls[name])[options.repeat // 2], min(peaks[name])
        print(f"{name:<14}{taken:>8.2f}{wall:>8.2f}{tokens / wall:>10.0f}{peak / 2**20:>10.0f}")
    time_ratio = min(seconds["calibration"]) / min(seconds["bare forward"])
    memory_ratio = min(peaks["calibration"]) / min(peaks["bare forward"])
    print(f"{'ratio':<14}{time_ratio:>8.3f}{'':>18}{memory_ratio:>10.3f}")
    print(f"{'target':<14}{TIME_TARGET:>8.3f}{'':>18}{MEMORY_TARGET:>10.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--ffn-hidden-size", type=int, default=1536)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--pipeline", type=int, default=1, help="stages; what processes are left are data-parallel")
    parser.add_argument("--repeat", type=int, default=5)
    return parser.parse_args()


def random_model(options: argparse.Namespace, layout: Layout) -> Model:
    shape = Architecture(
        num_layers=options.layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.ffn_hidden_size,
        num_attention_heads=options.hidden_size // 64,
        num_query_groups=options.hidden_size // 64,
        kv_channels=64,
        vocab_size=49152,
        max_position_embeddings=8192,
        share_embeddings_and_output_weights=True,
    )
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    model = build_model(shape, layout, dtype=dtype)
    with torch.no_grad():
        for parameter in model.chunks[0].parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    if model.output_layer is not None:
        model.output_layer.mode = "hidden"
    return model


def random_batches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every tenth token does not count."""
    size = options.micro_batch_size, options.sequence_length
    weights = torch.ones(size)
    weights[:, ::10] = 0
    positions = torch.arange(options.sequence_length).expand(size)
    return [
        {"tokens": torch.randint(0, 49152, size), "position_ids": positions, "token_weights": weights}
        for _ in range(options.microbatches)
    ]


def measured(run: Callable[[], None]) -> tuple[int, float, float]:
    """Peak resident bytes of the process, its CPU seconds and wall seconds of all processes during `run`."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    launch.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    cpu = time.process_time() - cpu
    launch.barrier()
    wall = time.perf_counter() - wall
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024, cpu, wall


if __name__ == "__main__":
    main()
