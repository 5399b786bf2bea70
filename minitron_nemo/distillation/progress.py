"""What a person sees of a training run: a bar on a terminal, plain lines elsewhere; TensorBoard and metrics.jsonl.

Rank 0 shows it; the other ranks hold a `Progress` that shows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from minitron_nemo.distillation.metrics import EventsFile, MetricsFile
from minitron_nemo.distillation.report import Report


class Progress:
    """Context manager for the console line, TensorBoard's event file and metrics.jsonl of one run."""

    def __init__(self, name: str, steps: int, done: int, directory: Path, shown: bool) -> None:
        """`done` updates of `steps` were made before; what a killed run logged beyond them is dropped."""
        self.name = name
        self.steps = steps
        self._console = Console(quiet=not shown, soft_wrap=True, highlight=False)
        self._bar: Bar | None = None
        self._files: tuple[MetricsFile | EventsFile, ...] = ()
        self._refused: set[Path] = set()
        self._held = ExitStack()
        if not shown:
            return
        events = self._held.enter_context(closing(EventsFile(directory / "tensorboard", done)))
        metrics = self._held.enter_context(closing(MetricsFile(directory / "metrics.jsonl", done)))
        self._files = metrics, events
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[report]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(name, total=steps, completed=done, report="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._held.enter_context(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def show(self, report: Report) -> None:
        """One report: the bar's text or a line of its own, and TensorBoard's scalars."""
        self.scalars(report.iteration, report.scalars)
        if self._bar is not None:
            self._bar.update(self._task, completed=report.iteration, report=str(report))
        else:
            eta = clock((self.steps - report.iteration) * report.seconds_per_step)
            self._console.print(f"[{self.name}] {report.iteration}/{self.steps}  {report}  ETA {eta}", markup=False)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """A record of metrics.jsonl and TensorBoard's scalars."""
        for file in self._files:
            problem = file.append(iteration, values)
            self.refused(file.path, problem)
            if problem is not None:  # TensorBoard's thread would print a traceback
                return

    def refused(self, path: Path, problem: str | None) -> None:
        """Say, once, that a full disk refuses a file that training can do without; None when it took it."""
        if problem and path not in self._refused:
            self.say(f"{path}: {problem}; training goes on, and the file when it can")
        (self._refused.add if problem else self._refused.discard)(path)

    def say(self, message: str) -> None:
        """A line that stays."""
        self._console.print(f"[{self.name}] {message}", markup=False)


def clock(seconds: float) -> str:
    """h:mm:ss"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
