"""Validation in the middle of a training run, without effect on it.

Held-out documents come from outside, with whatever measures a model on them (`Measures`). The teacher's states of
these documents are computed once, by the teacher that trains the student, and stay in host memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.distillation.teacher import ColocatedTeacher
from minitron_nemo.models.build import Model
from minitron_nemo.models.states import gather_sequence
from minitron_nemo.parallel.device import current_device


class Measures(Protocol):
    """Measures a model on its `batches`, this rank's share of some documents. See `evaluation.heldout`."""

    batches: list[Microbatch]

    def measure(
        self, model: Model, teacher_states: Iterable[Tensor] | None, output_weight: Tensor | None
    ) -> dict[str, float]: ...


class Validation:
    """Measures `student` every `interval` updates and after the last one."""

    def __init__(self, heldout: Measures, student: Model, teacher: ColocatedTeacher | None, interval: int) -> None:
        """Without a teacher on these ranks only the loss is measured."""
        self.heldout = heldout
        self.student = student
        self.teacher = teacher
        self.interval = interval
        self._states: list[Tensor] | None = None  # [s/tp, b, h_t] per microbatch, in host memory, on the last stage

    def due(self, iteration: int, steps: int) -> bool:
        return iteration % self.interval == 0 or iteration == steps

    def __call__(self) -> dict[str, float]:
        """The figures, the same on every rank; the parameters must be there. Collective."""
        if self.teacher is None:
            return self.heldout.measure(self.student, None, None)
        if self._states is None:
            self._states = self._run_teacher(self.teacher)
        return self.heldout.measure(self.student, self._gathered(self._states), self.teacher.output_weight)

    def _run_teacher(self, teacher: ColocatedTeacher) -> list[Tensor]:
        batches, states = self.heldout.batches, []
        for start in range(0, len(batches), teacher.window):
            signal = teacher.step(batches[start : start + teacher.window])
            states += [hidden.cpu() for hidden in signal.hidden]
        return states

    def _gathered(self, states: list[Tensor]) -> Iterator[Tensor]:
        """One microbatch after another as the student's states come, [s(/tp) * b, h_t]."""
        for hidden in states:
            shard = hidden.to(current_device())
            yield (shard if self.student.layout.sequence_parallel else gather_sequence(shard)).flatten(0, 1)


def summary(found: Mapping[str, float]) -> str:
    """What a line on the console has room for."""
    error = f" ± {found['loss_se']:.4f}" if "loss_se" in found else ""
    loss = f"loss {found['loss']:.4f}{error}"
    if "kl_to_teacher" not in found:
        return loss
    return f"{loss}, KL to the teacher {found['kl_to_teacher']:.4f}, top-1 agreement {found['top1_agreement']:.1%}"
