"""Validation in the middle of a training run, without effect on it, and the checkpoint it finds best.

Held-out documents come from outside, with whatever measures a model on them (`Measures`). The teacher's states of
these documents are computed once, by the teacher that trains the student, and stay in host memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.distillation.teacher import ColocatedTeacher
from minitron_nemo.models.build import Model
from minitron_nemo.models.states import gather_sequence
from minitron_nemo.parallel.device import current_device

BEST = "best_checkpoint.json"


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


class BestCheckpoint:
    """Which checkpoint had the lowest validation loss: best_checkpoint.json beside the checkpoints. Rank 0 alone.

    A checkpoint is judged by the validation after its own update; one that had none is never the best.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._losses: dict[int, float] = {}

    def measured(self, iteration: int, loss: float) -> None:
        """The loss after update `iteration`, of which a checkpoint may or may not be made."""
        self._losses[iteration] = loss

    def published(self, newest: int) -> int | None:
        """The best of the checkpoints up to the one after update `newest`, which is there now; None if unknown.

        May run in a thread of its own, beside `measured` of later updates.
        """
        best = self._recorded(newest)
        loss = self._losses.get(newest)
        if loss is not None and math.isfinite(loss) and (best is None or loss < best[1]):
            best = newest, loss
            record = {"checkpoint": f"iter_{newest:07d}", "iteration": newest, "validation_loss": loss}
            write_atomic(self.directory / BEST, json.dumps(record) + "\n")
        for iteration in [*self._losses]:  # a copy in one step: training may be measuring meanwhile
            if iteration <= newest:
                del self._losses[iteration]
        return None if best is None else best[0]

    def _recorded(self, newest: int) -> tuple[int, float] | None:
        """What the file says, unless that checkpoint is gone or of updates that are made again."""
        path = self.directory / BEST
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        if record["iteration"] > newest or not (self.directory / record["checkpoint"]).is_dir():
            return None
        return record["iteration"], record["validation_loss"]
