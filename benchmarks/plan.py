"""What `minitron plan` predicts of memory and time against runs on the CPU, layout by layout.

    python benchmarks/plan.py [--layers 12] [--sequence-length 256] [--microbatches 4] [--repeat 3]

The teacher's layers have SmolLM2-135M's shape, the student's two thirds of the FFN; weights are random, in bf16, and
the vocabulary is 8192, so that layers decide and not logits. Every layout runs in processes of its own, one thread
each, which first train a tiny model, so that all code is loaded. Memory is the peak of resident memory during the
updates, minus what was resident before the models were built, of every rank: shown is the rank with the largest error.
Seconds are of one update, the least of the repeated ones: CPU time of the busiest rank, which other work on the machine
hardly changes, and wall time of the slowest, which it does.

The device is measured in the same run: FLOP/s of a product of two square matrices, bytes/s of a copy. The share of
these FLOP/s that layers reach (`planning.time.EFFICIENCY` of a GPU) is fitted to the CPU time of the first layout, one
process; all other times are predictions. CPU time is what a rank computes: the steady state of the pipeline, which is
what as many microbatches again would add, and the optimizer.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.distributed import TCPStore

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.axes import Axis
from minitron_nemo.config import ClusterConfig, Recipe, TrainConfig
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import build_optimizer, ddp_config, params_dtype, update
from minitron_nemo.distillation.step import Step
from minitron_nemo.distillation.teacher import ColocatedTeacher
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.job import Job
from minitron_nemo.planning.memory import memory
from minitron_nemo.planning.time import distillation

# Processes, layout, whether layers are recomputed; the first calibrates.
LAYOUTS = [
    (1, Layout(), False),
    (2, Layout(), False),
    (2, Layout(2), False),
    (2, Layout(2, sequence_parallel=True), False),
    (2, Layout(1, 2), False),
    (2, Layout(1, 2), True),
    (2, Layout(1, 2, 2), False),
    (4, Layout(2, 2), False),
]


def main() -> None:
    options = parse()
    device = measured_device()
    print(
        f"1 thread: {device.peak_flops / 1e9:.0f} GFLOP/s bf16, {device.memory_bandwidth / 1e9:.1f} GB/s; load {load()}"
    )
    print("| layout | recompute | GB | predicted | error | CPU s | predicted | error | wall s | predicted |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    share = None
    for processes, layout, recompute in LAYOUTS:
        job = job_of(options, processes, layout, recompute)
        ranks = run(processes, layout, recompute, options)
        share = share or fitted(job, device, ranks)
        print(row(job, device, share, ranks), flush=True)
    print(f"share of the peak, fitted to the first: {share:.3f}; load {load()}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--microbatches", type=int, default=4, help="sequences of an update")
    parser.add_argument("--chunk-bytes", type=int, default=16 * 1024**2)
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


def job_of(options: argparse.Namespace, processes: int, layout: Layout, recompute: bool) -> Job:
    teacher = Architecture(
        num_layers=options.layers,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=64,
        vocab_size=options.vocab_size,
        max_position_embeddings=8192,
    )
    train = TrainConfig(steps=1, global_batch_size=options.microbatches, recompute=recompute)
    recipe = Recipe(name="plan", train=train, cluster=ClusterConfig(processes_per_node=processes))
    recipe.data.sequence_length = options.sequence_length
    recipe.distill.chunk_bytes = options.chunk_bytes
    student = teacher.resized({Axis.FFN: 1024})
    return Job(recipe, teacher, teacher, student, layout, layout, processes)


class Measured(NamedTuple):
    """Of one rank: seconds of an update, bytes at the peak."""

    wall: float
    cpu: float
    peak: float


def row(job: Job, device: Device, share: float, ranks: list[Measured]) -> str:
    predicted = [each.total for each in memory(job, device) if each.step == "distill"]
    # Ranks are numbered pipeline last.
    stages = [rank * job.layout.pipeline_model_parallel_size // len(ranks) for rank in range(len(ranks))]
    pairs = [(each.peak, predicted[stage]) for each, stage in zip(ranks, stages, strict=True)]
    held, expected = max(pairs, key=lambda pair: abs(pair[1] / pair[0] - 1))
    cpu, work = max(each.cpu for each in ranks), computing(job, device, share)
    cells = [
        f"{job.layout} dp={job.layout.data_parallel_size(len(ranks))}",
        "yes" if job.recipe.train.recompute else "",
        *(f"{held / 1e9:.3f}", f"{expected / 1e9:.3f}", f"{expected / held - 1:+.1%}"),
        *(f"{cpu:.2f}", f"{work:.2f}", f"{work / cpu - 1:+.1%}"),
    ]
    if len(ranks) > (os.cpu_count() or 1):  # they wait for each other's cores
        return f"| {' | '.join([*cells, '', ''])} |"
    wall = distillation(job, job.segments[-1], device, share).seconds
    return f"| {' | '.join([*cells, f'{max(each.wall for each in ranks):.2f}', f'{wall:.2f}'])} |"


def computing(job: Job, device: Device, share: float) -> float:
    """Seconds that the busiest rank computes for an update."""
    segment = job.segments[-1]
    twice = replace(segment, global_batch_size=2 * segment.global_batch_size)
    once, both = (distillation(job, each, device, share) for each in (segment, twice))
    return both.seconds - once.seconds + once.parts["optimizer"]


def fitted(job: Job, device: Device, ranks: list[Measured]) -> float:
    """The share of the peak at which the prediction is what was measured."""
    seconds, least, most = max(each.cpu for each in ranks), 0.0, 10.0
    for _ in range(50):
        middle = (least + most) / 2
        least, most = (middle, most) if computing(job, device, middle) > seconds else (least, middle)
    return most


def load() -> str:
    return f"{os.getloadavg()[0]:.0f}"


def measured_device() -> Device:
    """One thread of this machine, the best of some tries; messages between processes are not counted."""
    torch.set_num_threads(1)
    size = 1024
    left, right = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(32 * 1024**2)
    target = torch.empty_like(source)
    flops, traffic = 0.0, 0.0
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(left, right)
        flops = max(flops, 2 * size**3 / (time.perf_counter() - start))
        start = time.perf_counter()
        target.copy_(source)
        traffic = max(traffic, 2 * source.nbytes / (time.perf_counter() - start))
    here = Device.of_recipe(Recipe(name="plan", train=TrainConfig(steps=1, global_batch_size=1)))
    return replace(here, peak_flops=flops, memory_bandwidth=traffic)


def run(processes: int, layout: Layout, recompute: bool, options: argparse.Namespace) -> list[Measured]:
    """Every rank is a new process, forked, so that it need not import everything anew."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        tasks = [
            pool.apply_async(on_rank, (rank, processes, store.port, layout, recompute, options))
            for rank in range(processes)
        ]
        return [task.get() for task in tasks]


