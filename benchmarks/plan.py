"""What `minitron plan` predicts of memory and time against runs on the CPU, layout by layout.

    python benchmarks/plan.py [--layers 12] [--sequence-length 256] [--microbatches 4] [--repeat 3]

The teacher's layers have SmolLM2-135M's shape, the student's two thirds of the FFN; weights are random, in bf16, and
the vocabulary is 8192, so that layers decide and not logits. Every layout runs in processes of its own, one thread
each, which first train a tiny model, so that all code is loaded.

Memory is the peak of resident memory during the updates without pages of files, which are the libraries' code, minus
what was resident before the models were built, of every rank: shown is the rank with the largest error. It is measured
in a run of its own, in which glibc returns every block above 64 KiB to the system once it is freed, so that what is
resident is what is held. By default glibc keeps most of them, in pieces that the next request may not fit into: what is
resident then is shown beside it, of the same rank.

Seconds are of one update, the least of the repeated ones: CPU time of the busiest rank, and wall time of the slowest. A
layout of fewer processes than there are cores runs in several copies at once, since a core whose neighbour is idle is
faster. Other work on the machine changes wall time, and CPU time less.

The device is measured in the same run, on two cores at once: FLOP/s of a product of two square matrices, bytes/s of a
copy, and for each kind of message bytes/s of CPU time, for a message as large as the residual stream. The share of
these FLOP/s that layers reach (`planning.time.EFFICIENCY` of a GPU) is fitted to the CPU time of the first layout, one
process; all other times are predictions. CPU time is what a rank computes: the steady state of the pipeline, which is
what as many microbatches again would add, the messages after the last one, and the optimizer.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.distributed import TCPStore

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.axes import Axis
from minitron_nemo.config import ClusterConfig, Recipe, TrainConfig
from minitron_nemo.distillation.communication import Transfer
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import build_optimizer, ddp_config, params_dtype, update
from minitron_nemo.distillation.step import Step
from minitron_nemo.distillation.teacher import ColocatedTeacher
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device, reset_peak_memory
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.job import Job
from minitron_nemo.planning.memory import memory
from minitron_nemo.planning.time import distillation

RETURNED_BYTES = 64 * 1024  # blocks from this size on go back to the system when they are freed
M_MMAP_THRESHOLD = -3  # of mallopt(3)

HIDDEN = 576

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
    here = run(2, speeds, options)[0]
    rates = ", ".join(f"{kind} {rate / 1e9:.2f}" for kind, rate in here.messages.items())
    print(
        f"1 thread: {here.flops / 1e9:.0f} GFLOP/s bf16, {here.traffic / 1e9:.1f} GB/s, messages in "
        f"GB/s of CPU time: {rates}; load {load()}"
    )
    device = device_of(here)
    print("| layout | recompute | GB | predicted | error | default | CPU s | predicted | error ", end="")
    print("| wall s | predicted | error |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    share = None
    for processes, layout, recompute in LAYOUTS:
        job = job_of(options, processes, layout, recompute)
        ranks = run(processes, on_rank, layout, recompute, options, False)
        held = run(processes, on_rank, layout, recompute, options, True)
        share = share or fitted(job, device, ranks)
        print(row(job, device, share, ranks, [each.peak for each in held]), flush=True)
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
        hidden_size=HIDDEN,
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
    return Job(recipe, teacher, teacher, teacher, student, layout, layout, processes)


class Measured(NamedTuple):
    """Of one rank: seconds of an update, bytes at the peak."""

    wall: float
    cpu: float
    peak: float


def row(job: Job, device: Device, share: float, ranks: list[Measured], peaks: list[float]) -> str:
    predicted = [each.total for each in memory(job, device) if each.step == "distill"]
    # Ranks are numbered pipeline last.
    stages = [rank * job.layout.pipeline_model_parallel_size // len(ranks) for rank in range(len(ranks))]
    found = [(peak, predicted[stage], each.peak) for each, peak, stage in zip(ranks, peaks, stages, strict=True)]
    held, expected, default = max(found, key=lambda each: abs(each[1] / each[0] - 1))
    cpu, work = max(each.cpu for each in ranks), computing(job, device, share)
    cells = [
        f"{job.layout} dp={job.layout.data_parallel_size(len(ranks))}",
        "yes" if job.recipe.train.recompute else "",
        *(f"{held / 1e9:.3f}", f"{expected / 1e9:.3f}", f"{expected / held - 1:+.1%}", f"{default / 1e9:.3f}"),
        *(f"{cpu:.2f}", f"{work:.2f}", f"{work / cpu - 1:+.1%}"),
    ]
    if len(ranks) > (os.cpu_count() or 1):  # they wait for each other's cores
        return f"| {' | '.join([*cells, '', '', ''])} |"
    slowest, wall = max(each.wall for each in ranks), distillation(job, job.segments[-1], device, share).seconds
    return f"| {' | '.join([*cells, f'{slowest:.2f}', f'{wall:.2f}', f'{wall / slowest - 1:+.1%}'])} |"


def computing(job: Job, device: Device, share: float) -> float:
    """Seconds that the busiest rank computes for an update."""
    segment = job.segments[-1]
    twice = replace(segment, global_batch_size=2 * segment.global_batch_size)
    once, both = (distillation(job, each, device, share) for each in (segment, twice))
    return both.seconds - once.seconds + once.parts["gradients and parameters"] + once.parts["optimizer"]


def fitted(job: Job, device: Device, ranks: list[Measured]) -> float:
    """The share of the peak at which the prediction is what was measured."""
    seconds, least, most = max(each.cpu for each in ranks), 0.0, 10.0
    for _ in range(50):
        middle = (least + most) / 2
        least, most = (middle, most) if computing(job, device, middle) > seconds else (least, middle)
    return most


def load() -> str:
    return f"{os.getloadavg()[0]:.0f}"


class Speeds(NamedTuple):
    """Of one thread while another is as busy: FLOP/s, bytes/s of a copy, bytes/s of messages by kind, of CPU time."""

    flops: float
    traffic: float
    messages: dict[str, float]


def device_of(measured: Speeds) -> Device:
    here = Device.of_recipe(Recipe(name="plan", train=TrainConfig(steps=1, global_batch_size=1)))
    return replace(here, peak_flops=measured.flops, memory_bandwidth=measured.traffic, link=measured.messages)


def speeds(rank: int, options: argparse.Namespace) -> Speeds:
    size = 1024
    left, right = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(32 * 1024**2)
    target = torch.empty_like(source)
    states = torch.zeros(options.sequence_length * HIDDEN, dtype=torch.bfloat16)
    half = states[: states.numel() // 2].clone()

    def exchange() -> None:
        sent = distributed.P2POp(distributed.isend, states, 1 - rank)
        received = distributed.P2POp(distributed.irecv, torch.empty_like(states), 1 - rank)
        for work in distributed.batch_isend_irecv([received, sent] if rank else [sent, received]):
            work.wait()

    messages: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: distributed.all_reduce(states),
        "all_gather": lambda: distributed.all_gather_into_tensor(states, half),
        "reduce_scatter": lambda: distributed.reduce_scatter_tensor(half, states),
        "send": exchange,
    }
    return Speeds(
        2 * size**3 / least(lambda: torch.mm(left, right), 1),
        2 * source.nbytes / least(lambda: target.copy_(source), 1),
        {kind: Transfer("", "", kind, 2, states.nbytes).wire_bytes / least(go, 50) for kind, go in messages.items()},
    )


def least(work: Callable[[], object], calls: int) -> float:
    """CPU seconds of a call on this rank, in the fastest of ten rounds that all ranks begin together."""
    found = float("inf")
    for _ in range(10):
        launch.barrier()
        start = time.process_time()
        for _ in range(calls):
            work()
        found = min(found, (time.process_time() - start) / calls)
    return found


def run(processes: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns on each rank of a job, beside which others keep other cores as busy.

    Every rank is a new process, forked, so that it need not import everything anew.
    """
    jobs = max(1, (os.cpu_count() or 1) // processes)
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(jobs)]
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs * processes, maxtasksperchild=1) as pool:
        tasks = [
            pool.apply_async(joined, (rank, processes, store.port, function, arguments))
            for store in stores
            for rank in range(processes)
        ]
        return [task.get() for task in tasks][:processes]


