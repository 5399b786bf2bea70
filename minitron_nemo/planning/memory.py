"""Memory of every pipeline rank in the steps that run the model: what stays, and the fullest moment of an update.

    stays       weights, fp32 gradients, main parameters and moments (sharded over dp x cp); teacher's weights, states
    loss        activations of all microbatches in flight + logits of a chunk, dX and dW
    backward    the same activations + gradients of one layer's states (a recomputed layer besides)
    embedding   those without the last microbatch's + the gradient of the embedding's rows
    teacher     one layer's forward pass; nothing of the student's in flight
    reduction   on CPUs, a copy of the gradients, which gloo reduces in
    optimizer   temporaries of torch's AdamW, where TransformerEngine brings none that does without

Of the moments the largest counts. Ranks that differ in tensor- or data-parallel place alone hold the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minitron_nemo.arch import Architecture
from minitron_nemo.distillation.communication import Update
from minitron_nemo.distillation.stages import buffer_elements, held_elements
from minitron_nemo.kernels.backend import CPU_CHUNK_TOKENS, CUDA_CHUNK_TOKENS
from minitron_nemo.kernels.products import UPCAST_BYTES
from minitron_nemo.models.build import padded_vocab_size
from minitron_nemo.models.states import owners
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.activations import FP32, Activations
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.job import Job, pair_states, state_bytes
from minitron_nemo.planning.repairing import repair_moments
from minitron_nemo.planning.schedule import most_in_flight

# Of one parameter: fp32 gradient; AdamW's two moments in fp32, and the main parameter where the model's is not fp32.
GRADIENT_BYTES, MOMENTS_BYTES, MAIN_BYTES = 4, 8, 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes by part on the ranks of one pipeline rank at the fullest moment of a step."""

    step: str  # calibrate | repair | correct | distill | distill (teacher), the ranks of a separate one
    pipeline_rank: int
    moment: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(job: Job, device: Device) -> list[RankMemory]:
    """Every pipeline rank in every step of this run, in the order of the chain; nothing where none is planned."""
    found = _calibrating(job, device)
    if (correction := job.correction) is not None:
        found += _training("correct", job, job.correcting(correction), device)
    if job.segments:
        # Phases differ in the tokens of a microbatch or in the number of them: the fullest of all counts.
        by_segment = [_training("distill", job, job.distillation(segment), device) for segment in job.segments]
        found += [max(same_rank, key=lambda each: each.total) for same_rank in zip(*by_segment, strict=True)]
        if job.worlds is not None:
            found += _serving(job, device)
    return found


def worst(found: list[RankMemory]) -> RankMemory:
    return max(found, key=lambda each: each.total)


def trained(model: Architecture, layout: Layout, rank: int, shards: int, element_size: int) -> dict[str, int]:
    """What a trained model takes on a pipeline rank between updates; optimizer state is split over `shards` ranks.

    Megatron's DDP keeps parameters and gradients of a virtual stage in one buffer each; a rank's share of the optimizer
    state is at most an even one of that buffer.
    """
    return _held(sum(_buffers(model, layout, rank, shards)), shards, element_size)


def _buffers(model: Architecture, layout: Layout, rank: int, shards: int) -> list[int]:
    """Elements of the buffer of each of a pipeline rank's virtual stages."""
    return [
        buffer_elements([size for _, size in held_elements(model, layout, stage)], shards)
        for stage in range(rank, layout.stages, layout.pipeline_model_parallel_size)
    ]


def _held(elements: int, shards: int, element_size: int) -> dict[str, int]:
    """Of a buffer of `elements` parameters and its share of the optimizer's state."""
    of_one = MOMENTS_BYTES + (MAIN_BYTES if element_size < FP32 else 0)
    return {
        "weights": elements * element_size,
        "gradients": elements * GRADIENT_BYTES,
        "optimizer": elements // shards * of_one,
    }


def frozen(model: Architecture, layout: Layout, rank: int, element_size: int) -> int:
    """Weights of a model that is not trained."""
    stages = range(rank, layout.stages, layout.pipeline_model_parallel_size)
    return sum(size for stage in stages for _, size in held_elements(model, layout, stage)) * element_size


