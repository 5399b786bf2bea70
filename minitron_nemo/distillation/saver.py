"""When a training run saves, and what it says of it: the trainer's side of `TrainingState`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minitron_nemo.config import TrainConfig
from minitron_nemo.distillation.progress import Progress
from minitron_nemo.distillation.state import Saved, SaveError, TrainingState
from minitron_nemo.distillation.watchdog import Watchdog


class Saver:
    """Begins saves and sees to their end. All methods are collective; a save that fails is said, once, by all."""

    def __init__(self, state: TrainingState, config: TrainConfig, progress: Progress, watchdog: Watchdog) -> None:
        self.state = state
        self.config = config
        self.progress = progress
        self.watchdog = watchdog

    def save(self, iteration: int, state: Mapping[str, Any], *, wait: bool) -> str | None:
        """Save; what went wrong with this save, where training may go on without it and it is known already."""
        self.finish()
        self.progress.saving(iteration)
        problem = self._tried(lambda: self.state.save(iteration, state))
        if problem is None and (wait or not self.config.async_save):
            problem = self.finish()
        return problem

    def poll(self) -> None:
        """Publish the last save if all of its files are written."""
        self._tried(self.state.poll)

    def finish(self) -> str | None:
        """Wait for the last save, if there is one under way; what went wrong with it."""
        return self._tried(self.state.finish)

    def _tried(self, work: Callable[[], Saved | None]) -> str | None:
        with self.watchdog.paused():
            try:
                saved = work()
            except SaveError as error:
                if self.config.fail_on_save_error:
                    raise
                self.progress.saving(None)
                self.progress.say(f"{error}; training goes on, the previous checkpoint is as it was")
                return str(error)
        if saved is not None:
            stall, write = saved.stall_seconds, saved.write_seconds
            self.progress.say(
                f"checkpoint after update {saved.iteration}: training stood still for {stall:.2f} s, "
                f"its files took {write:.2f} s"
            )
            self.progress.scalars(
                saved.iteration, {"checkpoint/stall_seconds": stall, "checkpoint/write_seconds": write}
            )
        return None
