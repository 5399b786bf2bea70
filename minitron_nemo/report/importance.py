"""Which channels, neurons, experts and heads matter, and which of them the Plan keeps.

Heat maps show the logarithm of a score relative to the mean of its row, from an eighth of it to eight times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.arch import Axis, Plan
from minitron_nemo.importance.scores import Array, Scores
from minitron_nemo.pruning.plan import aggregations, entry_scores
from minitron_nemo.report.charts import DROPPED, KEPT, MAX_POINTS, NAMED, TEACHERS, Chart, Row, colours, draw, every
from minitron_nemo.report.results import rotation

BINS = 32  # columns of a heat map at most, of entries that rank next to each other
FLOOR = 1e-3  # of the mean: what is less is drawn there, on logarithmic axes
SCALE = ("≤ mean / 8", "≥ 8 × mean")
CROSS = "M-1,-1L1,1M1,-1L-1,1"
_DESCRIPTION = {"field": "says"}

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Neurons:
    """Those of the MLPs, of the experts, or of the shared experts: scores and whether they stay, [layers, experts, n].

    What is one MLP a layer counts as one expert.
    """

    title: str
    axis: Axis
    values: Array
    kept: Flags

    def ranked(self) -> tuple[Array, Flags]:
        """By layer and rank within the expert [layers, n]: score over the expert's mean, and whether most stay.

        Means over the experts that stay, of a layer that goes over all.
        """
        order = np.argsort(-self.values, axis=-1, kind="stable")
        means = self.values.mean(axis=-1, keepdims=True)
        relative = np.take_along_axis(self.values / np.where(means == 0, 1, means), order, axis=-1)
        stays = self.kept.any(axis=-1)
        weights = (stays | ~stays.any(axis=-1, keepdims=True)).astype(float)
        weights /= weights.sum(axis=-1, keepdims=True)
        flags = np.take_along_axis(self.kept, order, axis=-1)
        scores, kept = (np.einsum("len,le->ln", each, weights) for each in (relative, flags.astype(float)))
        return scores, kept >= 0.5

    def kept_share(self) -> float:
        """Of the summed score of the experts that stay, what the neurons that stay hold."""
        stays = self.kept.any(axis=-1, keepdims=True)
        return float(self.values[self.kept].sum() / (self.values * stays).sum())


def width_charts(scores: Scores, plan: Plan) -> list[Chart]:
    """Hidden channels, FFN neurons, experts, and heads: by layer and by rank, with the cuts."""
    experts = []
    if scores.architecture.has(Axis.EXPERTS):
        experts = [_small_map("Experts by layer", "expert", Axis.EXPERTS, scores.experts, plan.kept_experts, plan)]
    heads = entry_scores(scores, Axis.HEADS, plan.provenance)
    return [
        _hidden_ranking(scores, plan),
        _hidden_map(scores, plan),
        *experts,
        *(chart for each in _neurons(scores, plan) for chart in (_ffn_ranking(each, plan), _ffn_map(each))),
        _small_map("Attention heads by layer", "head", Axis.HEADS, heads, plan.kept_heads, plan),
    ]


def _neurons(scores: Scores, plan: Plan) -> list[Neurons]:
    """All kinds that the model has."""

    def of_layers(title: str, axis: Axis, entries: Sequence[Sequence[int]] | None) -> Neurons:
        values = entry_scores(scores, axis, plan.provenance)
        return Neurons(title, axis, values[:, None], _by_layer(entries, values, plan)[:, None])

    if not scores.architecture.has(Axis.EXPERTS):
        return [of_layers("FFN neurons", Axis.FFN, plan.kept_ffn)]
    values = entry_scores(scores, Axis.MOE_FFN, plan.provenance)
    kept = np.zeros(values.shape, dtype=bool)
    for position, layer in enumerate(plan.kept_layers):
        experts = range(values.shape[1]) if plan.kept_experts is None else plan.kept_experts[position]
        for place, expert in enumerate(experts):
            entries = None if plan.kept_moe_ffn is None else plan.kept_moe_ffn[position][place]
            kept[layer, expert] = _flags(entries, values.shape[2])
    found = [Neurons("Neurons of experts", Axis.MOE_FFN, values, kept)]
    if scores.architecture.has(Axis.SHARED_FFN):
        found.append(of_layers("Neurons of the shared expert", Axis.SHARED_FFN, plan.kept_shared_ffn))
    return found


def _hidden_ranking(scores: Scores, plan: Plan) -> Chart:
    values = entry_scores(scores, Axis.HIDDEN, plan.provenance)
    kept = _flags(plan.kept_hidden, len(values))
    order = np.argsort(-values, kind="stable")
    mean = values.mean()
    rows = []
    for rank in np.unique(np.linspace(0, len(order) - 1, MAX_POINTS).astype(int)).tolist():
        entry = int(order[rank])
        state = _word(kept[entry], plan.rotated)
        says = f"channel {entry}, rank {rank + 1}{_apart(state)}: {values[entry] / mean:.4g} of the mean"
        rows.append({"x": rank + 1, "y": _floored(values[entry] / mean), "series": state, "says": says})
    encoding = {
        "x": _ranks("hidden channels, by rank"),
        "y": _relative(),
        "color": colours(_words(plan.rotated)),
        "description": _DESCRIPTION,
    }
    points = {"data": {"values": rows}, "mark": {"type": "point", "size": 14}, "encoding": encoding}
    if plan.rotated:
        return draw("Hidden channels by rank", rotation(plan), [points])
    cut = _cut_line(plan.target.hidden_size, len(values))
    caption = _caption(plan, Axis.HIDDEN, float(values[kept].sum() / values.sum()))
    return draw("Hidden channels by rank", caption, [points, *cut])


def _hidden_map(scores: Scores, plan: Plan) -> Chart:
    """Channels in the order of the ranking over the whole model; rows are the two norms of a layer together."""
    chosen = plan.provenance
    by_norm = scores.hidden_by_norm(*aggregations(Axis.HIDDEN, chosen))
    by_layer = by_norm.reshape(-1, 2, by_norm.shape[1]).sum(axis=1)
    order = np.argsort(-entry_scores(scores, Axis.HIDDEN, chosen), kind="stable")
    means = by_layer.mean(axis=1, keepdims=True)
    relative = by_layer[:, order] / np.where(means == 0, 1, means)
    kept = np.tile(_flags(plan.kept_hidden, len(order))[order], (len(by_layer), 1))
    caption = "Activations after a layer's norms; channels in the order of their rank in the whole model."
    return _ranked_map("Hidden channels by layer", caption, relative, kept, plan.rotated)


def _ffn_ranking(neurons: Neurons, plan: Plan) -> Chart:
    (ranked, _), size, width = neurons.ranked(), plan.target.size(neurons.axis), neurons.values.shape[-1]
    ranks = np.unique(np.linspace(0, width - 1, 48).astype(int))
    lines, ends = [], []
    for layer in plan.kept_layers:
        lines += [{"x": int(rank) + 1, "y": _floored(ranked[layer, rank]), "layer": layer} for rank in ranks]
        if size < width:
            says = f"layer {layer}, rank {size} of {width}, the last kept: {ranked[layer, size - 1]:.4g} of the mean"
            ends.append({"x": size, "y": _floored(ranked[layer, size - 1]), "says": says})
    encoding = {"x": _ranks(f"{neurons.title}, by rank"), "y": _relative()}
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
    of = ", the mean of its experts that stay" if neurons.values.shape[1] > 1 else ""
    caption = f"One line a layer{of}. " + _caption(plan, neurons.axis, neurons.kept_share())
    return draw(f"{neurons.title} by rank", caption, [curve, points, *_cut_line(size, width)])


def _ffn_map(neurons: Neurons) -> Chart:
    within = "expert, the mean of those that stay" if neurons.values.shape[1] > 1 else "layer"
    caption = f"In the order of their rank within the {within}."
    return _ranked_map(f"{neurons.title} by layer", caption, *neurons.ranked())


def _small_map(
    title: str, noun: str, axis: Axis, values: Array, entries: Sequence[Sequence[int]] | None, plan: Plan
) -> Chart:
    """A heat map of `values` [num_layers, n] with a cell for each entry; those that are not among `entries` go."""
    kept = _by_layer(entries, values, plan)
    cells = [
        _cell(layer, place, place + 1, value / (row.mean() or 1.0), _word(kept[layer, place]), f"{noun} {place}")
        for layer, row in enumerate(values)
        for place, value in enumerate(row)
    ]
    x = {**every(values.shape[1]), "field": "x", "title": noun}
    cross = {
        "data": {"values": [cell for cell in cells if cell["series"] == DROPPED]},
        "mark": {"type": "point", "shape": CROSS, "size": 24, "filled": False, "color": "var(--text)", "aria": False},
        "encoding": {"x": x, "y": _row_axis(len(values))},
    }
    caption = _caption(plan, axis, _kept_share(values, entries, plan)) + " × marks what goes."
    return _map(title, caption, cells, {"x": x}, len(values), [cross])


def _ranked_map(title: str, caption: str, relative: Array, kept: Flags, rotated: bool = False) -> Chart:
    """A heat map of scores over their row's mean [rows, n], in order of rank and, where many, averaged in bins."""
    width = relative.shape[1]
    edges = np.unique(np.linspace(0, width, min(BINS, width) + 1).astype(int)).tolist()
    cells = []
    for row, (ranked, flags) in enumerate(zip(relative, kept, strict=True)):
        for start, end in zip(edges, edges[1:], strict=False):
            span = f"rank {end}" if end == start + 1 else f"ranks {start + 1} to {end}"
            state = _word(flags[start:end].mean() >= 0.5, rotated)
            cells.append(_cell(row, start, end, ranked[start:end].mean(), state, span))
    x = {
        **_ranks("rank"),
        "scale": {"domain": [0, width], "nice": False},
        "axis": {"grid": False, "format": "d", "tickMinStep": 1},
    }
    return _map(title, caption, cells, {"x": x, "x2": {"field": "x2"}}, len(relative), rotated=rotated)


