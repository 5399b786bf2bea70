"""What makes a Plan one that can be carried out: its parts are for the same layers, within their axes, and fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np

from minitron_nemo.arch.axes import Axis
from minitron_nemo.arch.family import family
from minitron_nemo.arch.matrix import ADD, BIAS, GAIN, REPLACE, Matrix
from minitron_nemo.arch.tensors import NamedTensor, bias_of, tensors
from minitron_nemo.errors import UserError

if TYPE_CHECKING:
    from minitron_nemo.arch.plan import Plan


def check(plan: Plan) -> None:
    """Raise UserError unless the parts of a Plan fit each other."""
    _check_shapes(plan)
    _check(plan, "kept_layers", plan.kept_layers, Axis.LAYERS)
    if plan.kept_hidden is not None:
        _check(plan, "kept_hidden", plan.kept_hidden, Axis.HIDDEN)
    _check_kept_per_layer(plan)
    for axis, cut in (
        (Axis.HIDDEN, plan.kept_hidden),
        (Axis.FFN, plan.kept_ffn),
        (Axis.GROUPS, plan.kept_groups),
        (Axis.HEADS, plan.kept_heads),
        (Axis.EXPERTS, plan.kept_experts),
        (Axis.MOE_FFN, plan.kept_moe_ffn),
        (Axis.SHARED_FFN, plan.kept_shared_ffn),
    ):
        rotated = axis == Axis.HIDDEN and plan.rotated
        if cut is None and not rotated and plan.source.size(axis) != plan.target.size(axis):
            raise UserError(f"plan: {axis} shrinks but the plan does not say which entries are kept")
    for layer, kept in enumerate(plan.kept_heads or ()):
        _check_heads(plan, layer, kept)
    if plan.kept_groups is not None and plan.kept_heads is None:
        raise UserError("plan: kept_groups without kept_heads; list the heads of the groups that stay")
    if plan.merged_heads is not None:
        _check_merges(plan, plan.merged_heads)
    _check_repairs(plan)
    _check_output_and_rotation(plan)


def _check_shapes(plan: Plan) -> None:
    """Raise UserError where the target differs from the source in more than sizes to cut and an output of its own."""
    may_differ = {axis.value for axis in Axis if axis != Axis.VOCAB} | {"share_embeddings_and_output_weights"}
    for field in fields(plan.source):
        before, after = getattr(plan.source, field.name), getattr(plan.target, field.name)
        if field.name not in may_differ and before != after:
            raise UserError(f"plan: the target's {field.name} is {after}, and no plan changes the source's, {before}")


def _check_kept_per_layer(plan: Plan) -> None:
    for name, per_layer, axis in (
        ("kept_ffn", plan.kept_ffn, Axis.FFN),
        ("kept_groups", plan.kept_groups, Axis.GROUPS),
        ("kept_heads", plan.kept_heads, Axis.HEADS),
        ("kept_experts", plan.kept_experts, Axis.EXPERTS),
        ("kept_shared_ffn", plan.kept_shared_ffn, Axis.SHARED_FFN),
    ):
        if per_layer is not None:
            _check_layers(plan, name, per_layer)
            for layer, kept in enumerate(per_layer):
                _check(plan, f"{name}[{layer}]", kept, axis)
    _check_layers(plan, "kept_moe_ffn", plan.kept_moe_ffn or plan.kept_layers)
    for layer, experts in enumerate(plan.kept_moe_ffn or ()):
        if len(experts) != plan.target.size(Axis.EXPERTS):
            raise UserError(
                f"plan: kept_moe_ffn[{layer}] has {len(experts)} experts, the target {plan.target.num_moe_experts}"
            )
        for expert, kept in enumerate(experts):
            _check(plan, f"kept_moe_ffn[{layer}][{expert}]", kept, Axis.MOE_FFN)


def _check_layers(plan: Plan, name: str, per_layer: Sequence[object]) -> None:
    if len(per_layer) != len(plan.kept_layers):
        raise UserError(f"plan: {name} has {len(per_layer)} layers, kept_layers {len(plan.kept_layers)}")


def _check_heads(plan: Plan, layer: int, kept: Sequence[int]) -> None:
    per_group = plan.target.heads_per_group
    groups = np.bincount(np.array(kept) // plan.source.heads_per_group, minlength=plan.source.num_query_groups)
    wanted = np.full_like(groups, per_group)
    if plan.kept_groups is not None:
        wanted[np.setdiff1d(np.arange(len(groups)), plan.kept_groups[layer])] = 0
    if (groups != wanted).any():
        raise UserError(
            f"plan: kept_heads[{layer}] keeps {groups.tolist()} heads per query group, not {wanted.tolist()}"
        )


def _check_merges(plan: Plan, merged: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Raise UserError unless pairs are of a kept and a dropped head of one query group, each head in one pair."""
    kept = plan.kept_heads or ()
    if len(merged) != len(kept):
        raise UserError(f"plan: merged_heads has {len(merged)} layers, kept_heads {len(kept)}")
    for layer, pairs in enumerate(merged):
        heads = [head for pair in pairs for head in pair]
        if len(set(heads)) != len(heads) or not set(heads) <= set(range(plan.source.num_attention_heads)):
            raise UserError(f"plan: merged_heads[{layer}]: a head is listed twice, or there is no such head")
        for stays, goes in pairs:
            same_group = stays // plan.source.heads_per_group == goes // plan.source.heads_per_group
            if stays not in kept[layer] or goes in kept[layer] or not same_group:
                raise UserError(
                    f"plan: merged_heads[{layer}]: ({stays}, {goes}) is not a kept and a dropped head of one group"
                )


