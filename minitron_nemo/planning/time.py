"""Seconds of an update, and of a cached teacher's pass: arithmetic over a device's figures, nothing is measured.

    a stage      executed FLOPs / (efficiency x peak) + tensor-parallel messages, for one microbatch;
                 on a GPU without TransformerEngine + what its layers move (`traffic`) / (COPIES x bandwidth)
    a pass       all microbatches through all stages, with filling and draining (`schedule.pass_time`)
    an update    the teacher's passes + the student's + pipeline, data-parallel messages + the optimizer's traffic

`efficiency` is what products reach while a rank has work. It is EFFICIENCY, or what gives the recipe's own layout
`cluster.mfu`. Left out are latencies, reading the data, saves, evaluation and conversions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.distillation.communication import Transfer, Update, transfers
from minitron_nemo.distillation.metrics import flops_per_token
from minitron_nemo.distillation.phases import Segment
from minitron_nemo.distillation.stages import buffer_elements, held_elements, layers_of
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.activations import Activations
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.job import Job
from minitron_nemo.planning.schedule import bubble, pass_time
from minitron_nemo.planning.traffic import backward_traffic, forward_traffic

# Megatron-LM reports up to 47% of an H100's peak for whole updates of models from 2B to 462B parameters, bubbles and
# messages included, so about this while a rank computes.
EFFICIENCY = 0.5
# Of a GPU's bandwidth by its data sheet: what a large copy reached on an H200.
COPIES = 0.88


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of one update by part, with the model FLOPs of it (recomputation not counted) and processes it runs on.

    `bubbles` are the shares of their passes' work in which student's and teacher's pipelines fill and drain.
    """

    parts: Mapping[str, float]
    flops: int
    processes: int
    bubbles: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def mfu(self, peak_flops: float) -> float:
        """As `speed/mfu` of a run counts it."""
        return self.flops / self.seconds / self.processes / peak_flops


def efficiency(job: Job, device: Device) -> float:
    """Share of the peak that products reach. Raises UserError for a `cluster.mfu` that the layout cannot have."""
    wanted = job.recipe.cluster.mfu
    if wanted is None or device.peak_flops is None or not job.segments:
        return EFFICIENCY
    segment, peak = job.segments[-1], device.peak_flops
    least, most = 0.0, 1.0
    if (reached := distillation(job, segment, device, most).mfu(peak)) < wanted:
        raise UserError(
            f"cluster.mfu: {wanted:g} is more than the {reached:.3f} that this layout has, by arithmetic, with all of "
            "the peak while a rank computes; leave it out, or correct train.peak_flops or cluster.gpu"
        )
    for _ in range(50):
        middle = (least + most) / 2
        if distillation(job, segment, device, middle).mfu(peak) < wanted:
            least = middle
        else:
            most = middle
    return most


def distillation(job: Job, segment: Segment, device: Device, share: float) -> UpdateTime:
    """An update of the distillation, at `share` of the device's peak, which must be known."""
    update = job.distillation(segment)
    window = job.window(update)
    network = Network(job, device)
    parts = _training(job, update, window, device, share, network)
    beside = update.teacher is not None and update.placement == "colocated"
    bubbles = {"student": _bubble(update.layout, window)}
    if beside:
        layout = update.teacher_layout or update.layout
        bubbles["teacher"] = _bubble(layout, window)
        parts = {"teacher": _teacher(update, layout, window, update.microbatches, device, share, network), **parts}
    if job.worlds is not None and update.teacher is not None:
        # It runs meanwhile; what it takes longer is waited for.
        grid = job.worlds.teacher
        count = ceil(segment.global_batch_size / segment.micro_batch_size / grid.data_parallel_size)
        seconds = _teacher(update, grid.layout, window, count, device, share, None)
        parts["waiting"] = max(0.0, seconds - sum(parts.values()))
        bubbles["teacher"] = _bubble(grid.layout, min(window, count))
    flops = flops_per_token(update.student, update.teacher if beside else None, segment.sequence_length)
    return UpdateTime(parts, flops * segment.tokens_per_step, job.students, bubbles)


