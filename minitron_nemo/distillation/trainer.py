"""The training loop: batches, steps, updates, reports, checkpoints, signals. It owns no maths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.config import TrainConfig
from minitron_nemo.data.sampler import Sampler, microbatches
from minitron_nemo.distillation.intermediate import IntermediateLoss
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import build_optimizer, set_learning_rate
from minitron_nemo.distillation.phases import Segment, segment_at, segments
from minitron_nemo.distillation.progress import Progress
from minitron_nemo.distillation.report import Meter, Report
from minitron_nemo.distillation.schedule import Schedule
from minitron_nemo.distillation.signals import StopRequest
from minitron_nemo.distillation.state import SaveError, TrainingState
from minitron_nemo.distillation.status import State, write_status
from minitron_nemo.distillation.step import SUMS, Step
from minitron_nemo.distillation.teacher import TeacherSource
from minitron_nemo.models.build import Model
from minitron_nemo.parallel import launch

Outcome = Literal["done", "stopped"]


class Trainer:
    """Trains `student`, whose chunks are wrapped in DDP, from where `directory` says an earlier run stopped.

    Without a `teacher` the objective is cross-entropy alone. `settings` are what a resumed run must share with the
    interrupted one (`TrainingState`). `run_dir` gets status.json, `name` is the step of the chain it reports.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: DistillationObjective,
        student: Model,
        teacher: TeacherSource | None,
        sampler: Sampler,
        *,
        directory: Path,
        run_dir: Path,
        name: str,
        settings: Mapping[str, Any],
        intermediate: IntermediateLoss | None = None,
    ) -> None:
        self.config = config
        self.student = student
        self.sampler = sampler
        self.directory = directory
        self.run_dir = run_dir
        self.name = name
        self.schedule = Schedule.from_config(config)
        self.segments = segments(config, sampler.blend.sequence_length)
        self.trained = [*student.chunks, *(intermediate.chunks if intermediate else [])]
        self.optimizer = build_optimizer(config, student, self.trained[len(student.chunks) :])
        self.step = Step(
            student,
            teacher,
            objective,
            intermediate=intermediate,
        )
        self.state = TrainingState(directory, student, self.optimizer, settings, config.keep_last, intermediate)
        self.meter = Meter(objective)
        self.iteration = 0
        self.reports: list[Report] = []

    def run(self) -> Outcome:
        """Train to the last step, or until a signal asks to stop; the student then holds the weights of that update.

        "stopped" means that the state is saved and `run` of a new Trainer goes on from it. Raises SaveError under
        `fail_on_save_error`, FloatingPointError when losses or gradients are no longer finite.
        """
        try:
            return self._run()
        except Exception as error:
            write_status(
                self.run_dir,
                "failed",
                step=self.name,
                iteration=self.iteration,
                steps=self.config.steps,
                reason=f"{type(error).__name__}: {error}",
            )
            raise

    def _run(self) -> Outcome:
        resumed = self.state.resume()
        if resumed is not None:
            self.iteration, position = resumed
            self.sampler.load_state_dict(position)
        with (
            Progress(
                self.name, self.config.steps, self.iteration, self.directory / "tensorboard", launch.rank() == 0
            ) as progress,
            StopRequest() as stop,
        ):
            if resumed is not None:
                progress.say(f"resumed after update {self.iteration} from {self.directory}")
            self._status("running")
            current = self.segments[0] if len(self.segments) == 1 else None
            while self.iteration < self.config.steps:
                segment = segment_at(self.segments, self.sampler.consumed_samples)
                if segment is not current:
                    progress.say(f"from update {self.iteration + 1} on {segment}")
                    current = segment
                grad_norm, lr = self._update(segment)
                if self.iteration % self.config.log_interval == 0 or self.iteration == self.config.steps:
                    self._report(progress, grad_norm, lr)
                signal = stop.agreed()
                if signal is not None and self.iteration < self.config.steps:
                    problem = self._save(progress)
                    self._status("stopped", reason=f"{signal}{'' if problem is None else f', and {problem}'}")
                    return "stopped"
                if self.iteration % self.config.save_interval == 0 and self.iteration < self.config.steps:
                    self._save(progress)
        self._wait_for_parameters()
        return "done"

    def _update(self, segment: Segment) -> tuple[float, float]:
        """One update of the parameters; the gradient norm before clipping, and the learning rate."""
        config = self.config
        blend = self.sampler.blend_at(self.sampler.consumed_samples)
        batches = microbatches(
            blend,
            self.sampler.next_batch(segment.global_batch_size),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            segment.micro_batch_size,
        )
        lr = self.schedule.learning_rate(self.iteration + 1)
        set_learning_rate(self.optimizer, lr, config.weight_decay)
        sums = self.step(batches)
        self._check_finite(sums)
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm of update {self.iteration + 1} is {grad_norm}; "
                f"lower train.lr or check the data, then start again from the last checkpoint in {self.directory}"
            )
        self.iteration += 1
        self.meter.add(sums, segment.tokens_per_step)
        return grad_norm, lr

    def _check_finite(self, sums: Tensor) -> None:
        """Raise on every rank, before parameters change, if a token of the global batch has no finite loss."""
        count = sums[SUMS.index("nonfinite")].clone()
        torch.distributed.all_reduce(count)
        if count == 0:
            return
        found: list[list[str]] = [[] for _ in range(launch.world_size())]
        mine = [
            f"data-parallel rank {parallel_state.get_data_parallel_rank()}, {name}" for name in self.step.nonfinite()
        ]
        torch.distributed.all_gather_object(found, mine)
        where = sorted({name for names in found for name in names})  # tensor-parallel ranks say the same
        raise FloatingPointError(
            f"update {self.iteration + 1}: the loss is not finite: {'; '.join(where[:4])}"
            f"{f' and {len(where) - 4} more' if len(where) > 4 else ''}. Nothing of this update was applied: look at "
            f"these samples, or lower train.lr and start again from the last checkpoint in {self.directory}"
        )

    def _report(self, progress: Progress, grad_norm: float, lr: float) -> None:
        report = self.meter.report(self.iteration, lr, grad_norm)
        self.reports.append(report)
        progress.show(report)
        self._status("running")

    def _save(self, progress: Progress) -> str | None:
        """Save the state; what went wrong, where training may go on without it."""
        self._wait_for_parameters()
        try:
            self.state.save(self.iteration, self.sampler.state_dict())
        except SaveError as error:
            if self.config.fail_on_save_error:
                raise
            problem = f"the checkpoint after update {self.iteration} could not be written: {error}"
            progress.say(f"{problem}; training goes on, the previous checkpoint is as it was")
            return problem
        return None

    def _wait_for_parameters(self) -> None:
        """Under overlap_param_gather the updated parameters arrive during the next forward; here there is none."""
        if self.config.overlap_param_gather:
            for chunk in self.trained:
                chunk.start_param_sync(force_sync=True)

    def _status(self, state: State, reason: str | None = None) -> None:
        if launch.rank() == 0:
            write_status(
                self.run_dir,
                state,
                step=self.name,
                iteration=self.iteration,
                steps=self.config.steps,
                reason=reason,
            )
