"""Pictures of the comparisons, by the report's charts, as files of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.claims.arms import PAPERS, Arm
from benchmarks.claims.tables import AGREES, CONTRADICTS, Row
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.report.charts import Chart, Series, colours, curves, draw, error_bars, interval

# The report's page has these in its style sheet; a picture in a page of documentation has nobody to ask.
STYLE = """<style>
svg { font: 11px system-ui, sans-serif; --text: #1b2430; --muted: #5a6675; --grid: #e6eaef; --axis: #aeb7c2;
  --series-1: #1f6fb2; --series-2: #d1690e; --series-3: #2b8a5f; --series-4: #8a4fae; }
@media (prefers-color-scheme: dark) { svg { --text: #e4e9ee; --muted: #9daab8; --grid: #27303a; --axis: #566271;
  --series-1: #5cadee; --series-2: #f39a4a; --series-3: #5fca97; --series-4: #c793e6; } }
</style>"""
OPEN = "open"  # not resolved, or the papers do not say


def save(chart: Chart, path: Path) -> None:
    head, rest = chart.svg.split(">", 1)
    write_atomic(path, f"{head}>{STYLE}{rest}\n")


def forest(title: str, found: Sequence[Row]) -> Chart:
    """Every difference with two standard errors on either side: left of 0 what is named first has the lower loss."""
    points = []
    for row in found:
        own, other, difference = row.comparison.own, row.comparison.other, row.difference
        verdict = row.verdict if row.verdict in (AGREES, CONTRADICTS) else OPEN
        points.append(
            {
                "x": difference.mean,
                "y": f"{row.number}{row.letter} {_named(own, other)}",
                "series": verdict,
                "says": f"{own.shape}: {own.shown} minus {other.shape}: {other.shown}: {difference}, {row.verdict}",
                **interval(difference.mean, 2 * difference.error),
            }
        )
    scale = {"type": "symlog", "constant": 0.02}  # differences of 0.01 and of 2 nats in one picture
    ticks = {"values": [-3, -0.3, -0.03, 0, 0.03, 0.3, 3], "format": "~g"}
    x = {"field": "x", "type": "quantitative", "title": "difference, nats per token", "scale": scale, "axis": ticks}
    shared = {
        "x": x,
        "y": {"field": "y", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 200}},
        "color": colours((AGREES, CONTRADICTS, OPEN)),
    }
    marks = {
        "data": {"values": points},
        "mark": {"type": "point", "size": 35},
        "encoding": {**shared, "description": {"field": "says"}},
    }
    zero = {"data": {"values": [{"x": 0}]}, "mark": "rule", "encoding": {"x": x}}
    return draw(title, "", [zero, *error_bars(points, shared, "x"), marks], height=60 + 17 * len(points))


def _named(own: Arm, other: Arm) -> str:
    """What the two differ in."""
    if own.shape != other.shape:
        return f"{own.shape} − {other.shape}"
    names = (arm.training if arm.cut == PAPERS and arm.training else arm.name for arm in (own, other))
    return " − ".join(name.replace("KD + hidden, ", "").replace("random init", "init") for name in names)


def learning(scratch: Mapping[str, Sequence[tuple[float, float]]], levels: Mapping[str, float]) -> Chart:
    """Held-out loss over tokens of trainings from random weights, and the losses to be reached."""
    series = [Series(label, list(points)) for label, points in scratch.items()]
    return curves("Training from random weights", "", series, y="nats per token", levels=levels)