def on_rank(
    rank: int, processes: int, port: int, layout: Layout, recompute: bool, options: argparse.Namespace
) -> Measured:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    launch.join_job(launch.Rendezvous(TCPStore("127.0.0.1", port, is_master=False), rank, processes))
    launch.initialize(layout, seed=1)
    job = job_of(options, processes, layout, recompute)
    small = {Axis.HIDDEN: 64, Axis.FFN: 64, Axis.LAYERS: layout.stages, Axis.VOCAB: 256}
    tiny = replace(job, teacher=job.teacher.resized(small), student=job.student.resized(small))
    train(tiny, 1)
    gc.collect()
    before = psutil.Process().memory_info().rss
    return train(job, options.repeat)._replace(peak=peak() - before)


def train(job: Job, repeat: int) -> Measured:
    """An update, and then the ones that are measured."""
    config, layout, length = job.recipe.train, job.layout, job.recipe.data.sequence_length
    dtype = params_dtype(config)
    student = build_model(job.student, layout, dtype=dtype, ddp=ddp_config(config), recompute=config.recompute)
    teacher = ColocatedTeacher(
        randomised(build_model(job.teacher, layout, dtype=dtype)),
        sequence_length=length,
        micro_batch_size=1,
        buffer_bytes=job.recipe.teacher.buffer_bytes,
        student_layout=layout,
    )
    step = Step(randomised(student), teacher, DistillationObjective.from_config(job.recipe.distill))
    optimizer = build_optimizer(config, student)
    count = config.global_batch_size // layout.data_parallel_size(job.world_size)
    batches = random_batches(job.student.vocab_size, length, count)
    wall = cpu = float("inf")
    for turn in range(repeat + 1):
        if turn == 1:
            forget_peak()  # the optimizer's state is there from the first update on; building is no update
        launch.barrier()
        start, spent = time.perf_counter(), time.process_time()
        step(batches)
        update(optimizer)
        if turn:
            wall, cpu = min(wall, time.perf_counter() - start), min(cpu, time.process_time() - spent)
    return Measured(wall, cpu, 0.0)


def forget_peak() -> None:
    """Begin the kernel's record of the largest resident size anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes resident at most since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


@torch.no_grad()
def randomised(model: Model) -> Model:
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    return model


def random_batches(vocab_size: int, length: int, count: int) -> list[dict[str, Any]]:
    shape = (1, length)
    return [
        {
            "tokens": torch.randint(0, vocab_size, shape),
            "labels": torch.randint(0, vocab_size, shape),
            "position_ids": torch.arange(length).expand(shape),
            "token_weights": torch.ones(shape),
            "sample_ids": [str(index)],
        }
        for index in range(count)
    ]


if __name__ == "__main__":
    main()
