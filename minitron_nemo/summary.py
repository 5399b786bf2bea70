"""The end of `minitron run`: what came out, where it is, how long it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron_nemo.evaluation.report import ORDER, read_evaluation
from minitron_nemo.manifest import Manifest
from minitron_nemo.progress import clock

# What a run directory, or that of a stage, may have for its owner, by label.
PLACES = {"report": "report.html", "figures": "evaluation.json", "student": "distilled", "exports": "export/*"}
TRAININGS = {"correct": "corrected", "distill": "distilled"}  # step -> model, as the directories of checkpoints begin


def print_summary(run_dir: Path, stages: Mapping[str | None, Path], console: Console | None = None) -> None:
    """Print it for a run, whose stages have `stages` as directories; one without stages is its only one, None."""
    console = console or Console(highlight=False)
    steps = Manifest(run_dir).steps
    for stage, directory in stages.items():
        prefix = "" if stage is None else f"{stage}/"
        evaluation = read_evaluation(directory / "evaluation.json")
        console.print(_models(evaluation, stage))
        console.print(_grid(_places(directory, steps, prefix)))
        console.print()
    if None not in stages:
        console.print(_grid([("all stages", run_dir / PLACES["report"])]))
        console.print()
    console.print(_times(steps))


def _models(evaluation: Mapping[str, Mapping[str, Any]], stage: str | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=None if stage is None else Text(stage), title_justify="left")
    table.add_column("")
    for heading in ("parameters", "loss", "KL to teacher", "top-1"):
        table.add_column(heading, justify="right")
    for name in sorted(evaluation, key=ORDER.index):
        record = evaluation[name]
        error = "" if record["loss_se"] is None else f" ± {record['loss_se']:.4f}"
        table.add_row(
            name,
            f"{record['parameters']:,}",
            f"{record['loss']:.4f}{error}",
            f"{record['kl_to_teacher']:.4f}",
            f"{record['top1_agreement']:.1%}",
            style="bold" if name == "distilled" else None,
        )
    return table


def _grid(places: Sequence[tuple[str, Path]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, path in places:
        grid.add_row(Text(label, style="dim"), Text(str(path), overflow="fold"))
    return grid


def _places(directory: Path, steps: Mapping[str, Mapping[str, Any]], prefix: str) -> Sequence[tuple[str, Path]]:
    """What is there of `PLACES`, and of directories with checkpoints of the trainings that the models came from."""
    found = [(label, path) for label, pattern in PLACES.items() for path in sorted(directory.glob(pattern))]
    for step, model in TRAININGS.items():
        record = steps.get(f"{prefix}{step}")
        if record is not None:
            path = directory / "training" / f"{model}-{record['key'][:8]}"
            found += [("checkpoints", path)] if path.is_dir() else []
    return found


def _times(steps: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    total = sum(step["seconds"] for step in steps.values())
    table.add_column("step", footer="all steps")
    table.add_column("time", justify="right", footer=_time(total))
    table.add_column("share", justify="right")
    for name, step in steps.items():
        table.add_row(name, _time(step["seconds"]), f"{step['seconds'] / total:.0%}" if total else "")
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)