def correction(job: Job, segment: Segment, device: Device, share: float) -> UpdateTime:
    """An update of the teacher's correction."""
    update = job.correcting(segment)
    parts = _training(job, update, update.microbatches, device, share, Network(job, device))
    flops = flops_per_token(update.student, None, segment.sequence_length) * segment.tokens_per_step
    return UpdateTime(parts, flops, job.world_size, {"student": _bubble(update.layout, update.microbatches)})


def caching(job: Job, device: Device, share: float) -> float:
    """Seconds in which the teacher fills its cache: a replica takes its blocks one by one, each in a pass of its own.

    What the choice of entries sends and writes is not counted.
    """
    seconds, layout = 0.0, job.layout
    for block, count in job.caching():
        assert block.teacher is not None
        stages = _teacher_stages(block, layout, block.microbatches, device, share, Network(job, device))
        output = 2 * block.teacher.hidden_size * block.teacher.vocab_size * block.tokens / block.tp
        stages[-1] += output / _speed(device, share)
        of_replica = ceil(count / layout.data_parallel_size(job.world_size))
        virtual = layout.virtual_pipeline_model_parallel_size or 1
        seconds += of_replica * pass_time(stages, virtual, block.microbatches)
    return seconds


class Network:
    """Which messages stay within a node: ranks are numbered tensor-parallel first, then context, data, pipeline."""

    def __init__(self, job: Job, device: Device) -> None:
        self.device, self.per_node = device, job.recipe.cluster.processes_per_node
        layout = job.layout
        inner = layout.tensor_model_parallel_size
        replicas = inner * layout.context_parallel_size * layout.data_parallel_size(job.students)
        # Consecutive ranks that a group lies within.
        self.spans = {"tp": inner, "dp": replicas, "pp": job.students, "embedding": job.students}

    def seconds(self, found: Sequence[Transfer], group: str) -> float:
        """Of a group's messages on the wire, one after the other; 0 where the bandwidth is not known."""
        span = self.spans.get(group)
        inside = span is not None and span <= self.per_node and self.per_node % span == 0
        total = 0.0
        for each in found:
            if each.group == group and each.kind != "receive":
                bandwidth = self.device.bandwidth(each.kind, inside)
                total += each.wire_bytes / bandwidth if bandwidth else 0.0
        return total


def _training(
    job: Job, update: Update, window: int, device: Device, share: float, network: Network
) -> dict[str, float]:
    """The student's passes, the messages that nothing hides, and the optimizer."""
    layout, all_sent = update.layout, [transfers(update, rank) for rank in range(update.pp)]
    own = [[each for each in found if each.part not in ("teacher", "parameters", "gradients")] for found in all_sent]
    stages = [
        _student_flops(update, rank, device) / _speed(device, share)
        + _moving(update.student, layout, rank, update, device, backward=True)
        + network.seconds(found, "tp") / update.microbatches
        for rank, found in enumerate(own)
    ]
    virtual = layout.virtual_pipeline_model_parallel_size or 1
    student = sum(pass_time(stages, virtual, count) for count in _windows(update.microbatches, window))
    # Interleaved schedules send while they compute, where something else than the processor can.
    between = 0.0 if virtual > 1 and not device.cpu else max(network.seconds(found, "pp") for found in own)
    last = [[each for each in found if each.part in ("gradients", "parameters")] for found in all_sent]
    config, hidden = job.recipe.train, 0.0 if device.cpu else max(stages)  # what one microbatch can hide
    reduced = max(network.seconds([each for each in found if each.part == "gradients"], "dp") for found in last)
    gathered = max(network.seconds([each for each in found if each.part == "parameters"], "dp") for found in last)
    if config.overlap_grad_reduce or config.overlap_param_gather:
        reduced = max(0.0, reduced - hidden * 2 / 3)
    if config.overlap_param_gather:
        gathered = max(0.0, gathered - hidden / 3)
    tied = max(network.seconds(found, "embedding") + network.seconds(found, "tp") for found in last)
    return {
        "student": student,
        "pipeline messages": between,
        "gradients and parameters": reduced + gathered + tied,
        "optimizer": max(_optimizer(update, rank, device) for rank in range(update.pp)),
    }


