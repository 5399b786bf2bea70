"""A pruned model made from Hugging Face tensors by plain indexing, without the package's tables or transform."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from minitron_nemo.arch import Plan
from tests.families import cut

EXPERT_SIZE = {
    "mixtral": "intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
}


def slice_hugging_face(directory: Path, plan: Plan, destination: Path) -> Path:
    """Cut the tensors of the Hugging Face model in `directory` by the Plan's indices; returns `destination`."""
    config = json.loads((directory / "config.json").read_text())
    config.pop("layer_types", None)  # one entry a layer
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config |= {"head_dim": head_dim, "num_hidden_layers": len(plan.kept_layers)}
    kept_experts = plan.kept_experts and plan.kept_experts[0]
    for key, kept in (
        ("hidden_size", plan.kept_hidden),
        ("intermediate_size", plan.kept_ffn and plan.kept_ffn[0]),
        ("num_local_experts" if "num_local_experts" in config else "num_experts", kept_experts),
        ("shared_expert_intermediate_size", plan.kept_shared_ffn and plan.kept_shared_ffn[0]),
        (EXPERT_SIZE.get(config["model_type"]), plan.kept_moe_ffn and plan.kept_moe_ffn[0][0]),
        ("num_attention_heads", plan.kept_heads and plan.kept_heads[0]),
        ("num_key_value_heads", plan.kept_groups and plan.kept_groups[0]),
    ):
        if kept:
            config[key] = len(kept)
    destination.mkdir(parents=True)
    save_file(
        cut(load_file(directory / "model.safetensors"), plan), destination / "model.safetensors", {"format": "pt"}
    )
    (destination / "config.json").write_text(json.dumps(config))
    return destination
