"""What `minitron plan` predicts of memory and time on a GPU, against updates on the one that is here.

    python benchmarks/plan_gpu.py --gpu h100-80gb [--cases ...] [--microbatches 8] [--repeat 3]

Layers have the shapes of published models, of which as many are taken as fit on one GPU beside the optimizer's state;
weights are random, precision is bf16. There is one process, so nothing is sent.

Memory is the most that torch's allocator had given away during the updates, minus what it had before the models were
built; "reserved" is what the allocator held for that. Seconds are of one update, the least of the repeated ones. They
are predicted at the share of the peak that a plan assumes; "share" is the one at which the prediction is what was
measured.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass, replace

import torch
from kd_loss import copy_bandwidth, gemm_rate
from plan import train

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.axes import Axis
from minitron_nemo.config import ClusterConfig, Recipe, TrainConfig
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device, has_transformer_engine, peak_memory
from minitron_nemo.parallel.gpus import GPUS
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.job import Job
from minitron_nemo.planning.memory import memory, worst
from minitron_nemo.planning.time import EFFICIENCY, distillation, efficiency

LLAMA_1B = Architecture(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=128256,
    max_position_embeddings=8192,
    share_embeddings_and_output_weights=True,
)
LLAMA_8B = Architecture(  # a quarter of its layers
    num_layers=8,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=8192,
)
FFN = {Axis.FFN: 4096}
WIDTH = {Axis.HIDDEN: 3072, Axis.FFN: 9216}  # those of Llama-3.1-Minitron-4B-Width


@dataclass(frozen=True)
class Case:
    teacher: Architecture
    student: dict[Axis, int]
    sequence_length: int
    micro_batch_size: int
    recompute: bool = False


CASES = {
    "1B, 1024": Case(LLAMA_1B, FFN, 1024, 4),
    "1B, 2048": Case(LLAMA_1B, FFN, 2048, 2),
    "1B, 2048, recomputed": Case(LLAMA_1B, FFN, 2048, 2, recompute=True),
    "1B, 128, recomputed": Case(LLAMA_1B, FFN, 128, 4, recompute=True),
    "8 layers of 8B, 2048": Case(LLAMA_8B, WIDTH, 2048, 1),
    "8 layers of 8B, 4096, recomputed": Case(LLAMA_8B, WIDTH, 4096, 1, recompute=True),
}


def main() -> None:
    options = parse()
    launch.join_job()
    launch.initialize(Layout(), seed=1)
    copy, products = copy_bandwidth(current_device()), gemm_rate(torch.bfloat16, current_device())
    print(
        f"{torch.cuda.get_device_name()}: copies {copy / 1e12:.2f} TB/s, products {products / 1e12:.0f} TFLOP/s, ",
        end="",
    )
    print(f"torch {torch.__version__}, {'with' if has_transformer_engine() else 'without'} TransformerEngine")
    print("| case | GB | predicted | error | at its fullest in | reserved | s | predicted | error | share | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in options.cases:
        print(f"| {name} | {row(job_of(CASES[name], options), options.repeat)} |", flush=True)
    launch.shutdown()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True, choices=list(GPUS), help="what a recipe would call it")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--microbatches", type=int, default=8, help="of an update")
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


def job_of(case: Case, options: argparse.Namespace) -> Job:
    updates = TrainConfig(
        steps=1,
        global_batch_size=case.micro_batch_size * options.microbatches,
        micro_batch_size=case.micro_batch_size,
        recompute=case.recompute,
    )
    recipe = Recipe(name="plan", train=updates, cluster=ClusterConfig(gpu=options.gpu))
    recipe.data.sequence_length = case.sequence_length
    student = case.teacher.resized(case.student)
    return Job(recipe, case.teacher, case.teacher, case.teacher, student, Layout(), Layout(), world_size=1)


def row(job: Job, repeat: int) -> str:
    device, segment = Device.of_recipe(job.recipe), job.segments[-1]
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    seconds = train(job, repeat).wall
    held, reserved = peak_memory() - before, torch.cuda.max_memory_reserved()
    expected = worst([each for each in memory(job, device) if each.step == "distill"])
    predicted = distillation(job, segment, device, EFFICIENCY).seconds
    share = share_of(job, device, seconds)
    cells = [
        *(f"{held / 1e9:.2f}", f"{expected.total / 1e9:.2f}", f"{expected.total / held - 1:+.1%}", expected.moment),
        *(f"{reserved / 1e9:.2f}", f"{seconds:.3f}", f"{predicted:.3f}", f"{predicted / seconds - 1:+.1%}"),
        *(f"{share:.2f}", f"{segment.tokens_per_step / seconds:,.0f}"),
    ]
    return " | ".join(cells)


def share_of(job: Job, device: Device, seconds: float) -> float:
    """The share of the peak at which the prediction is what was measured: a plan's own, for the MFU of the run."""
    flops = distillation(job, job.segments[-1], device, EFFICIENCY).flops
    assert device.peak_flops is not None, "every GPU that can be named has one"
    recipe = replace(job.recipe, cluster=replace(job.recipe.cluster, mfu=flops / seconds / device.peak_flops))
    return efficiency(replace(job, recipe=recipe), device)


if __name__ == "__main__":
    main()
