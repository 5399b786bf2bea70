"""Scores + target sizes -> Plan. Arithmetic on small arrays: no weights are read here.

Depth: `block_influence` drops the layers that change their input least, `contiguous` the block that does so in sum.
Both keep the first and the last layer: removing those costs most (arXiv 2408.11796 figure 8, whose 16 dropped layers
end before the last), and Block Influence need not see it. An explicit list drops what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.family import family
from minitron_nemo.config import PruneConfig, RepairConfig
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import FINAL_NORM, LAYER_NORMS, Array, Scores

DEPTH_METHODS = ("block_influence", "contiguous")


def target_architecture(source: Architecture, config: PruneConfig) -> Architecture:
    """The student's architecture. Raises UserError, naming the key, for a size or score that the source cannot have."""
    sizes: dict[Axis, int] = {}
    for axis in (Axis.HIDDEN, Axis.FFN, Axis.HEADS, Axis.GROUPS, Axis.LAYERS):
        size: int | None = getattr(config, axis.value)
        if size is None:
            continue
        if not 1 <= size <= source.size(axis):
            raise UserError(f"prune.{axis}: {size} is not a size to prune to; the source has {source.size(axis)}")
        sizes[axis] = size
    groups = sizes.get(Axis.GROUPS, source.num_query_groups)
    heads = sizes.setdefault(Axis.HEADS, groups * source.heads_per_group)
    if heads % groups or heads > groups * source.heads_per_group:
        multiples = ", ".join(str(groups * n) for n in range(1, source.heads_per_group + 1))
        raise UserError(
            f"prune.num_attention_heads: {heads} is not a multiple of num_query_groups, {groups}, "
            f"or more than they have; use one of {multiples}"
        )
    if config.drop_layers is not None:
        if config.num_layers is not None:
            raise UserError("prune.drop_layers: prune.num_layers is given too; keep one of the two")
        sizes[Axis.LAYERS] = source.num_layers - len(_explicit(source, config.drop_layers))
    elif config.depth_method not in DEPTH_METHODS:
        raise UserError(f"prune.depth_method: {config.depth_method!r} is not one of {', '.join(DEPTH_METHODS)}")
    elif sizes.get(Axis.LAYERS) == 1 < source.num_layers:
        raise UserError(
            f"prune.num_layers: 1 is too few, {config.depth_method} keeps the first and the last layer; "
            f"list what goes in prune.drop_layers"
        )
    normalization = family(source.family).normalization
    if config.hidden_score == "energy" and normalization != "RMSNorm":
        raise UserError(
            f"prune.hidden_score: energy is of RMSNorm, {source.family} has {normalization}; use activation"
        )
    target = source.resized(sizes)
    if config.untie:
        target = replace(target, share_embeddings_and_output_weights=False)
    if _rotates(target, source, config):
        _check_rotation(target, config)
    return target


def _rotates(target: Architecture, source: Architecture, config: PruneConfig) -> bool:
    return config.hidden_method == "rotate" and target.hidden_size < source.hidden_size


def _check_rotation(target: Architecture, config: PruneConfig) -> None:
    if not family(target.family).rescales_norms:
        raise UserError(
            f"prune.hidden_method: rotate needs RMSNorm with gains stored as they are, which {target.family} has not; "
            f"use select"
        )
    if target.share_embeddings_and_output_weights:
        raise UserError(
            f"prune.hidden_method: rotate needs an output weight of its own, and the source's is its embedding; set "
            f"prune.untie to true, at {target.vocab_size * target.hidden_size:,} parameters, or use select"
        )
    if config.repair.hidden is False:
        raise UserError(
            "prune.repair.hidden: false is not for hidden_method rotate, where every reader is fitted; leave it out"
        )


def repairs_of(source: Architecture, config: RepairConfig) -> RepairConfig:
    """`config` with what it leaves to the family decided. Raises UserError for a repair that the family has not."""
    able = family(source.family).rescales_norms
    decided = {}
    for key in ("norm_scale", "hidden"):
        asked: bool | None = getattr(config, key)
        if asked and not able:
            raise UserError(
                f"prune.repair.{key}: needs RMSNorm with gains stored as they are, which {source.family} has not; "
                f"leave it out"
            )
        decided[key] = able if asked is None else asked
    return replace(config, **decided)


