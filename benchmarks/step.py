"""What a distillation step costs beyond its parts: the teacher's forward and the student's forward and backward.

    python benchmarks/step.py [--layers 30] [--sequence-length 256] [--microbatches 2] [--precision bf16] [--repeat 5]
    torchrun --nproc-per-node 2 benchmarks/step.py --pipeline 2
    python benchmarks/step.py --only-step      the step alone: its time and the peak memory of the process

Models have the shape of SmolLM2-135M and of a student with two thirds of its FFN, with random weights. The bare parts
go through the same Megatron calls and compute all logits: one product for the teacher; three for the student, whose
loss is the sum of its logits. No optimizer in either. Repetitions alternate; the least CPU time of each counts, summed
over the processes.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.axes import Axis
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.step import Step
from minitron_nemo.distillation.teacher import ColocatedTeacher
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout

TARGET = 1.10


def main() -> None:
    options = parse()
    launch.join_job()
    layout = Layout(tensor_model_parallel_size=options.tensor, pipeline_model_parallel_size=options.pipeline)
    launch.initialize(layout, seed=1)
    teacher_shape = Architecture(
        num_layers=options.layers,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=64,
        vocab_size=49152,
        max_position_embeddings=8192,
        share_embeddings_and_output_weights=True,
    )
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    teacher = randomised(build_model(teacher_shape, layout, dtype=dtype))
    student = randomised(build_model(teacher_shape.resized({Axis.FFN: 1024}), layout, dtype=dtype, ddp=ddp))
    batches = random_batches(options)
    step = Step(
        student,
        ColocatedTeacher(
            teacher,
            sequence_length=options.sequence_length,
            micro_batch_size=1,
            buffer_bytes=2**31,
            student_layout=layout,
        ),
        DistillationObjective(),
    )
    parts: dict[str, Callable[[], Any]] = {
        "teacher forward": partial(bare_forward, teacher, batches, options.sequence_length),
        "student forward + backward": partial(bare_step, student, batches, options.sequence_length),
        "distillation step": partial(step, batches),
    }
    if options.only_step:
        parts = {"distillation step": parts["distillation step"]}
    seconds = {name: [float("inf")] * 2 for name in parts}
    for turn in range(options.repeat + 1):
        for name, part in parts.items():
            measured = timed(part)
            if turn:  # the first is a warm-up
                seconds[name] = [min(pair) for pair in zip(seconds[name], measured, strict=True)]
    if launch.rank() == 0:
        print(table(seconds, options, layout))
    launch.shutdown()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only-step", action="store_true", help="without the bare parts, whose logits fill memory")
    return parser.parse_args()


@torch.no_grad()
def randomised(model: Model) -> Model:
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    return model


def random_batches(options: argparse.Namespace) -> list[dict[str, Any]]:
    shape, device = (1, options.sequence_length), current_device()
    return [
        {
            "tokens": torch.randint(0, 49152, shape, device=device),
            "labels": torch.randint(0, 49152, shape, device=device),
            "position_ids": torch.arange(options.sequence_length, device=device).expand(shape),
            "token_weights": torch.ones(shape, device=device),
        }
        for _ in range(options.microbatches)
    ]


def bare_forward(teacher: Model, batches: list[dict[str, Any]], sequence_length: int) -> None:
    if teacher.output_layer is not None:
        teacher.output_layer.mode = "logits"
    forward_only(teacher, batches, len(batches), sequence_length, 1, lambda output, batch: None)
    if teacher.output_layer is not None:
        teacher.output_layer.mode = "hidden"


def bare_step(student: Model, batches: list[dict[str, Any]], sequence_length: int) -> None:
    for chunk in student.chunks:
        chunk.zero_grad_buffer()
    if student.output_layer is not None:
        student.output_layer.head = None
    get_forward_backward_func()(
        forward_step_func=bare_forward_step,
        data_iterator=iter(batches),
        model=student.chunks[0],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=1,
        forward_only=False,
    )


def bare_forward_step(items: Any, chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch = next(items)
    return chunk(batch["tokens"], batch["position_ids"], None), bare_loss


def bare_loss(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A loss whose gradient with respect to the logits is constant."""
    return logits.sum(), torch.tensor(logits.shape[1], dtype=torch.int, device=logits.device), {}


def timed(part: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds summed over the processes, and wall seconds of the slowest."""
    launch.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    part()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    spent = torch.tensor([time.process_time() - cpu], dtype=torch.float64, device=current_device())
    elapsed = torch.tensor([time.perf_counter() - wall], dtype=torch.float64, device=current_device())
    torch.distributed.all_reduce(spent)
    torch.distributed.all_reduce(elapsed, torch.distributed.ReduceOp.MAX)
    return spent.item(), elapsed.item()


def table(seconds: dict[str, list[float]], options: argparse.Namespace, layout: Layout) -> str:
    tokens = options.microbatches * options.sequence_length
    rows = [f"{tokens} tokens of {options.sequence_length}, {options.layers} layers, {options.precision}, {layout}"]
    rows += ["| part | CPU s | wall s | tokens / wall s |", "|---|---|---|---|"]
    rows += [f"| {name} | {cpu:.3f} | {wall:.3f} | {tokens / wall:,.0f} |" for name, (cpu, wall) in seconds.items()]
    if options.only_step:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return "\n".join([*rows, f"peak memory of rank 0: {peak:,.0f} MiB"])
    forward, bare, whole = seconds.values()
    ratios = [whole[clock] / (forward[clock] + bare[clock]) for clock in (0, 1)]
    rows.append(
        f"step / (teacher + student): {ratios[0]:.3f} in CPU time, {ratios[1]:.3f} in wall time (target {TARGET})"
    )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
