"""How far a long piece of work is: a bar with its ETA on a terminal, a line now and then elsewhere.

    calibrate ━━━━━━━━━━━━╸━━━━━━━  640/1,024 microbatches  ETA 0:00:12
    [calibrate] 640/1,024 microbatches, 0:00:20 so far, ETA 0:00:12

Training has a display of its own, distillation/panel.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

LINE_SECONDS = 30.0  # between two lines of a log
T = TypeVar("T")


class Progress:
    """Context manager for work of `total` parts, called `unit` in the plural; "bytes" are written as kB, MB, GB.

    `shown` on one process alone: the others count and say nothing. Where there is no terminal, a line comes at most
    every `LINE_SECONDS`, and one when all is done.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        shown: bool = True,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self._skipped = 0
        self._now = now
        self._start = self._said = now()
        self._console = (console or Console(soft_wrap=True, highlight=False)) if shown else None
        self._held = ExitStack()

    def __enter__(self) -> Progress:
        if self._console is not None and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False, table_column=Column(max_width=28, no_wrap=True)),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[state]}", markup=False),
            )
            self._bar = self._held.enter_context(Bar(*columns, console=self._console, refresh_per_second=4))
            self._task = self._bar.add_task(self.label, total=self.total, state=self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.advance(self.total - self.done)
            if self.total:
                self._line(f"{self._amount()} in {clock(self._elapsed)}")
        self._held.close()

    def advance(self, parts: int = 1) -> None:
        """`parts` more are done."""
        self.done += parts
        if self._console is None:
            return
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self.done)
        elif self._now() - self._said >= LINE_SECONDS:
            self._line(f"{self._amount()}, {clock(self._elapsed)} so far, ETA {clock(self.eta)}")

    def skip(self, parts: int) -> None:
        """`parts` were done before, by an earlier start: they say nothing about the speed."""
        self._skipped += parts
        self.done += parts

    @property
    def eta(self) -> float | None:
        """Seconds to the end at the speed so far; None before the first part is done."""
        made = self.done - self._skipped
        return None if made <= 0 else self._elapsed / made * (self.total - self.done)

    def __str__(self) -> str:
        """What stands behind the bar, whenever it is drawn."""
        if self.done >= self.total:
            return f"{self._amount()} in {clock(self._elapsed)}"
        return f"{self._amount()}  ETA {clock(self.eta)}"

    @property
    def _elapsed(self) -> float:
        return self._now() - self._start

    def _amount(self) -> str:
        if self.unit == "bytes":
            return f"{decimal(self.done)}/{decimal(self.total)}"
        return f"{self.done:,}/{self.total:,} {self.unit}"

    def _line(self, text: str) -> None:
        if self._console is not None and not self._console.is_terminal:
            self._console.print(f"[{self.label}] {text}", markup=False)
            self._said = self._now()


def track(items: Sequence[T], label: str, unit: str, *, shown: bool = True) -> Iterator[T]:
    """`items` one after another; each is done when the next one is asked for."""
    with Progress(label, len(items), unit, shown=shown) as bar:
        for item in items:
            yield item
            bar.advance()


def clock(seconds: float | None) -> str:
    """h:mm:ss, or a stand-in where that is not known yet."""
    if seconds is None:
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
