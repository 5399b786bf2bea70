"""Architecture <-> Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
ROPE_TYPES = (None, "default", "llama3")


def architecture_from_hf(config: Mapping[str, Any], origin: str = "config.json") -> Architecture:
    """Read an Architecture from a Hugging Face configuration of transformers 4 or 5.

    Raises UserError, naming `origin`, for a model of another family or a feature that the family does not have.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(f"{origin}: model_type {model_type!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, wanted) != wanted:
            raise UserError(f"{origin}: {key} is {config[key]!r}; only {wanted!r} is supported")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type not in ROPE_TYPES:
        raise UserError(f"{origin}: rope_type {rope_type!r} is not supported; known: llama3")
    rotary_base = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    try:
        heads = config["num_attention_heads"]
        return Architecture(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
            rotary_base=float(rotary_base),
            rope_scaling=rope if rope_type == "llama3" else None,
            share_embeddings_and_output_weights=config.get("tie_word_embeddings", False),
            model_type=model_type,
        )
    except KeyError as error:
        raise UserError(f"{origin}: key {error} is missing") from None


def hf_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The `config.json` of an architecture, in the keys that transformers 4 and 5, vLLM and llama.cpp all read."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture.model_type]],
        "model_type": architecture.model_type,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.kv_channels,
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "rms_norm_eps": architecture.layernorm_epsilon,
        "rope_theta": architecture.rotary_base,
        "rope_scaling": dict(architecture.rope_scaling) if architecture.rope_scaling else None,
        "tie_word_embeddings": architecture.share_embeddings_and_output_weights,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }
    if architecture.model_type == "mistral":
        return config | {"sliding_window": None}
    return config | {"attention_bias": False, "mlp_bias": False}


def hf_warnings(architecture: Architecture) -> list[str]:
    """What Hugging Face's transformers will refuse about this shape, as sentences for a person."""
    if architecture.model_type == "llama" and architecture.hidden_size % architecture.num_attention_heads:
        return [
            f"hidden_size {architecture.hidden_size} is not a multiple of num_attention_heads "
            f"{architecture.num_attention_heads}: transformers >= 5 refuses such a LlamaConfig; "
            f"the export will not load there"
        ]
    return []