def loss_bytes(update: Update, chunk_bytes: int | None, cpu: bool = False) -> int:
    """What the loss of one microbatch holds on the last stage: logits of a chunk, dX, dW, states gathered over tp."""
    rows = padded_vocab_size(update.student, update.layout) // update.tp
    models = [update.student]
    if update.teacher is not None and update.placement != "cached":
        models.append(update.teacher)
    if chunk_bytes is None:
        chunk = CPU_CHUNK_TOKENS if cpu else CUDA_CHUNK_TOKENS
    else:
        chunk = max(1, chunk_bytes // (4 * rows * len(models)))
    chunks = -(-update.tokens // chunk)
    chunk = -(-update.tokens // chunks)
    logits = chunk * min(rows, update.student.vocab_size) * FP32
    hidden = update.student.hidden_size
    alone = update.tp == 1 and update.element_size < FP32
    gradients = update.tokens * hidden * (update.element_size if alone else FP32) + rows * hidden * FP32
    gathered = update.states(update.student, sharded=False) if update.layout.sequence_parallel else 0
    if update.tp > 1:
        gathered += sum(update.states(teacher, sharded=False) for teacher in models[1:])
    # As `kernels.products` multiplies 16 bits: the logits' gradient is rounded, in the teacher's logits where there are
    # some; for fp32 logits a CPU needs fp32 operands, a chunk's states and a block of an output weight.
    rounded = upcast = 0
    if update.element_size < FP32:
        rounded = logits // 2 if len(models) == 1 and (alone or not cpu) else 0
        width = max(model.hidden_size for model in models)
        upcast = chunk * width * FP32 + min(rows * width * FP32, UPCAST_BYTES) if cpu else 0
    return len(models) * logits + gradients + gathered + max(rounded, upcast)


def activations_of_chunks(update: Update, rank: int, device: Device) -> list[int]:
    """What one microbatch leaves in each virtual stage of a rank until its backward pass."""
    layout, own = update.layout, _activations(update.student, update, device)
    layers = layout.layers_per_stage(update.student.num_layers)
    # A compared state is normed beside the model's own norm; of its loss the gradient waits, in fp32.
    state = own.norm(update.student.hidden_size) + own.states() * (1 + FP32 // update.element_size)
    found = []
    for stage in range(rank, layout.stages, update.pp):
        kept = own.angles() + layers[stage] * own.states() if update.recompute else layers[stage] * own.layer()
        if stage == 0:
            kept += own.embedding()
        # The last stage ends with the final norm; others keep what they send, which Megatron-core does not free.
        last = stage == layout.stages - 1
        kept += own.norm(update.student.hidden_size) if last else own.states()
        first = sum(layers[:stage])
        readers = range(first, first + layers[stage] + last)  # of a state, the layer behind it, or the final norm
        found.append(kept + state * sum(pair.student + 1 in readers for pair in update.pairs))
    return found


def _activations(model: Architecture, update: Update, device: Device, layout: Layout | None = None) -> Activations:
    return Activations(
        model,
        layout or update.layout,
        update.micro_batch_size,
        update.sequence_length,
        update.element_size,
        device.transformer_engine,
    )


def _training(step: str, job: Job, update: Update, device: Device) -> list[RankMemory]:
    return [_trained_rank(step, job, update, rank, device) for rank in range(update.pp)]


def _trained_rank(step: str, job: Job, update: Update, rank: int, device: Device) -> RankMemory:
    own = _activations(update.student, update, device)
    chunks = activations_of_chunks(update, rank, device)
    in_flight = most_in_flight(update.pp, len(chunks), rank, job.window(update), chunks)
    work = own.backward_work() + (own.layer() if update.recompute else 0)
    moments = {"backward": {"activations": in_flight, "work": work}}
    if rank == update.pp - 1:
        loss = loss_bytes(update, job.recipe.distill.chunk_bytes, device.cpu)
        moments["loss"] = {"activations": in_flight, "loss": loss}
    if rank == 0:
        rows = padded_vocab_size(update.student, update.layout) // update.tp
        gradient = rows * update.student.hidden_size * update.element_size
        moments["embedding"] = {"activations": in_flight - chunks[0], "work": gradient}
    if not device.transformer_engine:
        moments["optimizer"] = {"work": _adam_work(update, rank, device.cpu)}
    if device.cpu:
        # Virtual stages one after the other. The parameters that are gathered are copied, too, but are smaller.
        reduced = max(_buffers(update.student, update.layout, rank, update.dp))
        moments["reduction"] = {"work": reduced * GRADIENT_BYTES}
    if update.teacher is not None and update.placement == "colocated":
        other = _activations(update.teacher, update, device, update.teacher_layout)
        moments["teacher"] = {"work": other.forward_work()}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    staying = trained(update.student, update.layout, rank, update.dp, update.element_size)
    return RankMemory(step, rank, moment, staying | _map(update, rank) | _teacher(job, update, rank) | moments[moment])


def _adam_work(update: Update, rank: int, cpu: bool) -> int:
    """What torch's AdamW computes steps in, in fp32.

    On a CPU it takes one parameter after the other: two tensors of the rank's shard of the largest. On a GPU it takes
    all at once: one tensor of each.
    """
    if not cpu:
        return FP32 * sum(_buffers(update.student, update.layout, rank, update.dp)) // update.dp
    sizes = [
        size
        for stage in range(rank, update.layout.stages, update.pp)
        for _, size in held_elements(update.student, update.layout, stage)
    ]
    return 2 * FP32 * min(max(sizes), -(-sum(sizes) // update.dp))


def _map(update: Update, rank: int) -> dict[str, int]:
    """The learned map from the student's width to the teacher's, on ranks that compare states."""
    if update.teacher is None or update.teacher.hidden_size == update.student.hidden_size:
        return {}
    targets = owners(update.student.num_layers, update.layout)
    if rank not in {targets[pair.student] for pair in update.pairs}:
        return {}
    elements = update.teacher.hidden_size * update.student.hidden_size
    return {"map": sum(_held(buffer_elements([elements], update.dp), update.dp, update.element_size).values())}


def _teacher(job: Job, update: Update, rank: int) -> dict[str, int]:
    """Weights of the teacher's and states that a rank of the student holds."""
    if update.teacher is None:
        return {}
    last, microbatches = rank == update.pp - 1, job.held_microbatches(update)
    if update.placement == "cached":
        tokens = microbatches * update.micro_batch_size * update.sequence_length
        return {"teacher states": tokens * job.cached_bytes(update)} if last else {}
    states = microbatches * (last + pair_states(update)[rank]) * state_bytes(update)
    if update.placement == "colocated":
        layout = update.teacher_layout or update.layout
        weights = frozen(update.teacher, layout, rank, update.element_size)
    else:
        rows = padded_vocab_size(update.teacher, update.layout) // update.tp
        weights = last * rows * update.teacher.hidden_size * update.element_size
    return {"teacher weights": weights, "teacher states": states}


def _serving(job: Job, device: Device) -> list[RankMemory]:
    """The ranks of a separate teacher: its weights, a layer's forward pass, states that wait to be taken."""
    assert job.worlds is not None
    layout = job.worlds.teacher.layout
    update = job.distillation(max(job.segments, key=lambda each: each.micro_batch_size * each.sequence_length))
    assert update.teacher is not None
    work = _activations(update.teacher, update, device, layout).forward_work()
    last = layout.pipeline_model_parallel_size - 1
    return [
        RankMemory(
            "distill (teacher)",
            rank,
            "forward",
            {
                "teacher weights": frozen(update.teacher, layout, rank, update.element_size),
                # At most; final states are on the last rank.
                "teacher states": job.recipe.teacher.buffer_bytes * (rank == last or bool(update.pairs)),
                "work": work,
            },
        )
        for rank in range(layout.pipeline_model_parallel_size)
    ]


def _calibrating(job: Job, device: Device) -> list[RankMemory]:
    """Forward-only passes of the source: for scores, whose sums are small beside it, and for repairs."""
    config, layout = job.recipe.prune.calibration, job.layout
    size = FP32 if config.precision == "fp32" else 2
    own = Activations(
        job.source,
        layout,
        config.micro_batch_size,
        job.recipe.data.sequence_length,
        size,
        device.transformer_engine,
    )
    forward = {"forward": {"work": own.forward_work()}}
    ranks = range(layout.pipeline_model_parallel_size)
    steps = [("calibrate", rank, forward) for rank in ranks if job.calibrates]
    steps += [("repair", rank, repair_moments(job, own, rank)) for rank in ranks]
    found = []
    for step, rank, moments in steps:
        if moments:
            moment = max(moments, key=lambda name: sum(moments[name].values()))
            weights = {"weights": frozen(job.source, layout, rank, size)}
            found.append(RankMemory(step, rank, moment, weights | moments[moment]))
    return found
