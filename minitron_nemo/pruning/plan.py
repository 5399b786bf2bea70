"""Scores + target sizes -> Plan. Arithmetic on small arrays: no weights are read here.

Depth: `block_influence` drops the layers that change their input least, `contiguous` the block that does so in sum.
Both keep the first and the last layer: removing those costs most (arXiv 2408.11796 figure 8, whose 16 dropped layers
end before the last), and Block Influence need not see it. The methods of depth.py measure it, and may drop any layer.
An explicit list drops what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.entries import Entries
from minitron_nemo.arch.family import family
from minitron_nemo.arch.tensors import residual_norms
from minitron_nemo.config import PruneConfig
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import Array, Scores
from minitron_nemo.pruning import depth
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.pruning.target import NEURONS, explicit_layers, rotates, target_architecture


def make_plan(
    scores: Scores, source: Architecture, config: PruneConfig, depth_scores: DepthScores | None = None
) -> Plan:
    """The Plan that keeps the entries with the highest scores; ties go to the lower index.

    FFN neurons are ranked per layer, experts as well, and the neurons of an expert within it; query groups per layer,
    by the sum of their heads' scores; heads per layer and group, every group keeping equally many and, with
    `repair.merge_heads`, merging dropped ones; hidden channels over the whole model, where `repair.norm_scale` gives
    the gain of every norm a factor. `gaps` has one number per decision that Scores took, named by axis and, where
    layers decide on their own, the source's layer: (worst kept - best dropped) / worst kept, the smallest of the
    groups' for heads and of the experts' for their neurons, and for `contiguous` the same of the dropped block's summed
    influence and the runner-up's. `depth_scores` are for depth methods that decide by them: see `depth.choose`.

    Where hidden channels are rotated, the Plan has no matrices yet: `minitron repair` makes them.

    Raises UserError for Scores of another architecture and for what `target_architecture` refuses.
    """
    _check_measured("scores", scores.architecture, source)
    target = target_architecture(source, config)
    gaps: dict[str, float] = {}
    if depth_scores is not None:
        _check_measured("depth scores", depth_scores.architecture, source)
    kept_layers = _kept_layers(scores, depth_scores, source, target, config, gaps)
    chosen = _provenance(scores, depth_scores, config)
    norm_scales: dict[str, float] = {}
    kept_hidden: Sequence[int] | None = None
    rotated = rotates(target, source, config)
    if target.hidden_size < source.hidden_size and not rotated:
        channels = entry_scores(scores, Axis.HIDDEN, chosen)
        kept_hidden, gaps[Axis.HIDDEN.value] = _best(channels, target.hidden_size)
        if config.repair.norm_scale is not False and family(source.family).rescales_norms:
            norm_scales = _norm_scales(scores, source, kept_layers, kept_hidden)
    kept_ffn: list[Sequence[int]] = []
    kept_shared_ffn: list[Sequence[int]] = []
    for axis, found in ((Axis.FFN, kept_ffn), (Axis.SHARED_FFN, kept_shared_ffn)):
        if target.size(axis) < source.size(axis):
            neurons = entry_scores(scores, axis, chosen)
            for layer in kept_layers:
                kept, gaps[f"{axis}/{layer}"] = _best(neurons[layer], target.size(axis))
                found.append(kept)
    heads: dict[str, Any] = {}
    if target.num_attention_heads < source.num_attention_heads:
        of_heads = entry_scores(scores, Axis.HEADS, chosen)
        heads = _heads(of_heads, kept_layers, source, target, config.repair.merge_heads, gaps)
    return Plan(
        source=source,
        target=target,
        kept_layers=kept_layers,
        kept_hidden=kept_hidden,
        rotated=rotated,
        kept_ffn=tuple(kept_ffn) or None,
        kept_shared_ffn=tuple(kept_shared_ffn) or None,
        **heads,
        **_experts(scores.experts, entry_scores(scores, Axis.MOE_FFN, chosen), kept_layers, source, target, gaps),
        norm_scales=norm_scales,
        gaps=gaps,
        provenance=chosen,
    )


def _check_measured(what: str, measured: Architecture, source: Architecture) -> None:
    if measured != source:
        theirs, given = measured.to_dict(), source.to_dict()
        key = next(key for key in given if theirs[key] != given[key])
        raise UserError(f"{what}: measured on a model with {key} {theirs[key]}, not {given[key]}; calibrate again")


def entry_scores(scores: Scores, axis: Axis, chosen: Mapping[str, Any]) -> Array:
    """What ranks the entries of an axis; `chosen` is a Plan's `provenance`. Shapes as of `Scores.get`."""
    if axis in NEURONS and chosen["ffn_score"] == "output":
        return scores.ffn_outputs(axis)
    return scores.get(axis, *aggregations(axis, chosen))


