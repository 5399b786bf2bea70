"""What one update communicates, by arithmetic: nothing is run and nothing measured.

    teacher     its forward pass: tensor-parallel collectives of each layer, states between its stages
    student     the same of the student's forward and backward
    loss        states gathered for it, statistics of the vocabulary's shards, the hidden states' gradient
    pairs       of the intermediate losses: the teacher's states to the stages that need them, the map's gradient
    gradients   of the student: over the data-parallel ranks, norms and routers over sequence shards, tied embeddings
    parameters  gathered from the data-parallel ranks after the update

As Megatron-core's own layers and schedules communicate; `benchmarks/communication.py` counts the same while an update
runs. Left out are messages of a few numbers (token counts, norms, sums of losses), what attention exchanges between
context-parallel ranks, and the forward pass from which dynamic weights start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.config import Recipe
from minitron_nemo.distillation.intermediate import Pair, resolve_pairs
from minitron_nemo.distillation.optimizer import params_dtype
from minitron_nemo.distillation.phases import Segment, segments
from minitron_nemo.distillation.stages import buffer_elements, held_elements, layers_of
from minitron_nemo.kernels.rows import ALL_COLUMNS, STUDENT_COLUMNS
from minitron_nemo.models.build import padded_vocab_size
from minitron_nemo.models.states import owners
from minitron_nemo.parallel.layout import Layout

STATISTIC_BYTES = 8  # fp64
GRADIENT_BYTES = 4  # fp32, of hidden states and of weights
ROUTER_BYTES = 4  # fp32: weights of tokens, and sums of what experts give for them


@dataclass(frozen=True)
class Transfer:
    """All messages of one kind that one rank takes part in during one update.

    `bytes` are those of the whole tensor: what an all-reduce sums, an all-gather ends with, a reduce-scatter starts
    from, a send or a receive carries. `processes` are those of the group.
    """

    part: str
    group: str  # tp | pp | dp | embedding | teacher (the ranks of a separate one)
    kind: str  # all_reduce | all_gather | reduce_scatter | send | receive
    processes: int
    bytes: int

    @property
    def wire_bytes(self) -> int:
        """What leaves this rank, for a receive what arrives, where the collectives are rings."""
        rounds = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
        if self.kind not in rounds:
            return self.bytes
        return rounds[self.kind] * self.bytes * (self.processes - 1) // self.processes


@dataclass(frozen=True)
class Update:
    """One update: both models, their layouts, the share of the batch that one data-parallel rank has.

    `placement` is that of the teacher; a separate one sends its states here, `teacher_layout` then says nothing.
    `element_size` is that of weights and activations.
    """

    student: Architecture
    layout: Layout
    world_size: int
    microbatches: int
    micro_batch_size: int
    sequence_length: int
    element_size: int
    teacher: Architecture | None = None  # None: cross-entropy alone
    teacher_layout: Layout | None = None
    placement: str = "colocated"
    pairs: Sequence[Pair] = ()
    divergence: str = "forward_kl"
    cached_entries: int = 0  # of a cached teacher, per token
    recompute: bool = False

    @staticmethod
    def of_recipe(
        recipe: Recipe,
        teacher: Architecture,
        student: Architecture,
        layout: Layout,
        teacher_layout: Layout,
        world_size: int,
        segment: Segment | None = None,
    ) -> Update:
        """An update of a segment of the distillation; None: of the one whose updates have most tokens."""
        if segment is None:
            run = segments(recipe.train, recipe.data.sequence_length)
            segment = max(run, key=lambda segment: segment.tokens_per_step)
        has_teacher = recipe.distill.logits_weight != 0
        return Update(
            student,
            layout,
            world_size,
            segment.global_batch_size // segment.micro_batch_size // layout.data_parallel_size(world_size),
            segment.micro_batch_size,
            segment.sequence_length,
            params_dtype(recipe.train).itemsize,
            teacher=teacher if has_teacher else None,
            teacher_layout=teacher_layout,
            placement=recipe.teacher.placement,
            pairs=resolve_pairs(recipe.distill.intermediate, teacher, student) if has_teacher else [],
            divergence=recipe.distill.divergence,
            cached_entries=min(recipe.teacher.cache.top_k, teacher.vocab_size) + recipe.teacher.cache.tail_samples,
            recompute=recipe.train.recompute,
        )

    @property
    def tokens(self) -> int:
        """Of a microbatch, on one context-parallel rank."""
        return self.micro_batch_size * self.sequence_length // self.layout.context_parallel_size

    @property
    def tp(self) -> int:
        return self.layout.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.layout.pipeline_model_parallel_size

    @property
    def dp(self) -> int:
        """Ranks that gradients are summed over: data-parallel and context-parallel ones."""
        return self.layout.data_parallel_size(self.world_size) * self.layout.context_parallel_size

    def states(self, architecture: Architecture, sharded: bool) -> int:
        """Bytes of the residual stream of a microbatch, whole or the part of one tensor-parallel rank."""
        whole = self.tokens * architecture.hidden_size * self.element_size
        return whole // self.tp if sharded else whole


def transfers(update: Update, pipeline_rank: int) -> list[Transfer]:
    """What the ranks of one pipeline stage communicate in an update; groups of one process have no part in it."""
    found = Counter[tuple[str, str, str]]()
    sizes = {
        "tp": update.tp,
        "pp": update.pp,
        "dp": update.dp,
        "embedding": min(update.pp, 2),
        "teacher": 2,  # from one rank to another
    }
    for part, group, kind, amount in _all(update, pipeline_rank):
        if sizes[group] > 1:
            found[part, group, kind] += amount
    return [Transfer(*key, sizes[key[1]], amount) for key, amount in found.items() if amount]


def wire_bytes(found: Sequence[Transfer]) -> dict[str, int]:
    """By group, what leaves a rank over all kinds; for point-to-point groups the busier direction."""
    totals: dict[str, int] = {}
    for group in dict.fromkeys(each.group for each in found):
        own = [each for each in found if each.group == group]
        received = sum(each.wire_bytes for each in own if each.kind == "receive")
        totals[group] = max(sum(each.wire_bytes for each in own) - received, received)
    return totals


Message = tuple[str, str, str, int]  # part, group, kind, bytes


def _all(update: Update, rank: int) -> Iterator[Message]:
    yield from _teacher_pass(update, rank)
    yield from _student_pass(update, rank)
    if rank == update.pp - 1:
        yield from _loss(update)
    yield from _pairs(update, rank)
    yield from _gradients(update, rank)


def _teacher_pass(update: Update, rank: int) -> Iterator[Message]:
    if update.teacher is None or update.placement == "cached":
        return
    if update.placement == "separate":
        if rank == update.pp - 1:
            yield "teacher", "teacher", "receive", update.microbatches * update.states(update.teacher, sharded=True)
        return
    layout = update.teacher_layout or update.layout
    count = update.microbatches
    if layout.virtual_pipeline_model_parallel_size:
        count = -(-count // update.pp) * update.pp  # an interleaved pass is filled up
    yield from _forward(update, "teacher", update.teacher, count * layers_of(update.teacher, layout, rank))
    if rank == 0:
        yield from _embedding(update, "teacher", count * update.states(update.teacher, sharded=False))
    yield from _pipeline(update, "teacher", update.teacher, layout, rank, count, backward=False)


def _student_pass(update: Update, rank: int) -> Iterator[Message]:
    passes = update.microbatches * layers_of(update.student, update.layout, rank)
    whole = update.microbatches * update.states(update.student, sharded=False)
    for _ in range(2 if update.recompute else 1):
        yield from _forward(update, "student", update.student, passes)
    yield from _backward(update, "student", update.student, passes)
    if rank == 0:
        yield from _embedding(update, "student", whole)
        if update.layout.sequence_parallel:
            yield "student", "tp", "all_gather", whole
    yield from _pipeline(update, "student", update.student, update.layout, rank, update.microbatches, backward=True)


def _forward(update: Update, part: str, model: Architecture, passes: int) -> Iterator[Message]:
    """Of `passes` microbatches through a layer, whose attention and MLP split products by columns, then by rows."""
    states = passes * update.states(model, sharded=False)
    if not update.layout.sequence_parallel:
        yield part, "tp", "all_reduce", 2 * states
        return
    yield part, "tp", "all_gather", 2 * states
    if model.num_moe_experts is None:
        yield part, "tp", "reduce_scatter", 2 * states
        return
    # Every rank has its rows of every expert: it needs to know of all tokens where they go, and with what weight.
    routes = passes * update.tokens * model.num_moe_experts
    yield part, "tp", "all_gather", routes * (1 + ROUTER_BYTES)
    yield part, "tp", "reduce_scatter", states
    yield part, "tp", "reduce_scatter", passes * update.tokens * model.hidden_size * ROUTER_BYTES
    if model.has(Axis.SHARED_FFN):
        yield part, "tp", "all_gather", states
        yield part, "tp", "reduce_scatter", states


def _backward(update: Update, part: str, model: Architecture, passes: int) -> Iterator[Message]:
    states = passes * update.states(model, sharded=False)
    if not update.layout.sequence_parallel:
        yield part, "tp", "all_reduce", 2 * states
        return
    yield part, "tp", "reduce_scatter", 2 * states
    # For attention, and for an MLP again: one gather undoes the forward's scatter, one is of the product's input, for
    # the weights' gradients.
    yield part, "tp", "all_gather", 2 * states
    if model.num_moe_experts is None:
        yield part, "tp", "all_gather", 2 * states
        return
    # Experts keep their tokens.
    yield part, "tp", "all_gather", passes * update.tokens * model.hidden_size * ROUTER_BYTES
    yield part, "tp", "reduce_scatter", passes * update.tokens * model.num_moe_experts * ROUTER_BYTES
    if model.has(Axis.SHARED_FFN):
        yield part, "tp", "all_gather", 2 * states
        yield part, "tp", "reduce_scatter", states


def _embedding(update: Update, part: str, states: int) -> Iterator[Message]:
    """Each rank looks up the tokens of its rows of the vocabulary."""
    yield part, "tp", "reduce_scatter" if update.layout.sequence_parallel else "all_reduce", states


def _pipeline(
    update: Update, part: str, model: Architecture, layout: Layout, rank: int, count: int, backward: bool
) -> Iterator[Message]:
    """What stands between consecutive stages; those of one rank are `pp` apart, so each boundary is crossed."""
    states = count * update.states(model, sharded=layout.sequence_parallel)
    for stage in range(rank, layout.stages, update.pp):
        neighbours = (stage > 0, stage < layout.stages - 1)
        for has_neighbour, forward, back in zip(neighbours, ("receive", "send"), ("send", "receive"), strict=True):
            if has_neighbour:
                yield part, "pp", forward, states
                if backward:
                    yield part, "pp", back, states


def _loss(update: Update) -> Iterator[Message]:
    """On the last stage: `kernels.linear_kd`, and the gather of the teacher's states for it."""
    count, states = update.microbatches, update.states(update.student, sharded=False)
    sequence_parallel = update.layout.sequence_parallel
    columns = STUDENT_COLUMNS
    if update.placement == "cached" and update.teacher is not None:
        columns += 1 + update.cached_entries
    elif update.teacher is not None:
        columns = ALL_COLUMNS + (2 if update.divergence == "jsd" else 0)
        yield "loss", "tp", "all_gather", count * update.states(update.teacher, sharded=False)
    if sequence_parallel:
        yield "loss", "tp", "all_gather", count * states
    yield "loss", "tp", "all_gather", count * update.tp * update.tokens * columns * STATISTIC_BYTES
    gradient = count * update.tokens * update.student.hidden_size * GRADIENT_BYTES
    yield "loss", "tp", "reduce_scatter" if sequence_parallel else "all_reduce", gradient


