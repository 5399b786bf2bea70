"""The student's shape: the sizes that a recipe asks for, and what the source does not allow."""

from __future__ import annotations

from dataclasses import replace

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.family import family
from minitron_nemo.config import PruneConfig, RepairConfig
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import AGGREGATED, AGGREGATIONS
from minitron_nemo.pruning import depth

BY_INFLUENCE = ("block_influence", "contiguous")
DEPTH_METHODS = (*BY_INFLUENCE, *depth.METHODS)
NEURONS = (Axis.FFN, Axis.SHARED_FFN, Axis.MOE_FFN)  # what `ffn_score` ranks and `repair.ffn` makes up for
PAIR = "{sequence: mean, batch: l2}"  # an example of one


def target_architecture(source: Architecture, config: PruneConfig) -> Architecture:
    """The student's architecture. Raises UserError, naming the key, for a size or score that the source cannot have."""
    sizes = _sizes(source, config)
    if config.drop_layers is not None:
        if config.num_layers is not None:
            raise UserError("prune.drop_layers: prune.num_layers is given too; keep one of the two")
        sizes[Axis.LAYERS] = source.num_layers - len(explicit_layers(source, config.drop_layers))
    elif config.depth_method not in DEPTH_METHODS:
        raise UserError(f"prune.depth_method: {config.depth_method!r} is not one of {', '.join(DEPTH_METHODS)}")
    elif config.depth_method in BY_INFLUENCE and sizes.get(Axis.LAYERS) == 1 < source.num_layers:
        raise UserError(
            f"prune.num_layers: 1 is too few, {config.depth_method} keeps the first and the last layer; "
            f"list what goes in prune.drop_layers"
        )
    _check_aggregations(source, config)
    target = source.resized(sizes)
    if config.untie:
        target = replace(target, share_embeddings_and_output_weights=False)
    if rotates(target, source, config):
        _check_rotation(target, config)
    return target


def _sizes(source: Architecture, config: PruneConfig) -> dict[Axis, int]:
    """The sizes that the recipe gives, checked against the source's, and the heads that they leave."""
    sizes: dict[Axis, int] = {}
    for axis in (axis for axis in Axis if axis != Axis.VOCAB):
        size: int | None = getattr(config, axis.value)
        if size is None:
            continue
        if not source.has(axis):
            instead = "use prune.moe_ffn_hidden_size" if axis == Axis.FFN else "leave it out"
            raise UserError(f"prune.{axis}: the layers of {source.family} have none; {instead}")
        if not 1 <= size <= source.size(axis):
            raise UserError(f"prune.{axis}: {size} is not a size to prune to; the source has {source.size(axis)}")
        sizes[axis] = size
    if sizes.get(Axis.EXPERTS, source.size(Axis.EXPERTS)) < (topk := source.moe_router_topk or 0):
        raise UserError(
            f"prune.num_moe_experts: {sizes[Axis.EXPERTS]} are too few, a token is routed to {topk}; "
            f"keep {topk} or more"
        )
    groups = sizes.get(Axis.GROUPS, source.num_query_groups)
    heads = sizes.setdefault(Axis.HEADS, groups * source.heads_per_group)
    if heads % groups or heads > groups * source.heads_per_group:
        multiples = ", ".join(str(groups * n) for n in range(1, source.heads_per_group + 1))
        raise UserError(
            f"prune.num_attention_heads: {heads} is not a multiple of num_query_groups, {groups}, "
            f"or more than they have; use one of {multiples}"
        )
    return sizes


def _check_aggregations(source: Architecture, config: PruneConfig) -> None:
    """Pairs of their own are for axes that the source has, and whose entries such a pair ranks."""
    key, given = "prune.calibration.aggregations", config.calibration.aggregations
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{key}: {given!r} is not a pair for each of some axes, {{AXIS: {PAIR}}}")
    for axis, own in (given or {}).items():
        if axis not in AGGREGATED:
            raise UserError(f"{key}.{axis}: not one of the axes that have aggregations, {', '.join(AGGREGATED)}")
        if not source.has(Axis(axis)):
            raise UserError(f"{key}.{axis}: the layers of {source.family} have none; leave it out")
        if axis in NEURONS and config.ffn_score != "activation":
            raise UserError(
                f"{key}.{axis}: prune.ffn_score is {config.ffn_score}, which has no aggregations; set it to activation"
            )
        if not isinstance(own, dict) or not own.keys() <= {"sequence", "batch"}:
            raise UserError(f"{key}.{axis}: {own!r} is not {PAIR}, or one of the two")
        for part, value in own.items():
            if value not in AGGREGATIONS:
                raise UserError(f"{key}.{axis}.{part}: {value!r} is not one of {', '.join(AGGREGATIONS)}")


def rotates(target: Architecture, source: Architecture, config: PruneConfig) -> bool:
    """Whether the cut of hidden channels combines them instead of selecting some."""
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
    traits = family(source.family)
    lacking: dict[str, list[str]] = {"norm_scale": [], "hidden": []}
    if not traits.rescales_norms:
        for key in ("norm_scale", "hidden"):
            lacking[key].append(f"needs RMSNorm with gains stored as they are, which {source.family} has not")
    decided = {}
    for key, reasons in lacking.items():
        asked: bool | None = getattr(config, key)
        if asked and reasons:
            raise UserError(f"prune.repair.{key}: {reasons[0]}; leave it out")
        decided[key] = not reasons if asked is None else asked
    return replace(config, **decided)


def explicit_layers(source: Architecture, drop_layers: list[int]) -> set[int]:
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
