"""A pruned Llama made from Hugging Face tensors by plain indexing, without the package's tables or transform."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.arch import Plan


def slice_hugging_face(directory: Path, plan: Plan, destination: Path) -> Path:
    """Cut the tensors of the Hugging Face model in `directory` by the Plan's indices; returns `destination`."""
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    hidden = index(plan.kept_hidden, config["hidden_size"])
    cut = {name: tensor[..., hidden] for name, tensor in weights.items() if not name.startswith("model.layers.")}
    for new, old in enumerate(plan.kept_layers):
        ffn = index(plan.kept_ffn and plan.kept_ffn[new], config["intermediate_size"])
        heads = index(plan.kept_heads and plan.kept_heads[new], config["num_attention_heads"])
        groups = index(plan.kept_groups and plan.kept_groups[new], config["num_key_value_heads"])
        pairs = (groups[:, None] * config["head_dim"] + torch.arange(config["head_dim"])).flatten()
        channels = (heads[:, None] * config["head_dim"] + torch.arange(config["head_dim"])).flatten()
        layer = {
            name.removeprefix(f"model.layers.{old}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{old}.")
        }
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            layer[f"{name}.weight"] = layer[f"{name}.weight"][:, hidden]
        for name in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
            layer[f"{name}.weight"] = layer[f"{name}.weight"][hidden]
        queries = layer["self_attn.q_proj.weight"].unflatten(0, (-1, config["head_dim"]))
        merged = queries.clone()
        for stays, goes in plan.merged_heads[new] if plan.merged_heads else ():
            merged[stays] = 2 * queries[stays] - queries[goes]
        layer["self_attn.q_proj.weight"] = merged[heads].flatten(0, 1)
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            layer[f"{name}.weight"] = layer[f"{name}.weight"][pairs]
        layer["self_attn.o_proj.weight"] = layer["self_attn.o_proj.weight"][:, channels]
        for name in ("gate_proj", "up_proj"):
            layer[f"mlp.{name}.weight"] = layer[f"mlp.{name}.weight"][ffn]
        layer["mlp.down_proj.weight"] = layer["mlp.down_proj.weight"][:, ffn]
        cut |= {f"model.layers.{new}.{name}": tensor for name, tensor in layer.items()}
    config |= {
        "hidden_size": len(hidden),
        "intermediate_size": len(ffn),
        "num_attention_heads": len(heads),
        "num_key_value_heads": len(groups),
        "num_hidden_layers": len(plan.kept_layers),
    }
    for name, factor in plan.norm_scales.items():
        cut[norm_name(name)] = cut[norm_name(name)] * factor
    destination.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in cut.items()}, destination / "model.safetensors", {"format": "pt"}
    )
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def norm_name(name: str) -> str:
    """What Hugging Face calls a norm of ours."""
    if name == "decoder.final_layernorm.weight":
        return "model.norm.weight"
    layer = "model.layers." + name.split(".")[2]
    return f"{layer}.input_layernorm.weight" if "qkv" in name else f"{layer}.post_attention_layernorm.weight"


def index(kept: tuple[int, ...] | None, size: int) -> torch.Tensor:
    return torch.from_numpy(np.arange(size) if kept is None else np.array(kept))
