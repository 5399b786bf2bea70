"""A plan as a person reads it: lines of a name and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import active_parameters, non_embedding_parameters, parameters
from minitron_nemo.config import DepthConfig
from minitron_nemo.distillation.communication import Transfer, wire_bytes
from minitron_nemo.planning.text import layout_rows, parts, rows
from minitron_nemo.preflight import Preflight


def text(plan: Preflight, layouts: bool = False) -> str:
    """The plan, with a table of other layouts if asked for."""
    recipe, layout = plan.recipe, plan.layout
    kept = parameters(plan.student) / parameters(plan.source)
    kept_inside = non_embedding_parameters(plan.student) / non_embedding_parameters(plan.source)
    data_parallel_size = layout.data_parallel_size(plan.world_size)
    lines = [
        ("recipe", recipe.name),
        ("teacher", _shape(plan.teacher)),
        *(() if plan.source == plan.teacher else (("cut from", _shape(plan.source)),)),
        ("student", _shape(plan.student)),
        ("teacher's parts", parts(plan.teacher)),
        ("student's parts", parts(plan.student)),
        ("kept", f"{kept:.1%} of the parameters, {kept_inside:.1%} without embeddings"),
        *(("steps", f"{part.steps} of {part.tokens_per_step:,} tokens ({part})") for part in plan.segments),
        *((f"tokens, {name}", f"{count:,}") for name, count in plan.tokens.items() if count),
        *((f"FLOPs, {name}", f"{count:.3e} (arithmetic)") for name, count in plan.flops.items() if count),
        *((("depth search", searched(recipe.prune.depth, plan.depth_search)),) if plan.drop else ()),
        ("processes", f"{plan.world_size}: {layout} dp={data_parallel_size}"),
        *(() if plan.worlds is None else (("distillation", str(plan.worlds)),)),
        *(
            [("teacher's layout", str(plan.teacher_layout))]
            if not plan.worlds and plan.teacher_layout != layout
            else []
        ),
        *((f"{name}, padded", _padded(cost)) for name, cost in plan.padding.items() if cost is not None),
        ("sent per update", _sent(plan.communication)),
        *rows(plan.estimate),
        *(layout_rows(plan.estimate) if layouts else ()),
        *(("warning", warning) for warning in plan.warnings),
    ]
    return "\n".join(f"{name:<26}{value}" for name, value in lines)


def _padded(cost: dict[str, Any]) -> str:
    """Groups of zeros and what they cost."""
    return (
        f"to {cost['num_attention_heads']} heads in {cost['num_query_groups']} groups, by zeros: "
        f"{cost['parameters']:.1%} more parameters, {cost['flops']:.1%} more FLOPs (arithmetic)"
    )


def searched(config: DepthConfig, found: Mapping[str, float]) -> str:
    """What choosing layers takes, `found` as `Preflight.depth_search` has it."""
    sequences = f"{config.samples} sequences" if config.metric == "loss" else f"the choices of {config.task}"
    return (
        f"{found['models']} models, {found['forward_passes']:g} passes through the layers and {found['models']} "
        f"through the output, each of {sequences}"
    )


def _sent(communication: list[list[Transfer]]) -> str:
    """Of a rank of the stage that sends most."""
    if not communication:
        return "nothing: no distillation"
    totals = [wire_bytes(of_rank) for of_rank in communication]
    stage = max(range(len(totals)), key=lambda rank: sum(totals[rank].values()))
    if not totals[stage]:
        return "nothing: one process"
    parts = ", ".join(f"{group} {amount / 1e9:.3g} GB" for group, amount in totals[stage].items())
    return f"{parts}, by each rank of pipeline rank {stage} (arithmetic)"


def _shape(architecture: Architecture) -> str:
    heads = f"{architecture.num_attention_heads} heads of {architecture.kv_channels}"
    active, mlps = "", f"ffn {architecture.ffn_hidden_size}"
    if architecture.num_moe_experts:
        active = f"{active_parameters(architecture):,} for each token, "
        mlps = f"{architecture.moe_router_topk} of {architecture.num_moe_experts} experts of {mlps}"
    if architecture.moe_shared_expert_intermediate_size:
        mlps += f" and one of {architecture.moe_shared_expert_intermediate_size} for all tokens"
    return (
        f"{parameters(architecture):,} parameters, {active}{non_embedding_parameters(architecture):,} without "
        f"embeddings: {architecture.num_layers} layers, hidden {architecture.hidden_size}, {mlps}, "
        f"{heads} in {architecture.num_query_groups} groups"
    )
