"""Which layers go: by Block Influence, by what `score-depth` measured, and both beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import correlation

import numpy as np

from minitron_nemo.arch import Axis, Plan
from minitron_nemo.importance.scores import Scores
from minitron_nemo.models.branches import Branch
from minitron_nemo.pruning.depth_scores import Cost, DepthScores
from minitron_nemo.report.charts import (
    DROPPED,
    KEPT,
    Chart,
    Row,
    colours,
    draw,
    error_bars,
    every,
    interval,
    with_error,
)

_DESCRIPTION = {"field": "says"}


@dataclass(frozen=True)
class Measured:
    """What `score-depth` found, as the charts show it: a loss, or on a task an accuracy."""

    scores: DepthScores
    normalize: bool  # prune.depth.normalize of the recipe

    @property
    def on_text(self) -> bool:
        return self.scores.choices is None

    @property
    def quantity(self) -> str:
        return "loss" if self.on_text else "accuracy"

    @property
    def errors(self) -> str:
        return ", ± one standard error of what it loses by that" if self.on_text else ""

    def cost(self, branch: Branch) -> Cost:
        return self.scores.cost(branch, self.normalize)

    def value(self, branch: Branch) -> tuple[float, float | None]:
        """Of the model without these layers; with a loss, the standard error of its difference from the whole one's."""
        if not self.on_text:
            return -self.cost(branch)[0], None
        known = branch and Branch() in self.scores.sums
        return self.scores.loss(branch), self.scores.increase(branch)[1] if known else None

    def height(self, branch: Branch) -> Row:
        value, error = self.value(branch)
        return {"y": value, **interval(value, error)}

    def says(self, branch: Branch) -> str:
        return with_error(*self.value(branch))


def charts(scores: Scores, plan: Plan, found: DepthScores | None, normalize: bool = False) -> list[Chart]:
    """Block Influence of every layer; where models without layers were measured, what they lose."""
    drawn = [_block_influence(scores, plan)]
    if found is None:
        return drawn
    measured = Measured(found, normalize)
    whole = [branch for branch in found.sums if not found.missing(branch).any()]
    single = {next(iter(branch)): branch for branch in sorted(whole, key=sorted) if len(branch) == 1}
    if single:
        drawn.append(_single(measured, single, plan))
        if measured.on_text and Branch() in whole:
            drawn.append(_influence_and_loss(scores, measured, single, plan))
    dropped = Branch(set(range(plan.source.num_layers)) - set(plan.kept_layers))
    if len(dropped) < 2:
        return drawn
    chain = _chain(measured, whole, dropped)
    if len(chain) > 2:
        drawn.append(_one_by_one(measured, chain))
    blocks = [branch for branch in whole if len(branch) == len(dropped) == max(branch) - min(branch) + 1]
    if len(blocks) > 1:
        drawn.append(_blocks(measured, sorted(blocks, key=min), dropped))
    return drawn


def _block_influence(scores: Scores, plan: Plan) -> Chart:
    influence = scores.get(Axis.LAYERS)
    rows = [
        {**_layer(layer, plan), "y": value, "says": f"layer {layer} {_of(layer, plan)}: Block Influence {value:.6g}"}
        for layer, value in enumerate(influence.tolist())
    ]
    caption = "1 - cosine between a layer's input and output, mean over tokens: how much it changes its input."
    encoding = {"x": _across(plan, "layer"), "y": _up("Block Influence"), "color": colours((KEPT, DROPPED))}
    bars = {"data": {"values": rows}, "mark": "bar", "encoding": {**encoding, "description": _DESCRIPTION}}
    return draw("Block Influence by layer", caption, [bars])


def _single(measured: Measured, single: Mapping[int, Branch], plan: Plan) -> Chart:
    rows = [
        {
            **_layer(layer, plan),
            **measured.height(branch),
            "says": f"without layer {layer} ({_of(layer, plan)}): {measured.says(branch)}",
        }
        for layer, branch in single.items()
    ]
    what = measured.quantity
    caption = f"{what.capitalize()} of the teacher without that layer alone{measured.errors}."
    return _points(f"{what.capitalize()} without one layer", caption, rows, _across(plan, "layer"), measured)


