"""How the models behave beyond their loss: tasks, divergence from the teacher along a document, generation."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, sqrt
from typing import Any

from minitron_nemo.report.charts import Chart, Row, colours, draw, error_bars, interval, with_error
from minitron_nemo.report.results import Evaluation, Figure, Table, in_bytes, models

TEACHER = "teacher"  # whose divergence from itself is nothing to look at
MOST_TASKS = 12  # rows of the chart; the table has all


def tasks(measured: Evaluation) -> Table | None:
    """Every metric of every task as a row, models as columns; None where no task was run. `measured`: of tasks.json."""
    names = [name for name in models(measured) if measured[name]["tasks"]]
    asked = dict.fromkeys(key for name in names for key in _metrics(measured[name]))
    rows = []
    for task, metric in asked:
        cells = [_figure(_metrics(measured[name]).get((task, metric))) for name in names]
        rows.append((f"{task}, {metric}", cells))
    return Table(names, rows) if rows else None


def task_charts(measured: Evaluation) -> list[Chart]:
    """The first metric of each task, of those that are shares: one row a task, one point a model."""
    names = [name for name in models(measured) if measured[name]["tasks"]]
    first: dict[str, str] = {}
    for name in names:
        for (task, metric), figure in _metrics(measured[name]).items():
            if 0 <= figure["value"] <= 1:
                first.setdefault(task, metric)
    shown = list(first.items())[:MOST_TASKS]
    rows = [
        {
            "y": task,
            "x": found["value"],
            **interval(found["value"], found["se"]),
            "series": name,
            "says": f"{name}, {task}, {metric}: {with_error(found['value'], found['se'])}",
        }
        for name in names
        for task, metric in shown
        if (found := _metrics(measured[name]).get((task, metric))) is not None and isfinite(found["value"])
    ]
    if not rows:
        return []
    encoding = {
        "x": {"field": "x", "type": "quantitative", "title": "share", "scale": {"zero": False}},
        "y": {"field": "y", "type": "nominal", "title": None, "sort": [task for task, _ in shown]},
        "yOffset": {"field": "series", "sort": names},
        "color": colours(names),
    }
    points = {
        "data": {"values": rows},
        "mark": {"type": "point", "size": 45},
        "encoding": {**encoding, "description": {"field": "says"}},
    }
    height = 60 + (14 * len(names) + 10) * len(shown)
    caption = "The first metric of each task, ± one standard error."
    return [draw("Tasks", caption, [*error_bars(rows, encoding, "x"), points], height=height)]


def position_charts(evaluation: Evaluation) -> list[Chart]:
    """Divergence from the teacher by position in a document; none where that was not measured.

    The token at position p, from 0, is met with p + 1 tokens: on a logarithmic axis of these a bucket is at the middle.
    """
    names = [name for name in models(evaluation) if name != TEACHER and evaluation[name].get("kl_by_position")]
    rows = [
        {
            "x": sqrt((part["from"] + 1) * part["to"]),
            "y": part["kl"],
            **interval(part["kl"], part["se"]),
            "series": name,
            "says": f"{name}, {_context(part)}: {with_error(part['kl'], part['se'])}",
        }
        for name in names
        for part in evaluation[name]["kl_by_position"]
        if isfinite(part["kl"])
    ]
    if not rows:
        return []
    across = {"field": "x", "type": "quantitative", "title": "tokens of the document so far"}
    encoding = {
        "x": {**across, "scale": {"type": "log", "base": 2}, "axis": {"format": ",d", "labelOverlap": True}},
        "y": {"field": "y", "type": "quantitative", "title": "nats per token"},
        "color": colours(names),
    }
    caption = (
        "KL(teacher, model) of predictions by how many tokens they are made from, the document's separator included: "
        "mean over held-out documents ± one standard error."
    )
    return [draw("Divergence by position", caption, _joined(rows, encoding))]


def _context(part: Mapping[str, Any]) -> str:
    """How many tokens the predictions at the positions of a bucket are made from."""
    first, last = part["from"] + 1, part["to"]
    return f"from {first:,} to {last:,} tokens" if first < last else f"from {first} token{'s' * (first > 1)}"


def generation(evaluation: Evaluation) -> Table | None:
    """Speed and memory of generation by batch size, models as columns; None where that was not measured."""
    names = [name for name in models(evaluation) if evaluation[name].get("generation")]
    measured = {name: {each["batch_size"]: each for each in evaluation[name]["generation"]} for name in names}
    sizes = sorted({size for of_model in measured.values() for size in of_model})
    rows: list[tuple[str, list[Figure]]] = []
    for size in sizes:
        found = [measured[name].get(size, {}) for name in names]
        speeds = [each.get("tokens_per_second") for each in found]
        rows.append((f"batch of {size}, tokens/s", [Figure("" if s is None else f"{s:,.1f}") for s in speeds]))
        peaks = [each.get("peak_memory_bytes") for each in found]
        if any(peak is not None for peak in peaks):
            cells = [Figure("" if peak is None else in_bytes(peak)) for peak in peaks]
            rows.append((f"batch of {size}, peak memory", cells))
    return Table(names, rows) if rows else None


def generation_charts(evaluation: Evaluation) -> list[Chart]:
    """Speed over batch size, where more than one was measured."""
    names = [name for name in models(evaluation) if evaluation[name].get("generation")]
    rows = [
        {
            "x": each["batch_size"],
            "y": each["tokens_per_second"],
            "series": name,
            "says": f"{name}, batch of {each['batch_size']}: {each['tokens_per_second']:,.1f} tokens/s",
        }
        for name in names
        for each in evaluation[name]["generation"]
    ]
    sizes = sorted({row["x"] for row in rows})
    if len(sizes) < 2:
        return []
    across = {"field": "x", "type": "quantitative", "title": "batch size", "scale": {"type": "log", "base": 2}}
    encoding = {
        "x": {**across, "axis": {"values": sizes, "format": "d", "labelOverlap": True}},
        "y": {"field": "y", "type": "quantitative", "title": "tokens/s"},
        "color": colours(names),
    }
    caption = "Tokens that all sequences of a batch together get in a second."
    return [draw("Speed of generation", caption, _joined(rows, encoding))]


def _joined(rows: list[Row], encoding: Mapping[str, Any]) -> list[Row]:
    """Layers of lines through points that say what they are, with their standard errors."""
    points = {"type": "point", "size": 30}
    described = {**encoding, "description": {"field": "says"}}
    return [
        {"data": {"values": rows}, "mark": "line", "encoding": encoding},
        *error_bars(rows, encoding),
        {"data": {"values": rows}, "mark": points, "encoding": described},
    ]


def _metrics(record: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """By task and metric."""
    return {(task, metric): found for task, of in record["tasks"].items() for metric, found in of["metrics"].items()}


def _figure(found: Mapping[str, Any] | None) -> Figure:
    if found is None:
        return Figure("")
    return Figure(f"{found['value']:.4g}", "" if found["se"] is None else f"± {found['se']:.2g}")
