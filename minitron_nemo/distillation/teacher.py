"""Where the teacher's states come from.

The student's last stage needs the teacher's states after its final norm and its output weight, nothing else: 2 * h_t
bytes per token instead of 2 * vocabulary. Stages with intermediate losses need the states of their pairs. A
`TeacherSource` gives them for a few microbatches at a time, a window: the step asks for a window's states, runs the
student on it, and goes on to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.config import TeacherConfig
from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.errors import UserError
from minitron_nemo.kernels import SparseTeacher
from minitron_nemo.models.build import Model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.models.states import Delivery, StateCapture, shard_sequence
from minitron_nemo.parallel.layout import Layout


@dataclass(frozen=True)
class TeacherSignal:
    """What the loss needs of the teacher, on the ranks of the student's last pipeline stage; nothing elsewhere.

    `hidden` has one [s/tp, b, h_t] per microbatch: this tensor-parallel rank's part of the sequence. `output_weight` is
    this rank's rows of the output projection, [padded_vocab/tp, h_t]. `states` has one {state: [s/tp, b, h_t]} per
    microbatch, on every stage: what the intermediate losses there need (see `models.states`).

    A placement that has no states gives `sparse` instead of `hidden`, without `output_weight`: one per microbatch, of
    its [s*b] tokens, the sequence outermost, whole on every tensor-parallel rank.
    """

    hidden: list[Tensor]
    output_weight: Tensor | None
    states: list[dict[int, Tensor]] = field(default_factory=list)
    sparse: list[SparseTeacher] = field(default_factory=list)


class TeacherSource(Protocol):
    """Any placement of the teacher. `window` is the number of microbatches whose states it holds at once."""

    window: int

    def step(self, microbatches: Sequence[Microbatch]) -> TeacherSignal:
        """States for these microbatches, at most `window`. Collective: every rank of the student calls it.

        Microbatches of data-parallel rank r have `position` r * micro_batch_size after those of rank 0; the caller
        holds nothing any more of what the call before gave.
        """


class ColocatedTeacher:
    """The teacher on the student's ranks: a forward-only pipeline pass per window.

    Its layout is the student's, but for the split into virtual stages and layers (`colocated_layout`). Frozen, without
    gradients and without DDP. States stay sequence-sharded over the tensor-parallel group until the loss gathers them,
    microbatch by microbatch; `buffer_bytes` bounds what is held of them per rank, for microbatches of at most
    `micro_batch_size` x `sequence_length` tokens.
    """

    def __init__(
        self,
        model: Model,
        *,
        sequence_length: int,
        micro_batch_size: int,
        buffer_bytes: int,
        student_layout: Layout,
        deliveries: Sequence[Delivery] = (),
    ) -> None:
        """`deliveries` are the states that intermediate losses need, and the pipeline ranks that need them."""
        layout = model.layout
        tp = layout.tensor_model_parallel_size
        if sequence_length % tp:
            raise UserError(
                f"data.sequence_length: {sequence_length} is not a multiple of parallel.tensor_model_parallel_size "
                f"{tp}, over which the teacher's states are split; change one of them"
            )
        self.model = model
        self.capture = StateCapture(model, deliveries)
        tokens = micro_batch_size * sequence_length // tp
        element_size = next(model.chunks[0].parameters()).element_size()
        self.window = window_size(
            # The final states, and those of the pairs on the rank with most of them.
            state_bytes=(1 + self.capture.states_held()) * tokens * model.architecture.hidden_size * element_size,
            buffer_bytes=buffer_bytes,
            multiple_of=interleaved_microbatches(layout, student_layout),
        )
        for chunk in model.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        self.output_weight = model.output_weight
        if model.output_layer is not None:
            model.output_layer.mode = "hidden"

    def step(self, microbatches: Sequence[Microbatch]) -> TeacherSignal:
        """Run the teacher on `microbatches`, all of one shape, and keep the states of its last stage."""
        micro_batch_size, sequence_length = microbatches[0]["tokens"].shape
        hidden = forward_only(
            self.model,
            iter(microbatches),
            len(microbatches),
            sequence_length,
            micro_batch_size,
            self._keep,
        )
        states = self.capture.take([tuple(batch["tokens"].shape) for batch in microbatches])
        return TeacherSignal(hidden, self.output_weight, states)

    def _keep(self, output: Tensor, microbatch: Microbatch) -> Tensor:
        # [b, s, h] -> [s, b, h]; the sequence is [s/tp] already under sequence parallelism
        return shard_sequence(output.transpose(0, 1), self.model.layout)


def colocated_layout(config: TeacherConfig, teacher: Architecture, student: Layout, world_size: int) -> Layout:
    """The layout of a teacher on the student's ranks: the student's, or another split of the layers over them.

    Raises UserError for one that differs in more or that the teacher does not fit.
    """
    if config.layout is None:
        return student
    layout = Layout.from_config(config.layout)
    for key in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "sequence_parallel",
    ):
        own, wanted = getattr(layout, key), getattr(student, key)
        if own != wanted:
            raise UserError(
                f"teacher.layout.{key}: {own} is not the {wanted} of parallel.{key}, and a colocated teacher shares "
                "the student's ranks; make them equal or use placement separate"
            )
    layout.check(teacher, world_size, "teacher.layout")
    layout.check_split("teacher", teacher.num_layers, "teacher.layout")
    return layout


def interleaved_microbatches(*layouts: Layout) -> int:
    """The pipeline size where one of its models has virtual stages: microbatches come in multiples of it; or 1."""
    interleaved = any(layout.virtual_pipeline_model_parallel_size for layout in layouts)
    return layouts[0].pipeline_model_parallel_size if interleaved else 1


def window_size(*, state_bytes: int, buffer_bytes: int, multiple_of: int) -> int:
    """Microbatches whose states, of `state_bytes` each, fit into `buffer_bytes`; at least `multiple_of`.

    Interleaved schedules take microbatches in groups of the pipeline size, so a window is a multiple of it.
    """
    return max(buffer_bytes // state_bytes // multiple_of, 1) * multiple_of