def _influence_and_loss(scores: Scores, measured: Measured, single: Mapping[int, Branch], plan: Plan) -> Chart:
    influence = scores.get(Axis.LAYERS)
    rows = []
    for layer, branch in single.items():
        lost, error = measured.scores.increase(branch)
        says = f"layer {layer} ({_of(layer, plan)}): Block Influence {influence[layer]:.6g}, {with_error(lost, error)}"
        rows.append({**_layer(layer, plan), "x": float(influence[layer]), "y": lost, "says": says})
    ranks = [np.argsort(np.argsort([row[axis] for row in rows])).tolist() for axis in ("x", "y")]
    caption = "What a layer's absence costs, against how much it changes its input: one point a layer."
    if len(rows) > 2:
        caption += f" Their ranks correlate by {correlation(*ranks):.2f}."
    across = {"field": "x", "type": "quantitative", "title": "Block Influence"}
    encoding = {"x": across, "y": _up("nats per token lost"), "color": colours((KEPT, DROPPED))}
    points = {
        "data": {"values": rows},
        "mark": {"type": "point", "size": 45},
        "encoding": {**encoding, "description": _DESCRIPTION},
    }
    return draw("Block Influence and loss", caption, [points])


def _chain(measured: Measured, whole: Sequence[Branch], dropped: Branch) -> list[Branch]:
    """Of the measured models without some of the `dropped` layers the best of each number of layers, none first."""
    inside = [branch for branch in whole if branch <= dropped]
    sizes = sorted({len(branch) for branch in inside})
    best = [min((each for each in inside if len(each) == size), key=measured.cost) for size in sizes]
    nested = all(one < other for one, other in zip(best, best[1:], strict=False))
    return best if nested and sizes == list(range(len(sizes))) else []


def _one_by_one(measured: Measured, chain: Sequence[Branch]) -> Chart:
    rows: list[Row] = []
    for before, branch in zip([Branch(), *chain], chain, strict=False):
        gone = ", ".join(map(str, sorted(branch - before))) or "no layer"
        says = f"without {len(branch)} layers, {gone} the last: {measured.says(branch)}"
        rows.append({"x": len(branch), "series": DROPPED, **measured.height(branch), "says": says})
    what = measured.quantity.capitalize()
    caption = f"{what} as one layer after another goes, each chosen when those before it are gone."
    across = {"field": "x", "type": "ordinal", "title": "layers dropped", "axis": {"labelAngle": 0}}
    return _points(f"{what} as layers go", caption, rows, across, measured, joined=True)


def _blocks(measured: Measured, blocks: Sequence[Branch], dropped: Branch) -> Chart:
    rows = [
        {
            "x": min(branch),
            "series": DROPPED if branch == dropped else KEPT,
            **measured.height(branch),
            "says": f"without layers {min(branch)} to {max(branch)}: {measured.says(branch)}",
        }
        for branch in blocks
    ]
    size, what = len(dropped), measured.quantity
    caption = f"{what.capitalize()} of the teacher without {size} neighbours{measured.errors}."
    across = {**every(max(map(min, blocks)) + 1), "field": "x", "title": "first layer of the block"}
    return _points(f"{what.capitalize()} without a block of {size} layers", caption, rows, across, measured)


def _points(
    title: str, caption: str, rows: Sequence[Row], across: Row, measured: Measured, joined: bool = False
) -> Chart:
    up = {**_up("nats per token" if measured.on_text else "accuracy"), "scale": {"zero": False}}
    labels = [label for label in (KEPT, DROPPED) if any(row["series"] == label for row in rows)]
    encoding = {"x": across, "y": up, "color": colours(labels)}
    points = {
        "data": {"values": list(rows)},
        "mark": {"type": "point", "size": 40},
        "encoding": {**encoding, "description": _DESCRIPTION},
    }
    line = [{"data": {"values": list(rows)}, "mark": "line", "encoding": encoding}] if joined else []
    return draw(title, caption, [*line, points, *error_bars(rows, encoding)])


def _of(layer: int, plan: Plan) -> str:
    return KEPT if layer in plan.kept_layers else DROPPED


def _layer(layer: int, plan: Plan) -> Row:
    return {"x": layer, "series": _of(layer, plan)}


def _across(plan: Plan, title: str) -> Row:
    return {**every(plan.source.num_layers), "field": "x", "title": title}


def _up(title: str) -> Row:
    return {"field": "y", "type": "quantitative", "title": title}