def _map(
    title: str,
    caption: str,
    cells: Sequence[Row],
    across: Row,
    rows: int,
    above: Sequence[Any] = (),
    rotated: bool = False,
) -> Chart:
    encoding = {
        **across,
        "y": _row_axis(rows),
        "color": colours(_words(rotated)),
        "fillOpacity": {"field": "opacity", "type": "quantitative", "scale": None},
        "description": _DESCRIPTION,
    }
    rectangles = {"data": {"values": list(cells)}, "mark": "rect", "encoding": encoding}
    height, shade = min(420, max(150, 70 + 9 * rows)), NAMED[_words(rotated)[0]]
    return draw(title, caption, [rectangles, *above], height=height, scale=SCALE, shade=shade)


def _cell(row: int, start: int, end: int, relative: float, state: str, name: str) -> Row:
    octaves = np.log2(max(relative, FLOOR))
    opacity = round(float(np.interp(octaves, [-3, 3], [0.05, 1.0])), 2)
    says = f"layer {row}, {name}{_apart(state)}: {relative:.4g} of the mean"
    return {"row": row, "x": start, "x2": end, "opacity": opacity, "series": state, "says": says}


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


def _floored(relative: float) -> float:
    return float(max(relative, FLOOR))


def _word(kept: Any, rotated: bool = False) -> str:
    """What becomes of an entry; of combinations of all entries there is nothing to say."""
    return TEACHERS if rotated else KEPT if kept else DROPPED


def _words(rotated: bool) -> tuple[str, ...]:
    return (TEACHERS,) if rotated else (KEPT, DROPPED)


def _apart(state: str) -> str:
    return "" if state == TEACHERS else f", {state}"


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