def aggregations(axis: Axis, chosen: Mapping[str, Any]) -> tuple[str, str]:
    """The pair that ranks the entries of an axis by `chosen`, a Plan's `provenance`: over tokens, over sequences."""
    own = chosen.get("aggregations", {}).get(axis.value)  # Plans have not always had them
    if own is not None:
        return own["sequence"], own["batch"]
    return chosen["sequence_aggregation"], chosen["batch_aggregation"]


def _kept_layers(
    scores: Scores,
    depth_scores: DepthScores | None,
    source: Architecture,
    target: Architecture,
    config: PruneConfig,
    gaps: dict[str, float],
) -> tuple[int, ...]:
    if config.drop_layers is not None:
        dropped = explicit_layers(source, config.drop_layers)
        return tuple(layer for layer in range(source.num_layers) if layer not in dropped)
    drop = source.num_layers - target.num_layers
    if not drop:
        return tuple(range(source.num_layers))
    if config.depth_method in depth.METHODS:
        if depth_scores is None:
            raise UserError(f"prune.depth_method: {config.depth_method} needs depth scores; run `minitron score-depth`")
        chosen, gaps[Axis.LAYERS.value] = depth.choose(depth_scores, config.depth_method, drop, config.depth.normalize)
        return tuple(layer for layer in range(source.num_layers) if layer not in chosen)
    last = source.num_layers - 1
    inner = scores.get(Axis.LAYERS)[1:last]
    if config.depth_method == "block_influence":
        kept, gap = _best(inner, len(inner) - drop)
        between = tuple(layer + 1 for layer in kept)
    else:
        start, gap = _weakest_block(inner, drop)
        between = tuple(layer + 1 for layer in range(len(inner)) if not start <= layer < start + drop)
    if len(inner) > drop:
        gaps[Axis.LAYERS.value] = gap
    return (0, *between, last)


def _norm_scales(
    scores: Scores, source: Architecture, kept_layers: tuple[int, ...], kept_hidden: Sequence[int]
) -> dict[str, float]:
    """Factors on the gains of all norms of the student, by name."""
    *of_layers, final = scores.norm_scales(kept_hidden).tolist()
    *layer_norms, final_norm = residual_norms(source)
    named = {final_norm: final}
    for layer, number in enumerate(kept_layers):
        for position, norm in enumerate(layer_norms):
            named[norm.format(layer=layer)] = of_layers[2 * number + position]
    return named


def _best(scores: Array, count: int) -> tuple[Sequence[int], float]:
    """Indices of the `count` highest scores, ascending, and the gap at the cut. Ties go to the lower index."""
    order = np.argsort(-scores, kind="stable")
    kept = Entries(np.sort(order[:count]))
    return kept, _gap(scores[order[count - 1]], scores[order[count]]) if count else 0.0


def _heads(
    scores: Array,
    kept_layers: tuple[int, ...],
    source: Architecture,
    target: Architecture,
    merge: bool,
    gaps: dict[str, float],
) -> dict[str, Any]:
    """The Plan's `kept_heads` and, where there are any, `kept_groups` and `merged_heads`."""
    cut_groups = target.num_query_groups < source.num_query_groups
    cut_inside = target.heads_per_group < source.heads_per_group
    all_groups: Sequence[int] = range(source.num_query_groups)
    kept_groups, kept_heads, merged_heads = [], [], []
    for layer in kept_layers:
        by_group = scores[layer].reshape(source.num_query_groups, source.heads_per_group)
        groups = all_groups
        if cut_groups:
            groups, gaps[f"{Axis.GROUPS}/{layer}"] = _best(by_group.sum(axis=1), target.num_query_groups)
        kept, gap = _best_per_group(by_group, groups, target.heads_per_group)
        if cut_inside:
            gaps[f"{Axis.HEADS}/{layer}"] = gap
        kept_groups.append(groups)
        kept_heads.append(kept)
        merged_heads.append(_merges(by_group, groups, target.heads_per_group))
    return {
        "kept_heads": tuple(kept_heads),
        "kept_groups": tuple(kept_groups) if cut_groups else None,
        "merged_heads": tuple(merged_heads) if merge and cut_inside else None,
    }


