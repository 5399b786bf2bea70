"""The training loop: batches, steps, updates, reports, checkpoints, signals. It owns no maths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron.core import parallel_state

from minitron_nemo.arch import Architecture
from minitron_nemo.config import TrainConfig
from minitron_nemo.data.sampler import Sampler, microbatches
from minitron_nemo.distillation.intermediate import IntermediateLoss
from minitron_nemo.distillation.metrics import figures, flops_per_token
from minitron_nemo.distillation.nonfinite import Diverged, Skips, nonfinite_gradients, nonfinite_losses
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import build_optimizer, set_learning_rate, update
from minitron_nemo.distillation.panel import Panel
from minitron_nemo.distillation.phases import Segment, segment_at, segments
from minitron_nemo.distillation.progress import Progress
from minitron_nemo.distillation.report import Meter, Report
from minitron_nemo.distillation.saver import Saver
from minitron_nemo.distillation.schedule import Schedule
from minitron_nemo.distillation.signals import StopRequest
from minitron_nemo.distillation.state import TrainingState
from minitron_nemo.distillation.status import FILE_NAME, State, write_failure, write_status
from minitron_nemo.distillation.step import Step
from minitron_nemo.distillation.teacher import TeacherSource
from minitron_nemo.distillation.validation import Validation, summary
from minitron_nemo.distillation.watchdog import COMPUTING, HEARTBEATS, READING, Watchdog
from minitron_nemo.models.build import Model
from minitron_nemo.parallel import device, launch

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
        ce_weight: float | str | None = None,
        teacher_architecture: Architecture | None = None,
        validation: Validation | None = None,
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
        self.step = Step(student, teacher, objective, intermediate=intermediate, ce_weight=ce_weight)
        self.state = TrainingState(directory, student, self.optimizer, settings, config.keep_last, intermediate)
        self.meter = Meter(
            objective,
            figures(self.optimizer, self.step.teacher_wait, sampler, self.segments),
            flops_per_token=partial(flops_per_token, student.architecture, teacher_architecture),
            peak_flops=config.peak_flops or (device.peak_flops() if config.precision == "bf16" else None),
        )
        self.watchdog = Watchdog(run_dir / HEARTBEATS, config.hang_timeout, self._fail)
        self.validation = validation
        self.iteration = 0
        self.skips = Skips()
        self._went_back_to: int | None = None  # iteration of the last roll-back's checkpoint, until the next save
        self.reports: list[Report] = []

    def run(self) -> Outcome:
        """Train to the last step, or until a signal asks to stop; the student then holds the weights of that update.

        "stopped" means that the state is saved and `run` of a new Trainer goes on from it. Raises SaveError under
        `fail_on_save_error`, Diverged when losses or gradients stay not finite, RuntimeError with the watchdog's
        verdict where it ended another rank.
        """
        try:
            with self.watchdog:
                return self._run()
        except Exception as error:
            verdict = self.watchdog.verdict()
            self._fail(verdict or f"{type(error).__name__}: {error}")
            if verdict is not None:
                raise RuntimeError(verdict) from error
            raise
        finally:
            self.state.abandon()

    def _run(self) -> Outcome:
        resumed = self.state.resume()
        if resumed is not None:
            self.iteration, self.skips = resumed.iteration, Skips(**resumed.skips)
            self.step.balance.load_state_dict(resumed.balance)
            self.sampler.load_state_dict(resumed.data)
        with Progress(self._panel(), launch.rank() == 0) as progress, StopRequest() as stop:
            saver = Saver(self.state, self.config, progress, self.watchdog)
            if resumed is not None:
                for problem in resumed.damaged:
                    progress.say(f"CHECKPOINT DAMAGED, falling back to the one before: {problem}")
                progress.say(f"resumed after update {self.iteration} from {self.directory}")
            progress.say(
                f"{self.config.steps:,} updates of {progress.panel.tokens:,} tokens in all, a checkpoint every "
                f"{self.config.save_interval:,}: {self.directory}"
            )
            self._running(progress)
            current = self.segments[0] if len(self.segments) == 1 else None
            while self.iteration < self.config.steps:
                segment = segment_at(self.segments, self.sampler.consumed_samples)
                if segment is not current:
                    progress.say(f"from update {self.iteration + 1} on {segment}")
                    current = segment
                grad_norm, lr, nonfinite = self._update(segment)
                saver.poll()
                signal = stop.agreed()
                if nonfinite is not None:
                    self._skip(nonfinite, saver)
                # What the meter has is not saved, so it is reported before a stop.
                elif signal or self.iteration % self.config.log_interval == 0 or self.iteration == self.config.steps:
                    self._report(progress, grad_norm, lr)
                self._validate(progress)
                if signal is not None and self.iteration < self.config.steps:
                    refused = self._save(saver, wait=True)
                    self._status("stopped", reason=f"{signal}{'' if refused is None else f', and {refused}'}")
                    return "stopped"
                # Not amid skipped updates: the parameters may be what is wrong.
                due = self.iteration % self.config.save_interval == 0 and nonfinite is None
                if due and self.iteration < self.config.steps:
                    self._save(saver, wait=False)
                    self._went_back_to = None
            saver.finish()
            if self.skips.skipped == self.config.steps:
                raise Diverged("no update of the run was finite: lower train.lr or check the data")
            if self.skips.skipped:
                progress.say(f"{self.skips.skipped} of {self.config.steps} updates did not happen")
        self._wait_for_parameters()
        return "done"

    def _panel(self) -> Panel:
        tokens = sum(segment.steps * segment.tokens_per_step for segment in self.segments)
        skips: dict[str, float] = {"train/skipped": self.skips.skipped, "train/roll_backs": self.skips.roll_backs}
        return Panel(self.name, self.config.steps, tokens, self.directory, self.iteration, values=skips)

    def _update(self, segment: Segment) -> tuple[float, float, str | None]:
        """One update of the parameters: the gradient norm before clipping, the learning rate, why it did not happen."""
        config = self.config
        self.watchdog.beat(self.iteration, READING)
        position = self.sampler.consumed_samples
        batches = microbatches(
            self.sampler.blend_at(position),
            self.sampler.next_batch(segment.global_batch_size),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            segment.micro_batch_size,
            position,
        )
        self.watchdog.beat(self.iteration, COMPUTING)
        lr = self.schedule.learning_rate(self.iteration + 1 - self.skips.skipped)
        set_learning_rate(self.optimizer, lr, config.weight_decay)
        balance = self.step.balance.state_dict()
        sums = self.step(batches)
        grad_norm = math.nan
        problem = nonfinite_losses(sums, self.step)
        if problem is None:
            grad_norm = update(self.optimizer)
            if not math.isfinite(grad_norm):
                problem = nonfinite_gradients(grad_norm, batches)
        self.iteration += 1
        if problem is None:
            self.skips.in_a_row = 0
            self.meter.add(sums, segment)
        else:
            self.step.balance.load_state_dict(balance)
        return grad_norm, lr, problem

    def _skip(self, problem: str, saver: Saver) -> None:
        """Count the update that did not happen; after too many, go back to a checkpoint or give up."""
        self.skips.skip()
        saver.progress.say(f"update {self.iteration} did not happen: {problem}")
        if self.skips.in_a_row >= self.config.max_nonfinite_steps:
            self._roll_back(problem, saver)
        saver.progress.scalars(
            self.iteration, {"train/skipped": self.skips.skipped, "train/roll_backs": self.skips.roll_backs}
        )

    def _roll_back(self, problem: str, saver: Saver) -> None:
        """Parameters and moments of the last good checkpoint, the data where it stands; an older one the next time."""
        resumed = None
        if self.iteration < self.config.steps:
            saver.finish()
            with self.watchdog.paused():
                resumed = self.state.roll_back(before=self._went_back_to)
        if resumed is None:
            raise Diverged(
                f"{self.skips.in_a_row} updates up to {self.iteration} were not finite, and there is no checkpoint "
                f"left to go back to: {problem}. Look at these samples, or lower train.lr; then start again from the "
                f"last checkpoint in {self.directory}, or without it"
            )
        self._went_back_to = resumed.iteration
        self.step.balance.load_state_dict(resumed.balance)
        self.skips.rolled_back(self.iteration, resumed.iteration - resumed.skips["skipped"])
        saver.progress.say(
            f"went back to the parameters after update {resumed.iteration}, on with the data of {self.iteration + 1}"
        )

    def _save(self, saver: Saver, wait: bool) -> str | None:
        self._wait_for_parameters()
        state = {
            "data": self.sampler.state_dict(),
            "skips": asdict(self.skips),
            "balance": self.step.balance.state_dict(),
        }
        return saver.save(self.iteration, state, wait=wait)

    def _report(self, progress: Progress, grad_norm: float, lr: float) -> None:
        report = self.meter.report(self.iteration, lr, grad_norm)
        self.reports.append(report)
        progress.show(report)
        self._running(progress)

    def _validate(self, progress: Progress) -> None:
        if self.validation is None or not self.validation.due(self.iteration, self.config.steps):
            return
        self._wait_for_parameters()
        with self.watchdog.paused(), self.meter.paused():
            found = self.validation()
        self.state.checkpoints.best.measured(self.iteration, found["loss"])
        progress.scalars(self.iteration, {f"validation/{name}": value for name, value in found.items()})
        progress.say(f"validation after update {self.iteration}: {summary(found)}")

    def _wait_for_parameters(self) -> None:
        """Under overlap_param_gather the updated parameters arrive during the next forward; here there is none."""
        if self.config.overlap_param_gather:
            for chunk in self.trained:
                chunk.start_param_sync(force_sync=True)

    def _fail(self, reason: str) -> None:
        write_failure(self.run_dir, step=self.name, iteration=self.iteration, steps=self.config.steps, reason=reason)

    def _running(self, progress: Progress) -> None:
        problem = None
        try:
            self._status("running")
        except OSError as error:
            problem = error.strerror
        progress.refused(self.run_dir / FILE_NAME, problem)

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