def joined(rank: int, processes: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    launch.join_job(launch.Rendezvous(TCPStore("127.0.0.1", port, is_master=False), rank, processes))
    return function(rank, *arguments)


def on_rank(rank: int, layout: Layout, recompute: bool, options: argparse.Namespace, returned: bool) -> Measured:
    """`returned`: freed blocks go back to the system, and memory is what counts."""
    if returned and not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES):
        raise OSError("mallopt(M_MMAP_THRESHOLD) was refused; this benchmark needs glibc")
    launch.initialize(layout, seed=1)
    job = job_of(options, launch.world_size(), layout, recompute)
    small = {Axis.HIDDEN: 64, Axis.FFN: 64, Axis.LAYERS: layout.stages, Axis.VOCAB: 256}
    tiny = replace(job, teacher=job.teacher.resized(small), student=job.student.resized(small))
    train(tiny, 1)
    gc.collect()
    before = status("RssAnon")
    return train(job, 1 if returned else options.repeat)._replace(peak=peak() - before)


def train(job: Job, repeat: int) -> Measured:
    """An update, and then the ones that are measured."""
    config, layout, length = job.recipe.train, job.layout, job.recipe.data.sequence_length
    dtype = params_dtype(config)
    student = build_model(job.student, layout, dtype=dtype, ddp=ddp_config(config), recompute=config.recompute)
    teacher = ColocatedTeacher(
        randomised(build_model(job.teacher, layout, dtype=dtype)),
        sequence_length=length,
        micro_batch_size=config.micro_batch_size,
        buffer_bytes=job.recipe.teacher.buffer_bytes,
        student_layout=layout,
    )
    step = Step(randomised(student), teacher, DistillationObjective.from_config(job.recipe.distill))
    optimizer = build_optimizer(config, student)
    count = config.global_batch_size // config.micro_batch_size // layout.data_parallel_size(job.world_size)
    batches = random_batches(job.student.vocab_size, config.micro_batch_size, length, count)
    wall = cpu = float("inf")
    for turn in range(repeat + 1):
        if turn == 1:
            forget_peak()  # the optimizer's state is there from the first update on; building is no update
            reset_peak_memory()
        launch.barrier()
        torch.cuda.synchronize()  # on a CPU that is nothing (`parallel.device`)
        start, spent = time.perf_counter(), time.process_time()
        step(batches)
        update(optimizer)
        torch.cuda.synchronize()
        if turn:
            wall, cpu = min(wall, time.perf_counter() - start), min(cpu, time.process_time() - spent)
    return Measured(wall, cpu, 0.0)


def forget_peak() -> None:
    """Begin the kernel's record of the largest resident size anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes resident at most since then, without pages of files."""
    return status("VmHWM") - status("RssFile") - status("RssShmem")


def status(key: str) -> int:
    """Bytes of this process that the kernel counts under `key`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


@torch.no_grad()
def randomised(model: Model) -> Model:
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    return model


def random_batches(vocab_size: int, micro_batch_size: int, length: int, count: int) -> list[dict[str, Any]]:
    shape, device = (micro_batch_size, length), current_device()
    return [
        {
            "tokens": torch.randint(0, vocab_size, shape, device=device),
            "labels": torch.randint(0, vocab_size, shape, device=device),
            "position_ids": torch.arange(length, device=device).expand(shape),
            "token_weights": torch.ones(shape, device=device),
            "sample_ids": [f"{index}/{row}" for row in range(micro_batch_size)],
        }
        for index in range(count)
    ]


if __name__ == "__main__":
    main()
