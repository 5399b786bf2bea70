"""The shapes that a search tried, on the planes of size, loss and speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minitron_nemo.report.charts import COUNT_AXIS, Chart, Row, colours, draw, error_bars, interval, with_error
from minitron_nemo.report.read import Candidate

FRONT, BEHIND = "on the Pareto front", "not on it"


def charts(candidates: Sequence[Candidate]) -> list[Chart]:
    """Loss over parameters, and over latency where it was measured; candidates of the Pareto front are joined."""
    drawn = [
        _plane(
            "Candidates: size and loss", candidates, lambda candidate: float(candidate.parameters), "parameters", True
        )
    ]
    timed = [candidate for candidate in candidates if candidate.latency_seconds is not None]
    if timed:
        drawn.append(
            _plane("Candidates: speed and loss", timed, lambda each: each.latency_seconds or 0.0, "latency, s", False)
        )
    return drawn


def _plane(
    title: str, candidates: Sequence[Candidate], position: Callable[[Candidate], float], x: str, counts: bool
) -> Chart:
    rows: list[Row] = [
        {
            "x": position(candidate),
            "y": candidate.loss,
            **interval(candidate.loss, candidate.loss_se),
            "series": FRONT if candidate.pareto else BEHIND,
            "says": _says(candidate),
        }
        for candidate in candidates
    ]
    encoding = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "title": x,
            "scale": {"zero": False},
            "axis": COUNT_AXIS if counts else {},
        },
        "y": {"field": "y", "type": "quantitative", "title": "nats per token", "scale": {"zero": False}},
        "color": colours((FRONT, BEHIND)),
    }
    front = {"data": {"values": [row for row in rows if row["series"] == FRONT]}, "mark": "line", "encoding": encoding}
    points = {
        "data": {"values": rows},
        "mark": {"type": "point", "size": 45},
        "encoding": {**encoding, "description": {"field": "says"}},
    }
    caption = "Held-out loss after the brief distillation, ± one standard error over documents where it is known."
    return draw(title, caption, [front, *error_bars(rows, encoding), points])


def _says(candidate: Candidate) -> str:
    parts = [f"{candidate.parameters:,} parameters", f"loss {with_error(candidate.loss, candidate.loss_se)}"]
    if candidate.latency_seconds is not None:
        parts.append(f"{candidate.latency_seconds:.4g} s")
    return f"{candidate.name}: {', '.join(parts)}, {FRONT if candidate.pareto else BEHIND}"
