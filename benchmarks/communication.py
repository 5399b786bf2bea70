"""Bytes that one update communicates, counted while it runs, beside what `distillation.communication` predicts.

    for n in 1 2 4 8; do torchrun --nproc-per-node $n benchmarks/communication.py; done

A small teacher and student with random bf16 weights and one pair of intermediate layers, on every layout below that
the processes fill. Counted is what reaches torch's process groups, whoever calls them, from the teacher's pass to the
gather of the updated parameters: the whole tensor of a collective, the message of a send or receive. Messages of at
most 64 bytes (token counts, norms, sums of losses) count apart. Columns: MB measured / predicted, on the rank with most
of that kind; the largest difference, in bytes, of any kind on any rank; bytes of small messages.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.axes import Axis
from minitron_nemo.config import IntermediateConfig, TrainConfig
from minitron_nemo.distillation.communication import Update, transfers
from minitron_nemo.distillation.intermediate import IntermediateLoss, Pair, deliveries
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import build_optimizer, ddp_config, update
from minitron_nemo.distillation.step import Step
from minitron_nemo.distillation.teacher import ColocatedTeacher
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout

TEACHER = Architecture(
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=4000,
    max_position_embeddings=512,
)
STUDENT = TEACHER.resized({Axis.HIDDEN: 192, Axis.FFN: 512})
PAIRS = [Pair(5, 2)]
SEQUENCE, MICROBATCHES = 128, 8  # of all data-parallel ranks

# (student, teacher; None for the same)
LAYOUTS: list[tuple[Layout, Layout | None]] = [
    (Layout(), None),
    (Layout(2), None),
    (Layout(2, sequence_parallel=True), None),
    (Layout(1, 2), None),
    (Layout(1, 2, 2), Layout(1, 2)),
    (Layout(2, 2, sequence_parallel=True), None),
    (Layout(2, 2, 2, sequence_parallel=True), None),
    (Layout(4, sequence_parallel=True), None),
    (Layout(1, 4), Layout(1, 4, 2)),
    (Layout(2, 4, sequence_parallel=True), None),
    (Layout(4, 2, sequence_parallel=True), None),
]

# How an operation of torch's process groups is called, and which argument is the whole tensor.
KINDS = {
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "send": ("send", 0),
    "recv_": ("receive", 0),
    "broadcast_": ("broadcast", 0),
}
SMALL = 64

Counts = Counter[tuple[str, str]]  # bytes by group and kind


class Communication(TorchDispatchMode):
    """Bytes given to process groups of more than one process, by group and kind; fails for an unknown operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = Counter()
        self.small = 0
        self._names = {
            # Between two stages Megatron-core sends one way through the group of all ranks.
            torch.distributed.distributed_c10d._get_default_group().group_name: "pp",
            parallel_state.get_tensor_model_parallel_group().group_name: "tp",
            parallel_state.get_expert_tensor_and_model_parallel_group().group_name: "tp",
            parallel_state.get_pipeline_model_parallel_group().group_name: "pp",
            parallel_state.get_data_parallel_group(with_context_parallel=True).group_name: "dp",
        }
        if (embedding := parallel_state.get_embedding_group(check_initialized=False)) is not None:
            self._names[embedding.group_name] = "embedding"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, whole = KINDS[func.overloadpacket.__name__]
            group = next(ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
            amount = sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(args[whole]))
            if group.size() > 1 and amount > SMALL:
                self.counts[self._names[group.group_name], kind] += amount
            elif group.size() > 1:
                self.small += amount
        return func(*args, **(kwargs or {}))


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and str(argument._type()).endswith(".ProcessGroup")


