"""Tiny random models of every family, and what tests do to Hugging Face's tensors whatever the family.

The models beside Llama are written by transformers. Tensors are cut by what their Hugging Face names say, apart from
the package's tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_nemo.arch import Plan
from tests.tiny import write_byte_tokenizer, write_tiny_llama

# How transformers shall compute in fp64: from 5 on it has implementations of experts that know no fp64.
EAGER = {"attn_implementation": "eager"}
if int(transformers.__version__.partition(".")[0]) >= 5:
    EAGER["experts_implementation"] = "eager"

# What a family's tiny model has beside the sizes: heads that are not hidden_size / heads wide, windows that cut.
EXTRA: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "nemotron": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "phi3": {"sliding_window": 10, "pad_token_id": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 80},
}
FAMILIES = tuple(EXTRA)  # beside Llama
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe")
DENSE = tuple(family for family in FAMILIES if family not in MIXTURES)


def write_tiny(
    family: str,
    directory: Path,
    *,
    num_layers: int = 4,
    hidden_size: int = 64,
    ffn_hidden_size: int = 96,
    num_attention_heads: int = 8,
    num_query_groups: int = 4,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changed: Any,
) -> Path:
    """As `write_tiny_llama`, for any family; `changed` keys of the configuration take the place of `EXTRA`'s."""
    sizes = {"num_layers": num_layers, "hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size}
    sizes |= {"num_attention_heads": num_attention_heads, "num_query_groups": num_query_groups}
    if family == "llama":
        return write_tiny_llama(directory, tied=tied, dtype=dtype, seed=seed, **sizes)
    config = AutoConfig.for_model(
        family,
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_query_groups,
        vocab_size=259,
        max_position_embeddings=512,
        bos_token_id=257,
        eos_token_id=256,
        tie_word_embeddings=tied,
        **({"moe_intermediate_size": ffn_hidden_size} if family in ("qwen3_moe", "qwen2_moe") else {}),
        **{**EXTRA[family], **changed},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, seed, around=0.0 if family == "nemotron" else 1.0)
    model.save_pretrained(directory)
    write_byte_tokenizer(directory)
    return directory


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int, around: float) -> None:
    """Matrices and biases are normal with std 0.1, the norms' gains `around` +- 0.1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.copy_(values + around if name.endswith("norm.weight") else values)


MIXTRAL = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # and the other mixtures


def unfused(tensors: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    """Phi-3's `qkv_proj` and `gate_up_proj` as the tensors that other families have in their place.

    Mixtral's under the names that Qwen3-MoE's have; and what transformers makes of both in memory, as they are stored.
    """
    result = {}
    for name, tensor in tensors.items():
        if "mlp.experts.gate_up_proj" in name or "mlp.experts.down_proj" in name:
            layer, stack = name.split("experts.")
            names = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
            for expert, whole in enumerate(tensor):
                for part, half in zip(names, whole.chunk(len(names)), strict=True):
                    result[f"{layer}experts.{expert}.{part}.weight"] = half
        elif "block_sparse_moe" in name:
            result[".".join(MIXTRAL.get(word, word) for word in name.split("."))] = tensor
        elif "qkv_proj" in name:
            head = len(tensor) // (heads + 2 * groups)
            parts = tensor.split([heads * head, groups * head, groups * head])
            result |= {name.replace("qkv", letter): part for letter, part in zip("qkv", parts, strict=True)}
        elif "gate_up_proj" in name:
            result |= {
                name.replace("gate_up", half): part for half, part in zip(("gate", "up"), tensor.chunk(2), strict=True)
            }
        else:
            result[name] = tensor
    return result


def fused_like(original: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unfused`, where `original` has tensors of Phi-3 or Mixtral."""
    if any("block_sparse_moe" in name for name in original):
        theirs = {ours: name for name, ours in MIXTRAL.items()}
        return {".".join(theirs.get(word, word) for word in name.split(".")): part for name, part in tensors.items()}
    if not any("qkv_proj" in name for name in original):
        return tensors
    result = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            result[name.replace("q_proj", "qkv_proj")] = torch.cat(
                [tensors[name.replace("q_", f"{x}_")] for x in "qkv"]
            )
        elif "gate_proj" in name:
            up = tensors[name.replace("gate", "up")]
            result[name.replace("gate", "gate_up")] = torch.cat([tensor, up])
        elif not re.search("[kv]_proj|up_proj", name):
            result[name] = tensor
    return result