def make_plan(scores: Scores, source: Architecture, config: PruneConfig) -> Plan:
    """The Plan that keeps the entries with the highest scores; ties go to the lower index.

    FFN neurons are ranked per layer; query groups per layer, by the sum of their heads' scores; heads per layer and
    group, every group keeping equally many and, with `repair.merge_heads`, merging dropped ones; hidden channels over
    the whole model, where `repair.norm_scale` gives the gain of every norm a factor. `gaps` has one number per decision
    that Scores took, named by axis and, where layers decide on their own, the source's layer: (worst kept - best
    dropped) / worst kept, the smallest of the groups' for heads, and for `contiguous` the same of the dropped block's
    summed influence and the runner-up's.

    Where hidden channels are rotated, the Plan has no matrices yet: `minitron repair` makes them.

    Raises UserError for Scores of another architecture and for what `target_architecture` and `repairs_of` refuse.
    """
    if scores.architecture != source:
        measured, given = scores.architecture.to_dict(), source.to_dict()
        key = next(key for key in given if measured[key] != given[key])
        raise UserError(f"scores: measured on a model with {key} {measured[key]}, not {given[key]}; calibrate again")
    target, repairs = target_architecture(source, config), repairs_of(source, config.repair)
    gaps: dict[str, float] = {}
    kept_layers = _kept_layers(scores, source, target, config, gaps)

    def score(axis: Axis) -> Array:
        return scores.get(axis, config.calibration.sequence_aggregation, config.calibration.batch_aggregation)

    norm_scales: dict[str, float] = {}
    kept_hidden: tuple[int, ...] | None = None
    rotated = _rotates(target, source, config)
    if target.hidden_size < source.hidden_size and not rotated:
        channels = scores.hidden_energy() if config.hidden_score == "energy" else score(Axis.HIDDEN)
        kept_hidden, gaps[Axis.HIDDEN.value] = _best(channels, target.hidden_size)
        if repairs.norm_scale:
            norm_scales = _norm_scales(scores, kept_layers, kept_hidden)
    kept_ffn: list[tuple[int, ...]] = []
    if target.ffn_hidden_size < source.ffn_hidden_size:
        neurons = scores.ffn_outputs() if config.ffn_score == "output" else score(Axis.FFN)
        for layer in kept_layers:
            kept, gaps[f"{Axis.FFN}/{layer}"] = _best(neurons[layer], target.ffn_hidden_size)
            kept_ffn.append(kept)
    heads: dict[str, Any] = {}
    if target.num_attention_heads < source.num_attention_heads:
        heads = _heads(score(Axis.HEADS), kept_layers, source, target, repairs.merge_heads, gaps)
    return Plan(
        source=source,
        target=target,
        kept_layers=kept_layers,
        kept_hidden=kept_hidden,
        rotated=rotated,
        kept_ffn=tuple(kept_ffn) or None,
        **heads,
        norm_scales=norm_scales,
        gaps=gaps,
        provenance=_provenance(scores, config),
    )


def _explicit(source: Architecture, drop_layers: list[int]) -> set[int]:
    """The layers of an explicit list, checked."""
    last = source.num_layers - 1
    for position, layer in enumerate(drop_layers):
        if not 0 <= layer <= last:
            raise UserError(f"prune.drop_layers: there is no layer {layer}; the source's are numbered 0 to {last}")
        if layer in drop_layers[:position]:
            raise UserError(f"prune.drop_layers: layer {layer} is listed twice; list it once")
    if len(drop_layers) == source.num_layers:
        raise UserError(f"prune.drop_layers: it lists all {source.num_layers} layers; leave at least one")
    return set(drop_layers)


def _kept_layers(
    scores: Scores, source: Architecture, target: Architecture, config: PruneConfig, gaps: dict[str, float]
) -> tuple[int, ...]:
    if config.drop_layers is not None:
        dropped = _explicit(source, config.drop_layers)
        return tuple(layer for layer in range(source.num_layers) if layer not in dropped)
    drop = source.num_layers - target.num_layers
    if not drop:
        return tuple(range(source.num_layers))
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


def _norm_scales(scores: Scores, kept_layers: tuple[int, ...], kept_hidden: tuple[int, ...]) -> dict[str, float]:
    """Factors on the gains of all norms of the student, by name."""
    *of_layers, final = scores.norm_scales(kept_hidden).tolist()
    named = {FINAL_NORM: final}
    for layer, source in enumerate(kept_layers):
        for position, norm in enumerate(LAYER_NORMS):
            named[norm.format(layer=layer)] = of_layers[2 * source + position]
    return named


def _best(scores: Array, count: int) -> tuple[tuple[int, ...], float]:
    """Indices of the `count` highest scores, ascending, and the gap at the cut. Ties go to the lower index."""
    order = np.argsort(-scores, kind="stable")
    kept = tuple(sorted(order[:count].tolist()))
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
    all_groups = tuple(range(source.num_query_groups))
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


def _provenance(scores: Scores, config: PruneConfig) -> Mapping[str, Any]:
    return {
        "model_fingerprint": scores.model_fingerprint,
        "data_fingerprint": scores.data_fingerprint,
        "sequences": scores.sequences,
        "tokens": scores.tokens,
        "calibration": dict(scores.settings),
        "sequence_aggregation": config.calibration.sequence_aggregation,
        "batch_aggregation": config.calibration.batch_aggregation,
        "ffn_score": config.ffn_score,
        "hidden_method": config.hidden_method,
        "hidden_score": config.hidden_score,
        "depth_method": "drop_layers" if config.drop_layers is not None else config.depth_method,
    }
