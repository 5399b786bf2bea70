"""What a terminal shows of a training: one panel, drawn again in its place.

    ╭─ distill ──────────────────────────────────────────────────────────────────╮
    │ ━━━━━━━━━━╸━━━━━  40/60 updates  ETA 0:12:31, at 14:05                     │
    │ loss        2.3145   logits 0.4431   CE 3.5640   hidden 0.0211 × 0.25      │
    │ ...                                                                        │

It is a view of the last value of every tag that goes to metrics.jsonl. No row is wider than 79 columns: terminals break
what no longer fits after a change of size, and then a frame cannot be drawn over the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minitron_nemo.progress import clock

WIDTH = 79
LABELS = 12  # columns of the labels and what separates them from the figures
BAR = 16
DAY = "%Y-%m-%d"


@dataclass
class Panel:
    """`steps` updates of `tokens` positions in all, of which `iteration` are made."""

    name: str
    steps: int
    tokens: int
    directory: Path
    iteration: int = 0
    now: Callable[[], float] = time.time
    values: dict[str, float] = field(default_factory=dict)  # the last ones, by tag
    validated: int = 0  # update that the values of validation/ are of
    reported: float = 0.0  # time of the last report
    checkpoint: tuple[int, float] | None = None  # update and time of the last one
    saving: int | None = None  # update of the one that is being written

    def __post_init__(self) -> None:
        self._start = self.now()
        saved = self.directory / f"iter_{self.iteration:07d}"
        if saved.is_dir():
            self.checkpoint = self.iteration, saved.stat().st_mtime

    def record(self, iteration: int, values: Mapping[str, float]) -> None:
        """A record of metrics.jsonl."""
        self.values.update(values)
        if "train/loss" in values or "train/skipped" in values:
            self.iteration = iteration
        if "train/loss" in values:
            self.reported = self.now()
        if "validation/loss" in values:
            self.validated = iteration
        if "checkpoint/write_seconds" in values:
            self.checkpoint, self.saving = (iteration, self.now()), None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(WIDTH, options.max_width)
        rows = Table.grid(padding=(0, 1, 0, 0))
        rows.add_column(width=LABELS - 1, style="dim")
        rows.add_column()
        for label, text, style in self._rows(width - 4 - LABELS):
            rows.add_row(label, Text(text, style=style))
        whole = Table.grid()
        whole.add_row(self._progress())
        whole.add_row(rows)
        yield Frame(whole, title=Text(self.name, style="bold"), title_align="left", width=width, border_style="dim")

    def _progress(self) -> Table:
        bar = ProgressBar(total=self.steps, completed=self.iteration, width=BAR)
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(bar, Text(f"{self.iteration:,}/{self.steps:,} updates"), Text(self._when()))
        return line

    def _when(self) -> str:
        """When it will end, or how long it took."""
        if self.iteration >= self.steps:
            return f"in {clock(self.now() - self._start)}"
        if self.eta is None:
            return "ETA -:--:--"
        end, today = (time.localtime(self.now() + seconds) for seconds in (self.eta, 0))
        far = time.strftime(DAY, end) != time.strftime(DAY, today)
        return f"ETA {clock(self.eta)}, {time.strftime('%a %d %b %H:%M' if far else 'at %H:%M', end)}"

    @property
    def eta(self) -> float | None:
        """Seconds to the end at the speed of the last report, which phases of another length do not change much."""
        speed = self.values.get("speed/tokens_per_second")
        if speed is None:
            return None
        left = (self.tokens - self.values["data/tokens"]) / speed
        return max(0.0, left - (self.now() - self.reported))

    def _rows(self, room: int) -> list[tuple[str, str, str]]:
        """Label, figures and style; always as many rows, so that nothing below them moves."""
        skipped, back = (round(self.values.get(f"train/{name}", 0)) for name in ("skipped", "roll_backs"))
        lost = f"{skipped:,} update{'s' * (skipped != 1)}; {back} return{'s' * (back != 1)} to a checkpoint"
        return [
            ("loss", self._figures(_LOSSES, self._hidden()), "bold"),
            ("update", self._figures(_UPDATE), ""),
            ("speed", self._figures(_SPEED), ""),
            ("tokens", self._figures({"data/tokens": f"{{:,.0f}} of {self.tokens:,}"}), ""),
            ("held out", self._figures(_HELD_OUT, self._measured()).replace("   ±", " ±"), ""),
            ("checkpoint", self._checkpoint(room), ""),
            ("skipped", lost if skipped or back else "none", "yellow" if skipped or back else ""),
        ]

    def _figures(self, forms: Mapping[str, str], last: str = "") -> str:
        """What is known of the tags of `forms`, and `last`."""
        known = [form.format(self.values[tag]) for tag, form in forms.items() if tag in self.values]
        return "   ".join([*known, last] if last else known) or "not yet"

    def _hidden(self) -> str:
        if "train/hidden" not in self.values:
            return ""
        return f"hidden {self.values['train/hidden']:.4f} × {self.values['train/alpha']:.3g}"

    def _measured(self) -> str:
        return f"after update {self.validated:,}" if self.validated else ""

    def _checkpoint(self, room: int) -> str:
        writing = "" if self.saving is None else f"; writing that of update {self.saving:,}"
        if self.checkpoint is None:
            return f"none yet{writing}\n{_end_of(str(self.directory), room)}"
        iteration, made = self.checkpoint
        where = _end_of(str(self.directory / f"iter_{iteration:07d}"), room)
        return f"after update {iteration:,}, {clock(max(0.0, self.now() - made))} ago{writing}\n{where}"


_LOSSES = {"train/loss": "{:.4f}", "train/logits": "logits {:.4f}", "train/ce": "CE {:.4f}"}
_UPDATE = {"train/lr": "learning rate {:.2e}", "train/grad_norm": "gradient norm {:.2f}"}
_SPEED = {
    "speed/tokens_per_second": "{:,.0f} tokens/s",
    "speed/mfu": "{:.1%} MFU",
    "speed/seconds_per_update": "{:.2f} s an update",
}
_HELD_OUT = {
    "validation/loss": "loss {:.4f}",
    "validation/loss_se": "± {:.4f}",
    "validation/kl_to_teacher": "KL {:.4f}",
    "validation/top1_agreement": "{:.1%}",
}


def _end_of(path: str, room: int) -> str:
    """The path, or as much of its end as there is room for."""
    return path if len(path) <= room else f"…{path[len(path) - max(room, 2) + 1 :]}"
