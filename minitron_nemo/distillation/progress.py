"""What a person sees of a training run: a panel on a terminal, plain lines elsewhere; TensorBoard and metrics.jsonl.

Rank 0 shows it; the other ranks hold a `Progress` that shows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live

from minitron_nemo.distillation.metrics import EventsFile, MetricsFile
from minitron_nemo.distillation.panel import Panel
from minitron_nemo.distillation.report import Report
from minitron_nemo.progress import clock


class Progress:
    """Context manager for the console, TensorBoard's event file and metrics.jsonl of one run."""

    def __init__(self, panel: Panel, shown: bool, console: Console | None = None) -> None:
        """`panel` says how many updates were made before; what a killed run logged beyond them is dropped."""
        self.panel = panel
        self._console = console or Console(highlight=False)
        self._console.quiet = not shown
        self._files: tuple[MetricsFile | EventsFile, ...] = ()
        self._refused: set[Path] = set()
        self._held = ExitStack()
        if shown:
            directory, done = panel.directory, panel.iteration
            events = self._held.enter_context(closing(EventsFile(directory / "tensorboard", done)))
            metrics = self._held.enter_context(closing(MetricsFile(directory / "metrics.jsonl", done)))
            self._files = metrics, events

    def __enter__(self) -> Progress:
        if self._files and self._console.is_terminal:
            self._held.enter_context(Live(self.panel, console=self._console, refresh_per_second=2))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def show(self, report: Report) -> None:
        """One report: on the panel or as a line of its own, and TensorBoard's scalars."""
        self.scalars(report.iteration, report.scalars)
        if not self._console.is_terminal:
            self.say(f"{report.iteration}/{self.panel.steps}  {report}  ETA {clock(self.panel.eta)}")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """A record of metrics.jsonl and TensorBoard's scalars."""
        self.panel.record(iteration, values)
        for file in self._files:
            self.refused(file.path, file.append(iteration, values))

    def saving(self, iteration: int | None) -> None:
        """The checkpoint of this update is being written; None: it could not be."""
        self.panel.saving = iteration

    def refused(self, path: Path, problem: str | None) -> None:
        """Say, once, that a full disk refuses a file that training can do without; None when it took it."""
        if problem and path not in self._refused:
            self.say(f"{path}: {problem}; training goes on, and the file when it can")
        (self._refused.add if problem else self._refused.discard)(path)

    def say(self, message: str) -> None:
        """A line that stays; on a terminal above the panel, which is not drawn over lines that it breaks by itself."""
        self._console.print(f"[{self.panel.name}] {message}", markup=False, soft_wrap=not self._console.is_terminal)
