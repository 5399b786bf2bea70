"""Charts: Vega-Lite specifications, drawn to SVG without a browser or the network.

Colours are CSS variables of the page (style.css). What a mark stands for, in words and figures, is its `<title>`:
browsers show it under the pointer and read it out.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import vl_convert

WIDTH = 340  # of every chart, legends and axes included: what a phone has; the page scales it up
MAX_POINTS = 120  # of a series
COLOURS = tuple(f"var(--series-{number})" for number in range(1, 7))
KEPT, DROPPED = "kept", "dropped"
TEACHERS = "of the teacher"  # entries that neither stay nor go, but are rotated
# What has one colour wherever it appears: models above all.
NAMED = {
    KEPT: "var(--kept)",
    DROPPED: "var(--dropped)",
    "distilled": COLOURS[0],
    "pruned": COLOURS[1],
    "teacher": COLOURS[2],
    TEACHERS: COLOURS[2],
    "source": COLOURS[3],
}

# Attributes that the page decides, or that only Vega's runtime reads.
USELESS = (
    *("aria-roledescription", "role", "aria-hidden", "class", "pointer-events", "version"),
    *("font-family", "font-size", "font-weight"),
)
SVG = "http://www.w3.org/2000/svg"
# Room for text is measured at this size; the page writes it at 11 px in the reader's font, which may be a wide one.
_TEXT = {"labelColor": "var(--muted)", "titleColor": "var(--muted)", "labelFontSize": 13, "titleFontSize": 13}
_CONFIG: dict[str, Any] = {
    "background": None,
    "view": {"stroke": None},
    "axis": {
        **_TEXT,
        "titleFontWeight": "normal",
        "gridColor": "var(--grid)",
        "domainColor": "var(--axis)",
        "tickColor": "var(--axis)",
        "tickCount": 5,
        "labelFlush": False,  # which moves the outermost labels over their neighbours
    },
    "legend": {**_TEXT, "orient": "top", "title": None, "columns": 2, "labelLimit": 150, "symbolSize": 50, "offset": 8},
    "rule": {"color": "var(--text)", "aria": False},
    "line": {"aria": False, "strokeWidth": 1.5},
    "point": {"filled": True, "opacity": 1},
}
# d3 writes 10^9 as G, which nobody says of tokens and parameters.
COUNT_AXIS = {"labelExpr": "replace(format(datum.value, '~s'), 'G', 'B')"}

Row = dict[str, Any]
Layer = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """What the page shows as one figure. `scale`: words for the palest and the fullest `shade` of a heat map."""

    title: str
    caption: str
    svg: str
    scale: tuple[str, str] | None = None
    shade: str = NAMED[KEPT]


@dataclass(frozen=True)
class Series:
    """Values over tokens, in the order of tokens; `errors` are standard errors of as many values."""

    label: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float | None] = ()


def draw(title: str, caption: str, layers: Sequence[Layer], height: int = 210, **chart: Any) -> Chart:
    """One chart of layers that share their axes."""
    specification = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": WIDTH,
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": {"left": 2, "right": 8, "top": 4, "bottom": 2},
        "config": _CONFIG,
        "layer": list(layers),
    }
    return Chart(title, caption, _tidy(vl_convert.vegalite_to_svg(specification), title), **chart)


def colours(labels: Sequence[str]) -> Layer:
    """The colour channel of `labels`; a single one needs no legend."""
    taken = {NAMED[label] for label in labels if label in NAMED}
    others = cycle([colour for colour in COLOURS if colour not in taken])
    palette = [NAMED.get(label) or next(others) for label in labels]
    legend = {"legend": None} if len(labels) == 1 else {}
    return {"field": "series", "type": "nominal", "scale": {"domain": list(labels), "range": palette}, **legend}


def curves(
    title: str,
    caption: str,
    series: Iterable[Series],
    *,
    y: str,
    levels: Mapping[str, float] | None = None,
    zero: bool = False,
) -> Chart:
    """Lines over tokens, error bars where there are standard errors, and dashed `levels` by their labels."""
    series, levels = [each for each in series if each.points], levels or {}
    thin = any(len(each.points) > MAX_POINTS for each in series)
    rows = [row for each in series for row in _rows(each)]
    colour = colours([*(each.label for each in series), *levels])
    x = {"field": "x", "type": "quantitative", "title": "tokens", "axis": COUNT_AXIS}
    up = {"field": "y", "type": "quantitative", "title": y, "scale": {"zero": zero}}
    shared = {"x": x, "y": up, "color": colour}
    many = len(rows) > 60 * len(series)
    layers: list[Layer] = [
        {"data": {"values": rows}, "mark": "line", "encoding": shared},
        {
            "data": {"values": rows},
            "mark": {"type": "point", "size": 30 if many else 14, "opacity": 0 if many else 1},
            "encoding": {**shared, "description": {"field": "says"}},
        },
        *error_bars(rows, shared),
    ]
    for label, value in levels.items():
        row = {"y": value, "series": label, "says": f"{label}: {value:.6g}"}
        mark = {"type": "rule", "strokeDash": [4, 3], "strokeWidth": 1.5, "aria": True}
        encoding = {"y": up, "color": colour, "description": {"field": "says"}}
        layers.append({"data": {"values": [row]}, "mark": mark, "encoding": encoding})
    if thin:
        caption += " Every point is the mean of several reports."
    return draw(title, caption, layers)


def every(entries: int, labels: int = 16) -> Row:
    """An axis of numbered entries, at most so many of which have a label."""
    numbers = list(range(0, entries, -(-entries // labels)))
    axis = {"values": numbers, "tickCount": entries, "ticks": False, "domain": False, "labelAngle": 0}
    return {"type": "ordinal", "scale": {"domain": list(range(entries))}, "axis": axis}


def error_bars(rows: Sequence[Row], encoding: Mapping[str, Any], axis: str = "y") -> list[Layer]:
    """Rules of one standard error up and down, for rows that have `low` and `high`."""
    known = [row for row in rows if "low" in row]
    if not known:
        return []
    ends = {axis: {**encoding[axis], "field": "low"}, f"{axis}2": {"field": "high"}}
    return [{"data": {"values": known}, "mark": {"type": "rule"}, "encoding": {**encoding, **ends}}]


def interval(value: float, error: float | None) -> Row:
    """Keys of a row for `error_bars`; none without a standard error."""
    return {} if error is None else {"low": value - error, "high": value + error}


def with_error(value: float, error: float | None) -> str:
    return f"{value:.6g}" if error is None else f"{value:.6g} ± {error:.3g}"


def _rows(series: Series) -> list[Row]:
    errors = series.errors or [None] * len(series.points)
    step = -(-len(series.points) // MAX_POINTS)
    rows = []
    for start in range(0, len(series.points), step):
        together = series.points[start : start + step]
        x, y = (sum(values) / len(together) for values in zip(*together, strict=True))
        error = errors[start] if step == 1 else None
        says = f"{series.label} after {x:,.0f} tokens: {with_error(y, error)}"
        rows.append({"x": x, "y": y, "series": series.label, "says": says, **interval(y, error)})
    return rows


def _tidy(svg: str, title: str) -> str:
    """The drawing without what only Vega's runtime needs; descriptions of marks become their titles."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.get("class") in ("background", "foreground"):
                parent.remove(child)
    for element in list(root.iter()):
        label = element.attrib.pop("aria-label", None)
        if label and element.tag != f"{{{SVG}}}g":
            ElementTree.SubElement(element, f"{{{SVG}}}title").text = label
        for name in USELESS:
            element.attrib.pop(name, None)
    for name in ("width", "height"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")