def counted(
    layout: Layout,
    teacher_layout: Layout | None = None,
    teacher: Architecture = TEACHER,
    student: Architecture = STUDENT,
    pairs: list[Pair] = PAIRS,
    divergence: str = "forward_kl",
    recompute: bool = False,
) -> tuple[Counts, Counts, int]:
    """On a rank: what an update communicates, what is predicted, bytes of small messages."""
    config = TrainConfig(steps=1, global_batch_size=MICROBATCHES, precision="bf16", recompute=recompute)
    launch.initialize(layout, seed=1)
    dtype = torch.bfloat16
    own = randomised(build_model(student, layout, dtype=dtype, ddp=ddp_config(config), recompute=recompute))
    other = randomised(build_model(teacher, teacher_layout or layout, dtype=dtype))
    settings = IntermediateConfig(alpha=1.0)
    intermediate = IntermediateLoss(own, teacher, pairs, settings, seed=1) if pairs else None
    colocated = ColocatedTeacher(
        other,
        sequence_length=SEQUENCE,
        micro_batch_size=1,
        buffer_bytes=2**30,
        student_layout=layout,
        deliveries=deliveries(pairs, other, own),
    )
    step = Step(own, colocated, DistillationObjective(divergence=divergence), intermediate=intermediate)
    optimizer = build_optimizer(config, own, intermediate.chunks if intermediate else [])
    share = random_batches(teacher.vocab_size, MICROBATCHES // layout.data_parallel_size(launch.world_size()))
    with Communication() as communication:
        step(share)
        update(optimizer)
    predicted: Counts = Counter()
    expected = Update(
        student,
        layout,
        launch.world_size(),
        microbatches=len(share),
        micro_batch_size=1,
        sequence_length=SEQUENCE,
        element_size=dtype.itemsize,
        teacher=teacher,
        teacher_layout=teacher_layout,
        pairs=pairs,
        divergence=divergence,
        recompute=recompute,
    )
    for transfer in transfers(expected, parallel_state.get_pipeline_model_parallel_rank()):
        predicted[transfer.group, transfer.kind] += transfer.bytes
    return communication.counts, predicted, communication.small


@torch.no_grad()
def randomised(model: Model) -> Model:
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    return model


def random_batches(vocab_size: int, count: int) -> list[dict[str, Any]]:
    shape = (1, SEQUENCE)
    return [
        {
            "tokens": torch.randint(0, vocab_size, shape),
            "labels": torch.randint(0, vocab_size, shape),
            "position_ids": torch.arange(SEQUENCE).expand(shape),
            "token_weights": torch.ones(shape),
            "sample_ids": [str(index)],
        }
        for index in range(count)
    ]


COLUMNS = (
    ("tp", "all_reduce"),
    ("tp", "all_gather"),
    ("tp", "reduce_scatter"),
    ("pp", "send"),
    ("dp", "reduce_scatter"),
    ("dp", "all_gather"),
)


def main() -> None:
    launch.join_job()
    size = launch.world_size()
    if launch.rank() == 0:
        names = [f"{group} {kind.replace('_', '-')}" for group, kind in COLUMNS]
        head = ["processes", "student", "teacher", "DP", *names, "difference", "small"]
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for layout, teacher_layout in LAYOUTS:
        if size % layout.model_parallel_size:
            continue
        found = counted(layout, teacher_layout)
        every: list[Any] = [None] * size
        torch.distributed.all_gather_object(every, found)
        if launch.rank() == 0:
            cells = [size, layout, teacher_layout or "same", layout.data_parallel_size(size), *columns(every)]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    launch.shutdown()


def columns(every: list[tuple[Counts, Counts, int]]) -> list[str]:
    cells = []
    for key in COLUMNS:
        measured, predicted, _ = max(every, key=lambda counts: counts[0][key])
        cells.append(f"{measured[key] / 1e6:.3f} / {predicted[key] / 1e6:.3f}" if measured[key] else "")
    keys = {key for measured, predicted, _ in every for key in (*measured, *predicted)}
    apart = max((abs(measured[key] - predicted[key]) for measured, predicted, _ in every for key in keys), default=0)
    return [*cells, str(apart), str(max(small for _, _, small in every))]


if __name__ == "__main__":
    main()