def _pairs(update: Update, rank: int) -> Iterator[Message]:
    if update.teacher is None or not update.pairs:
        return
    layout, teacher_layout = update.layout, update.teacher_layout or update.layout
    sequence_parallel = layout.sequence_parallel
    separate = update.placement == "separate"
    of_student = owners(update.student.num_layers, layout)
    of_teacher = owners(update.teacher.num_layers, teacher_layout)
    targets = [of_student[pair.student] for pair in update.pairs]
    sources = [-1 if separate else of_teacher[pair.teacher] for pair in update.pairs]
    shard = update.microbatches * update.states(update.teacher, sharded=True)
    states = [pair.teacher for pair in update.pairs]
    for _, source, target in set(zip(states, sources, targets, strict=True)):
        if target == rank != source:
            yield "pairs", "teacher" if separate else "pp", "receive", shard
        if source == rank != target:
            yield "pairs", "pp", "send", shard
    for pair, target in zip(update.pairs, targets, strict=True):
        if target == rank and not sequence_parallel:
            # A recomputed layer asks for its target again; the final norm is in no layer.
            repeated = update.recompute and pair.student < update.student.num_layers - 1
            yield "pairs", "tp", "all_gather", shard * update.tp * (2 if repeated else 1)
    if update.teacher.hidden_size == update.student.hidden_size:
        return
    elements = update.teacher.hidden_size * update.student.hidden_size
    if len(set(targets)) > 1:
        yield "pairs", "pp", "all_reduce", elements * GRADIENT_BYTES
    if rank in targets:
        if sequence_parallel:
            yield "pairs", "tp", "all_reduce", elements * GRADIENT_BYTES
        yield from _data_parallel(update, "pairs", [elements])


def _gradients(update: Update, rank: int) -> Iterator[Message]:
    layout, model = update.layout, update.student
    sharded = 0  # whole on every rank, and applied to its part of the sequence
    for stage in range(rank, layout.stages, update.pp):
        held = held_elements(model, layout, stage)
        yield from _data_parallel(update, "gradients", [elements for _, elements in held])
        sharded += sum(elements for part, elements in held if part in ("norm", "router"))
    if layout.sequence_parallel:
        yield "gradients", "tp", "all_reduce", sharded * GRADIENT_BYTES
    if model.share_embeddings_and_output_weights and rank in (0, update.pp - 1):
        rows = padded_vocab_size(model, layout) // update.tp
        yield "gradients", "embedding", "all_reduce", rows * model.hidden_size * GRADIENT_BYTES


def _data_parallel(update: Update, part: str, sizes: Sequence[int]) -> Iterator[Message]:
    """Of one chunk's parameters: gradients to their owners, parameters back."""
    buffer = buffer_elements(sizes, update.dp)
    yield part, "dp", "reduce_scatter", buffer * GRADIENT_BYTES
    yield "parameters", "dp", "all_gather", buffer * update.element_size