def _check_repairs(plan: Plan) -> None:
    """Raise UserError for a norm or a matrix that does not fit the student."""
    if not (plan.norm_scales or plan.matrices):
        return
    if plan.norm_scales and not family(plan.source.family).rescales_norms:
        raise UserError(f"plan: norm_scales are not for the norms of {plan.source.family}")
    found = {tensor.name: tensor for tensor in tensors(plan.target)}
    for name in (*plan.norm_scales, *plan.matrices):
        if name not in found:
            raise UserError(f"plan: the target has no tensor {name}")
    for name, factor in plan.norm_scales.items():
        if found[name].spec.part != "norm" or not isfinite(factor) or factor <= 0:
            raise UserError(f"plan: norm_scales: {name}: {factor} is no factor on a norm's gain")
    _check_norms(plan, found)
    for name, matrix in plan.matrices.items():
        if not matrix.of_norm:
            _check_columns(plan, found[name], matrix)


def _check_columns(plan: Plan, tensor: NamedTensor, matrix: Matrix) -> None:
    """Raise UserError unless the columns of a tensor are what `matrix` makes, and not the matrix of another one."""
    if plan.matrix_of(tensor) != tensor.name:
        raise UserError(f"plan: matrices: {tensor.name}: what reads this norm is multiplied by the first reader's")
    before, after = (tensor.spec.shape(model)[1:] for model in (plan.source, plan.target))
    rows = before[0] - after[0] if matrix.kind == ADD else before[0]
    cut = before != after or (plan.rotated and before == (plan.source.hidden_size,))
    if matrix.kind not in (REPLACE, ADD) or not cut or matrix.shape != (rows, *after):
        raise UserError(f"plan: matrices: {tensor.name}: {matrix.kind} {list(matrix.shape)} does not fit its columns")


def _check_norms(plan: Plan, found: Mapping[str, NamedTensor]) -> None:
    """Raise UserError for a gain or a bias that is given to what has none, and for half a LayerNorm."""
    given = [name for name, matrix in plan.matrices.items() if matrix.of_norm]
    for name in given:
        kind, wanted = plan.matrices[name].kind, (1, *found[name].spec.shape(plan.target))
        its_kind = found[name].spec.part == "norm" and name.endswith({GAIN: "weight", BIAS: "bias"}[kind])
        if not its_kind or name in plan.norm_scales or plan.matrices[name].shape != wanted:
            raise UserError(f"plan: matrices: {name}: not the {kind} of a norm, or of another size, or scaled as well")
    if family(plan.source.family).normalization == "LayerNorm":
        gains = {bias_of(name) for name in given if plan.matrices[name].kind == GAIN}
        for name in gains ^ {name for name in given if plan.matrices[name].kind == BIAS}:
            raise UserError(f"plan: matrices: {name}: a LayerNorm gets a gain and a bias, and one of them is missing")


def _check_output_and_rotation(plan: Plan) -> None:
    """Raise UserError for an output that cannot be tied, and where not all that has hidden channels is rotated."""
    if plan.target.share_embeddings_and_output_weights and not plan.source.share_embeddings_and_output_weights:
        raise UserError("plan: the target's output is its embedding, but the source's has a weight of its own")
    if plan.rotated and not family(plan.source.family).rescales_norms:
        raise UserError(f"plan: rotated, but the norms of {plan.source.family} are not RMSNorms with gains as they are")
    if not (plan.rotated and plan.matrices):
        return
    if plan.kept_hidden is not None or plan.target.share_embeddings_and_output_weights:
        raise UserError("plan: rotated, but it keeps hidden channels as they are, or a tied output")
    for tensor in tensors(plan.target):
        axes = [Axis.HIDDEN in dim.axes for dim in tensor.spec.dims]
        if axes == [True] and not plan.gives(tensor.name):
            raise UserError(f"plan: rotated, but {tensor.name} keeps the source's gain")
        if axes == [False, True]:
            matrix = plan.matrix_of(tensor)
            if matrix is None or plan.matrices[matrix].kind != REPLACE:
                raise UserError(f"plan: rotated, but {tensor.name} has no matrix in place of its columns")


def _check(plan: Plan, name: str, kept: Sequence[int], axis: Axis) -> None:
    if len(kept) != plan.target.size(axis):
        raise UserError(f"plan: {name} keeps {len(kept)} entries, the target's {axis} is {plan.target.size(axis)}")
    if (np.diff(kept) <= 0).any() or kept[0] < 0 or kept[-1] >= plan.source.size(axis):
        raise UserError(
            f"plan: {name} must be ascending, unique and within the source's {axis} {plan.source.size(axis)}"
        )
