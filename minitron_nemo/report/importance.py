"""Which channels, neurons, experts and heads matter, and which of them the Plan keeps.

Heat maps show the logarithm of a score relative to the mean of its row, from an eighth of it to eight times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.arch import Axis, Plan
from minitron_nemo.importance.scores import Array, Scores
from minitron_nemo.pruning.plan import aggregations, entry_scores
from minitron_nemo.report.charts import DROPPED, KEPT, MAX_POINTS, Chart, Row, colours, draw, every

BINS = 32  # columns of a heat map at most, of entries that rank next to each other
FLOOR = 1e-3  # of the mean: what is less is drawn there, on logarithmic axes
SCALE = ("≤ mean / 8", "≥ 8 × mean")
CROSS = "M-1,-1L1,1M1,-1L-1,1"
_DESCRIPTION = {"field": "says"}

Flags = NDArray[np.bool_]


def width_charts(scores: Scores, plan: Plan) -> list[Chart]:
    """Hidden channels, FFN neurons or experts, and heads: by layer and by rank, with the cuts."""
    if scores.architecture.num_moe_experts:
        mlps = [_small_map("Experts by layer", "expert", Axis.EXPERTS, scores.experts, plan.kept_experts, plan)]
    else:
        mlps = [_ffn_ranking(scores, plan), _ffn_map(scores, plan)]
    heads = entry_scores(scores, Axis.HEADS, plan.provenance)
    return [
        _hidden_ranking(scores, plan),
        _hidden_map(scores, plan),
        *mlps,
        _small_map("Attention heads by layer", "head", Axis.HEADS, heads, plan.kept_heads, plan),
    ]


def _hidden_ranking(scores: Scores, plan: Plan) -> Chart:
    values = entry_scores(scores, Axis.HIDDEN, plan.provenance)
    kept = _flags(plan.kept_hidden, len(values))
    order = np.argsort(-values, kind="stable")
    mean = values.mean()
    rows = []
    for rank in np.unique(np.linspace(0, len(order) - 1, MAX_POINTS).astype(int)).tolist():
        entry = int(order[rank])
        state = _word(kept[entry])
        says = f"channel {entry}, rank {rank + 1}, {state}: {values[entry] / mean:.4g} of the mean"
        rows.append({"x": rank + 1, "y": _floored(values[entry] / mean), "series": state, "says": says})
    encoding = {
        "x": _ranks("hidden channels, by rank"),
        "y": _relative(),
        "color": colours((KEPT, DROPPED)),
        "description": _DESCRIPTION,
    }
    points = {"data": {"values": rows}, "mark": {"type": "point", "size": 14}, "encoding": encoding}
    cut = _cut_line(plan.target.hidden_size, len(values))
    caption = _caption(plan, Axis.HIDDEN, float(values[kept].sum() / values.sum()))
    return draw("Hidden channels by rank", caption, [points, *cut])


def _hidden_map(scores: Scores, plan: Plan) -> Chart:
    """Channels in the order of the ranking over the whole model; rows are the two norms of a layer together."""
    chosen = plan.provenance
    by_norm = scores.hidden_by_norm(*aggregations(Axis.HIDDEN, chosen))
    by_layer = by_norm.reshape(-1, 2, by_norm.shape[1]).sum(axis=1)
    order = np.argsort(-entry_scores(scores, Axis.HIDDEN, chosen), kind="stable")
    kept = np.tile(_flags(plan.kept_hidden, by_layer.shape[1]), (len(by_layer), 1))
    caption = "Activations after a layer's norms; channels in the order of their rank in the whole model."
    return _ranked_map("Hidden channels by layer", caption, by_layer, np.tile(order, (len(by_layer), 1)), kept, plan)


def _ffn_ranking(scores: Scores, plan: Plan) -> Chart:
    values = entry_scores(scores, Axis.FFN, plan.provenance)
    size, width = plan.target.ffn_hidden_size, values.shape[1]
    ranks = np.unique(np.linspace(0, width - 1, 48).astype(int))
    lines, ends = [], []
    for layer in plan.kept_layers:
        ranked = np.sort(values[layer])[::-1] / _mean(values[layer])
        lines += [{"x": int(rank) + 1, "y": _floored(ranked[rank]), "layer": layer} for rank in ranks]
        if size < width:
            says = f"layer {layer}, rank {size} of {width}, the last kept: {ranked[size - 1]:.4g} of the mean"
            ends.append({"x": size, "y": _floored(ranked[size - 1]), "says": says})
    encoding = {"x": _ranks("FFN neurons of a layer, by rank"), "y": _relative()}
    curve = {
        "data": {"values": lines},
        "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.6, "color": "var(--kept)"},
        "encoding": {**encoding, "detail": {"field": "layer"}},
    }
    points = {
        "data": {"values": ends},
        "mark": {"type": "point", "size": 22, "color": "var(--dropped)"},
        "encoding": {**encoding, "description": _DESCRIPTION},
    }
    share = _kept_share(values, plan.kept_ffn, plan)
    caption = "One line a layer. " + _caption(plan, Axis.FFN, share)
    return draw("FFN neurons by rank", caption, [curve, points, *_cut_line(size, width)])


def _ffn_map(scores: Scores, plan: Plan) -> Chart:
    values = entry_scores(scores, Axis.FFN, plan.provenance)
    order = np.argsort(-values, axis=1, kind="stable")
    kept = _by_layer(plan.kept_ffn, values, plan)
    caption = "Neurons of every layer in the order of their rank there."
    return _ranked_map("FFN neurons by layer", caption, values, order, kept, plan)


def _small_map(
    title: str, noun: str, axis: Axis, values: Array, entries: Sequence[Sequence[int]] | None, plan: Plan
) -> Chart:
    """A heat map of `values` [num_layers, n] with a cell for each entry; those that are not among `entries` go."""
    kept = _by_layer(entries, values, plan)
    cells = [
        _cell(
            layer, place, place + 1, values[layer, place] / _mean(values[layer]), kept[layer, place], f"{noun} {place}"
        )
        for layer in range(values.shape[0])
        for place in range(values.shape[1])
    ]
    x = {**every(values.shape[1]), "field": "x", "title": noun}
    cross = {
        "data": {"values": [cell for cell in cells if cell["series"] == DROPPED]},
        "mark": {"type": "point", "shape": CROSS, "size": 24, "filled": False, "color": "var(--text)", "aria": False},
        "encoding": {"x": x, "y": _row_axis(len(values))},
    }
    caption = _caption(plan, axis, _kept_share(values, entries, plan)) + " × marks what goes."
    return _map(title, caption, cells, {"x": x}, len(values), [cross])


def _ranked_map(title: str, caption: str, values: Array, order: Any, kept: Flags, plan: Plan) -> Chart:
    """A heat map of rows whose entries are put in `order` [rows, n] and, where there are many, averaged in bins."""
    width = values.shape[1]
    edges = np.unique(np.linspace(0, width, min(BINS, width) + 1).astype(int)).tolist()
    cells = []
    for row in range(len(values)):
        ranked, flags = values[row, order[row]] / _mean(values[row]), kept[row, order[row]]
        for start, end in zip(edges, edges[1:], strict=False):
            span = f"rank {end}" if end == start + 1 else f"ranks {start + 1} to {end}"
            cells.append(_cell(row, start, end, ranked[start:end].mean(), flags[start:end].mean() >= 0.5, span))
    x = {
        **_ranks("rank"),
        "scale": {"domain": [0, width], "nice": False},
        "axis": {"grid": False, "format": "d", "tickMinStep": 1},
    }
    return _map(title, caption, cells, {"x": x, "x2": {"field": "x2"}}, len(values))


def _map(title: str, caption: str, cells: Sequence[Row], across: Row, rows: int, above: Sequence[Any] = ()) -> Chart:
    encoding = {
        **across,
        "y": _row_axis(rows),
        "color": colours((KEPT, DROPPED)),
        "fillOpacity": {"field": "opacity", "type": "quantitative", "scale": None},
        "description": _DESCRIPTION,
    }
    rectangles = {"data": {"values": list(cells)}, "mark": "rect", "encoding": encoding}
    return draw(title, caption, [rectangles, *above], height=min(420, max(150, 70 + 9 * rows)), scale=SCALE)


def _cell(row: int, start: int, end: int, relative: float, kept: bool, name: str) -> Row:
    octaves = np.log2(max(relative, FLOOR))
    opacity = round(float(np.interp(octaves, [-3, 3], [0.05, 1.0])), 2)
    says = f"layer {row}, {name}, {_word(kept)}: {relative:.4g} of the mean"
    return {"row": row, "x": start, "x2": end, "opacity": opacity, "series": _word(kept), "says": says}


def _caption(plan: Plan, axis: Axis, share: float) -> str:
    """What stays, what it holds of the summed score, and how clear the decision was."""
    size, before = plan.target.size(axis), plan.source.size(axis)
    if size == before:
        return f"All {before} stay."
    words = f"{size} of {before} stay and hold {share:.1%} of the score."
    decided = (axis.value, Axis.GROUPS.value) if axis == Axis.HEADS else (axis.value,)
    gaps = [gap for key, gap in plan.gaps.items() if key.partition("/")[0] in decided]
    return f"{words} The closest decision was by {min(gaps):.2%}." if gaps else words


def _kept_share(values: Array, kept: Sequence[Sequence[int]] | None, plan: Plan) -> float:
    """Share of the summed score of the layers that stay."""
    if kept is None:
        return 1.0
    total = sum(values[layer].sum() for layer in plan.kept_layers)
    held = sum(values[layer, list(entries)].sum() for layer, entries in zip(plan.kept_layers, kept, strict=True))
    return float(held / total)


def _by_layer(kept: Sequence[Sequence[int]] | None, values: Array, plan: Plan) -> Flags:
    """Whether each entry of each layer of the source stays, [num_layers, n]."""
    flags = np.zeros(values.shape, dtype=bool)
    for position, layer in enumerate(plan.kept_layers):
        flags[layer] = _flags(None if kept is None else kept[position], values.shape[1])
    return flags


def _flags(kept: Sequence[int] | None, size: int) -> Flags:
    flags = np.full(size, kept is None)
    if kept is not None:
        flags[list(kept)] = True
    return flags


def _mean(values: Array) -> float:
    """What scores are relative to; 1 for a row of zeros, which stays one."""
    return float(values.mean()) or 1.0


def _floored(relative: float) -> float:
    return float(max(relative, FLOOR))


def _word(kept: Any) -> str:
    return KEPT if kept else DROPPED


def _row_axis(rows: int) -> Row:
    """Rows are half as high as a label, unless there are few."""
    return {**every(rows, max(4, min(16, rows // 2))), "field": "row", "title": "layer"}


def _up(title: str) -> Row:
    return {"field": "y", "type": "quantitative", "title": title}


def _relative() -> Row:
    return {**_up("score / mean"), "scale": {"type": "log"}, "axis": {"tickCount": 4, "format": "~g"}}


def _ranks(title: str) -> Row:
    return {"field": "x", "type": "quantitative", "title": title, "axis": {"format": "d", "tickMinStep": 1}}


def _cut_line(size: int, width: int) -> list[Any]:
    """A line behind the last entry that stays; none where all do."""
    if size == width:
        return []
    row = {"x": size + 0.5}
    encoding = {"x": {"field": "x", "type": "quantitative"}}
    return [{"data": {"values": [row]}, "mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": encoding}]