def cut(tensors: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The student's Hugging Face weights by plain indexing of the teacher's, merges of heads and factors on norms."""
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    result = {
        name: _take(tensor, [plan.kept_hidden] if tensor.dim() == 1 else [None, plan.kept_hidden])
        for name, tensor in outside.items()
    }
    split = unfused(tensors, plan.source.num_attention_heads, plan.source.num_query_groups)
    for new, old in enumerate(plan.kept_layers):
        ffn = plan.kept_ffn and plan.kept_ffn[new]
        heads = plan.kept_heads and rows_of(plan.kept_heads[new], plan.source.kv_channels)
        groups = plan.kept_groups and rows_of(plan.kept_groups[new], plan.source.kv_channels)
        experts = plan.kept_experts and plan.kept_experts[new]
        stay = list(experts or range(plan.source.num_moe_experts or 0))
        kept: dict[str, Any] = {"hidden": plan.kept_hidden, "ffn": ffn, "heads": heads, "groups": groups, "all": None}
        kept |= {"experts": experts, "shared": plan.kept_shared_ffn and plan.kept_shared_ffn[new]}
        pairs = plan.merged_heads[new] if plan.merged_heads else ()
        for name, tensor in split.items():
            if name.startswith(f"model.layers.{old}."):
                module, _ = name.removeprefix(f"model.layers.{old}.").rsplit(".", 1)
                whole = merged(tensor, pairs, plan.source.kv_channels) if module == "self_attn.q_proj" else tensor
                student = name.replace(f".{old}.", f".{new}.", 1)
                if module.startswith("mlp.experts."):
                    if (expert := int(module.split(".")[2])) not in stay:
                        continue
                    module = module.replace(f"experts.{expert}.", "")
                    student = student.replace(f"experts.{expert}.", f"experts.{stay.index(expert)}.")
                    kept["ffn"] = plan.kept_moe_ffn and plan.kept_moe_ffn[new][stay.index(expert)]
                result[student] = _take(whole, [kept[axis] for axis in DIMS[module]])
    for name, factor in plan.norm_scales.items():
        result[norm_name(name)] = result[norm_name(name)] * factor
    return fused_like(tensors, result)


def merged(queries: Tensor, pairs: Sequence[tuple[int, int]], head_dim: int) -> Tensor:
    """`q_proj`'s weight or bias after every (kept head, dropped head) has become twice the kept one less the other."""
    heads = queries.unflatten(0, (-1, head_dim))
    result = heads.clone()
    for stays, goes in pairs:
        result[stays] = 2 * heads[stays] - heads[goes]
    return result.flatten(0, 1)


def norm_name(name: str) -> str:
    """What Hugging Face calls a norm of ours."""
    if name == "decoder.final_layernorm.weight":
        return "model.norm.weight"
    layer = "model.layers." + name.split(".")[2]
    return f"{layer}.input_layernorm.weight" if "qkv" in name else f"{layer}.post_attention_layernorm.weight"


DIMS = {  # rows, columns; a bias has the rows of its matrix
    "input_layernorm": ("hidden",),
    "self_attn.q_proj": ("heads", "hidden"),
    "self_attn.k_proj": ("groups", "hidden"),
    "self_attn.v_proj": ("groups", "hidden"),
    "self_attn.q_norm": ("all",),
    "self_attn.k_norm": ("all",),
    "self_attn.o_proj": ("hidden", "heads"),
    "post_attention_layernorm": ("hidden",),
    "mlp.gate": ("experts", "hidden"),
    "mlp.shared_expert.gate_proj": ("shared", "hidden"),
    "mlp.shared_expert.up_proj": ("shared", "hidden"),
    "mlp.shared_expert.down_proj": ("hidden", "shared"),
    "mlp.shared_expert_gate": ("all", "hidden"),
    "mlp.gate_proj": ("ffn", "hidden"),
    "mlp.up_proj": ("ffn", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
}


def _take(tensor: Tensor, kept: Sequence[Sequence[int] | None]) -> Tensor:
    for dim, indices in enumerate(kept[: tensor.dim()]):
        if indices is not None:
            tensor = tensor.index_select(dim, torch.tensor(indices))
    return tensor.contiguous()


def rows_of(heads: Sequence[int], head_dim: int) -> list[int]:
    return [head * head_dim + channel for head in heads for channel in range(head_dim)]