def _experts(
    scores: Array,
    neurons: Array,
    kept_layers: tuple[int, ...],
    source: Architecture,
    target: Architecture,
    gaps: dict[str, float],
) -> dict[str, Any]:
    """The Plan's `kept_experts` and `kept_moe_ffn`, where these are cut.

    `scores` [num_layers, num_moe_experts] rank the experts, `neurons` [num_layers, num_moe_experts, n] those of each.
    """
    cut_experts, cut_neurons = (target.size(axis) < source.size(axis) for axis in (Axis.EXPERTS, Axis.MOE_FFN))
    kept_experts, kept_moe_ffn = [], []
    for layer in kept_layers if cut_experts or cut_neurons else ():
        experts: Sequence[int] = range(source.size(Axis.EXPERTS))
        if cut_experts:
            experts, gaps[f"{Axis.EXPERTS}/{layer}"] = _best(scores[layer], target.size(Axis.EXPERTS))
            kept_experts.append(experts)
        if cut_neurons:
            best = [_best(neurons[layer, expert], target.size(Axis.MOE_FFN)) for expert in experts]
            kept_moe_ffn.append(tuple(kept for kept, _ in best))
            gaps[f"{Axis.MOE_FFN}/{layer}"] = min(gap for _, gap in best)
    return {"kept_experts": tuple(kept_experts) or None, "kept_moe_ffn": tuple(kept_moe_ffn) or None}


def _best_per_group(scores: Array, groups: Sequence[int], count: int) -> tuple[tuple[int, ...], float]:
    """`_best` within each of the rows `groups` of `scores` [num_query_groups, heads_per_group], as head numbers."""
    if count == scores.shape[1]:
        return tuple(group * count + head for group in groups for head in range(count)), 0.0
    best = {group: _best(scores[group], count) for group in groups}
    kept = tuple(group * scores.shape[1] + head for group, (heads, _) in best.items() for head in heads)
    return kept, min(gap for _, gap in best.values())


def _merges(scores: Array, groups: Sequence[int], count: int) -> tuple[tuple[int, int], ...]:
    """Pairs (kept head, dropped head) of the residual merge of arXiv 2407.14679 section 2.3, within query groups.

    With the L heads of a group ranked from 1, of which K = `count` stay, head i becomes head_i + (head_i -
    head_{2K-i+1}), on the rows of its query. The paper lets i run from 2K-L to K; but the partner of head 2K-L would be
    head L+1, which does not exist. So i runs from 2K-L+1: K pairs with K+1, K-1 with K+2, and so on up to L. Where
    fewer than half of the heads stay, each gets a partner, and the heads ranked below 2K go without.
    """
    size = scores.shape[1]
    pairs = []
    for group in groups:
        ranked = [group * size + head for head in np.argsort(-scores[group], kind="stable").tolist()]
        pairs += [(ranked[i - 1], ranked[2 * count - i]) for i in range(count, max(0, 2 * count - size), -1)]
    return tuple(pairs)


def _weakest_block(influence: Array, size: int) -> tuple[int, float]:
    """Start of the `size` neighbours with the smallest sum, and the gap to the runner-up.

    Ties go to the later block, so that the lower layers stay.
    """
    sums = np.lib.stride_tricks.sliding_window_view(influence, size).sum(axis=1)
    order = np.lexsort((-np.arange(len(sums)), sums))
    return int(order[0]), _gap(sums[order[1]], sums[order[0]]) if len(sums) > 1 else 0.0


def _gap(kept: float, dropped: float) -> float:
    """Relative difference of two scores, `kept` >= `dropped`; 0 for equal ones."""
    return float((kept - dropped) / max(abs(kept), abs(dropped))) if kept != dropped else 0.0


def _provenance(scores: Scores, depth_scores: DepthScores | None, config: PruneConfig) -> dict[str, Any]:
    measured = {} if depth_scores is None else {"depth": dict(depth_scores.identity)}
    calibration = config.calibration
    return {
        **measured,
        "model_fingerprint": scores.model_fingerprint,
        "data_fingerprint": scores.data_fingerprint,
        "sequences": scores.sequences,
        "tokens": scores.tokens,
        "calibration": dict(scores.settings),
        "sequence_aggregation": calibration.sequence_aggregation,
        "batch_aggregation": calibration.batch_aggregation,
        "aggregations": {
            axis: {"sequence": calibration.sequence_aggregation, "batch": calibration.batch_aggregation, **own}
            for axis, own in (calibration.aggregations or {}).items()
        },
        "ffn_score": config.ffn_score,
        "hidden_method": config.hidden_method,
        "depth_method": "drop_layers" if config.drop_layers is not None else config.depth_method,
    }
