"""The shapes that a search tried, on the planes of size, loss and speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minitron_nemo.report.charts import COUNT_AXIS, Chart, Row, colours, draw, error_bars, interval, with_error
from minitron_nemo.report.read import Candidate

FRONT, BEHIND = "on the Pareto front", "not on it"


def charts(candidates: Sequence[Candidate]) -> list[Chart]:
    """Loss over parameters, and over latency where it was measured.

    Losses after different numbers of updates do not compare: candidates that got fewer than the most are hollow. A line
    joins the others that none beats in the plane drawn; the Pareto front of the table has memory as well.
    """
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
            "steps": candidate.steps,
            "series": FRONT if candidate.pareto else BEHIND,
            "says": _says(candidate),
        }
        for candidate in candidates
    ]
    most = max(candidate.steps for candidate in candidates)
    last, before = ([row for row in rows if (row["steps"] == most) == wanted] for wanted in (True, False))
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
    front = [{**row, "series": FRONT} for row in _unbeaten(last)]
    points = [
        {
            "data": {"values": some},
            "mark": {"type": "point", "size": 45, **look},
            "encoding": {**encoding, "description": {"field": "says"}},
        }
        for some, look in ((last, {}), (before, {"filled": False, "fill": "var(--page)"}))
    ]
    line = {"data": {"values": front}, "mark": "line", "encoding": encoding}
    hollow = " Hollow: stopped after fewer, which does not compare with the others." if before else ""
    caption = (
        f"Held-out loss {_after(most)}, ± one standard error over documents where it is known.{hollow} "
        "The line joins what none beats in both."
    )
    return draw(title, caption, [line, *error_bars(rows, encoding), *points])


def _unbeaten(rows: Sequence[Row]) -> list[Row]:
    """Those with a lower loss than all that lie before them."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["x"], row["y"])):
        if not found or row["y"] < found[-1]["y"]:
            found.append(row)
    return found


def _after(steps: int) -> str:
    return f"after {steps:,} updates" if steps else "as cut, before any training"


def _says(candidate: Candidate) -> str:
    parts = [f"{candidate.parameters:,} parameters", f"loss {with_error(candidate.loss, candidate.loss_se)}"]
    parts[-1] += f" {_after(candidate.steps)}"
    if candidate.latency_seconds is not None:
        parts.append(f"{candidate.latency_seconds:.4g} s")
    return f"{candidate.name}: {', '.join(parts)}, {FRONT if candidate.pareto else BEHIND}"