def _teacher(
    update: Update,
    layout: Layout,
    window: int,
    microbatches: int,
    device: Device,
    share: float,
    network: Network | None,
) -> float:
    """Its forward-only passes over `microbatches`; without `network` its messages are not counted."""
    stages = _teacher_stages(update, layout, microbatches, device, share, network)
    virtual = layout.virtual_pipeline_model_parallel_size or 1
    return sum(pass_time(stages, virtual, count) for count in _windows(microbatches, window))


def _teacher_stages(
    update: Update, layout: Layout, microbatches: int, device: Device, share: float, network: Network | None
) -> list[float]:
    """Seconds of every pipeline rank for the teacher's layers, one microbatch, and its messages."""
    assert update.teacher is not None
    stages = []
    for rank in range(layout.pipeline_model_parallel_size):
        flops = _layers_flops(update.teacher, layout, rank, update, device)
        messages = 0.0
        if network is not None:
            sent = [each for each in transfers(update, rank) if each.part == "teacher"]
            messages = (network.seconds(sent, "tp") + network.seconds(sent, "pp")) / microbatches
        moving = _moving(update.teacher, layout, rank, update, device)
        stages.append(flops / _speed(device, share) + moving + messages)
    return stages


def _student_flops(update: Update, rank: int, device: Device) -> float:
    """FLOPs of a rank for one microbatch, those of both output projections with the loss on the last stage."""
    factor = 4 if update.recompute else 3
    flops = factor * _layers_flops(update.student, update.layout, rank, update, device)
    if rank == update.pp - 1:
        outputs = 3 * update.student.hidden_size
        if update.teacher is not None and update.placement != "cached":
            outputs += update.teacher.hidden_size
        flops += 2 * outputs * update.student.vocab_size * update.tokens / update.tp
    return flops


def _layers_flops(model: Architecture, layout: Layout, rank: int, update: Update, device: Device) -> float:
    """FLOPs of a forward pass of one microbatch through a rank's layers, on one of its tensor-parallel ranks."""
    shape, length = layout.padded(model), update.sequence_length
    per_token = forward_flops_per_token(shape, length) - 2 * shape.vocab_size * shape.hidden_size
    if not device.transformer_engine:
        # Scores are computed whole and masked: context s, not the mean s / 2 that the count has.
        context = forward_flops_per_token(shape, length) - forward_flops_per_token(shape, 1)
        per_token += context
    tokens = update.micro_batch_size * length // layout.context_parallel_size
    share = layers_of(model, layout, rank) / model.num_layers
    return per_token * share * tokens / layout.tensor_model_parallel_size


def _moving(
    model: Architecture, layout: Layout, rank: int, update: Update, device: Device, backward: bool = False
) -> float:
    """Seconds in which a rank's layers wait for memory, of one microbatch. 0 where that is not known.

    On a CPU the share of the peak is fitted with them (docs/evidence/plan.md), TransformerEngine's have little of it.
    """
    if device.cpu or device.transformer_engine or device.memory_bandwidth is None:
        return 0.0
    own = Activations(model, layout, update.micro_batch_size, update.sequence_length, update.element_size)
    moved = forward_traffic(own) * (2 if backward and update.recompute else 1)
    if backward:
        moved += backward_traffic(own)
    return moved * layers_of(model, layout, rank) / (COPIES * device.memory_bandwidth)


def _optimizer(update: Update, rank: int, device: Device) -> float:
    """Traffic of norm, clipping and AdamW over a rank's shard, and of clearing all gradients."""
    if device.memory_bandwidth is None:
        return 0.0
    layout, elements = update.layout, 0
    for stage in range(rank, layout.stages, update.pp):
        elements += buffer_elements([size for _, size in held_elements(update.student, layout, stage)], update.dp)
    # Gradient read twice and scaled; main parameter and two moments read and written; parameter written.
    shard = elements // update.dp * (4 + 8 + 4 + 3 * 8 + update.element_size)
    return (shard + 4 * elements) / device.memory_bandwidth


def _windows(microbatches: int, window: int) -> list[int]:
    """Microbatches of every window of an update."""
    return [min(window, microbatches - start) for start in range(0, microbatches, window)]


def _bubble(layout: Layout, window: int) -> float:
    return bubble(layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1, window)


def _speed(device: Device, share: float) -> float:
    assert device.peak_flops is not None
    return device.peak_flops * share
