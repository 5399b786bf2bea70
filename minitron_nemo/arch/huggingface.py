"""Architecture <-> Hugging Face `config.json`: what all model types spell alike; the rest is the families'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitron_nemo.arch.architecture import VALUES, Architecture
from minitron_nemo.arch.family import HuggingFaceModel, family, family_of_type
from minitron_nemo.errors import UserError

ROPE_TYPES = (None, "default", "llama3")
# Fields of Architecture whose keys all configurations must have.
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}


def architecture_from_hf(config: Mapping[str, Any], origin: str = "config.json") -> Architecture:
    """Read an Architecture from a Hugging Face configuration of transformers 4 or 5.

    Raises UserError, naming `origin`, for a model of another family, a feature that the family does not have, and a
    value that is missing or none that its key can have.
    """
    model_type = config.get("model_type")
    name, spelling = family_of_type(model_type, origin)
    for key, wanted in spelling.fixed.items():
        if config.get(key, wanted) != wanted:
            raise UserError(f"{origin}: {key} is {config[key]!r}; only {wanted!r} is supported")
    rotary = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    if not isinstance(stated := config.get(rotary) or {}, Mapping):
        raise UserError(f"{origin}: {rotary} is {stated!r}; it must be keys with values, or null")
    rope = dict(stated)
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type not in ROPE_TYPES:
        raise UserError(f"{origin}: rope_type {rope_type!r} is not supported; known: llama3")
    # transformers 5 keeps with the rotary settings what transformers 4 has beside them.
    beside = dict(config) | {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if "num_local_experts" in config:
        beside.setdefault("num_experts", config["num_local_experts"])  # transformers 5 has Mixtral's name for all
    sizes = {field: _size(config, key, origin) for field, key in SIZES.items()}
    heads, theta = sizes["num_attention_heads"], beside.get("rope_theta") or 10000.0
    fields: dict[str, Any] = {
        **sizes,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or sizes["hidden_size"] // heads,
        "rotary_base": float(theta) if type(theta) is int else theta,
        "rope_scaling": rope if rope_type == "llama3" else None,
        "share_embeddings_and_output_weights": config.get("tie_word_embeddings") or False,
    }
    fields |= {field: beside.get(key, absent) for field, (key, absent) in spelling.keys.items()}
    fields |= {field: not beside.get(key, absent) for field, (key, absent) in spelling.opposites.items()}
    try:
        found = Architecture(**fields, family=name, model_type=str(model_type))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    if found.window_size is not None and found.window_size >= found.max_position_embeddings:
        return replace(found, window_size=None)  # it reaches back over the whole length
    return found


def hf_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The `config.json` of an architecture, in the keys that transformers 4 and 5, vLLM and llama.cpp all read."""
    spelling = _spelling(architecture)
    config: dict[str, Any] = {
        "architectures": [spelling.class_name],
        "model_type": architecture.model_type,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.kv_channels,
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "rope_theta": architecture.rotary_base,
        "rope_scaling": dict(architecture.rope_scaling) if architecture.rope_scaling else None,
        "tie_word_embeddings": architecture.share_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "pad_token_id": None,  # the tokenizer says it; Phi3Config would make up one outside a small vocabulary
    }
    config |= {key: getattr(architecture, field) for field, (key, _) in spelling.keys.items()}
    config |= {key: not getattr(architecture, field) for field, (key, _) in spelling.opposites.items()}
    return config | dict(spelling.fixed)


def hf_warnings(architecture: Architecture) -> list[str]:
    """What Hugging Face's transformers will refuse about this shape, as sentences for a person."""
    spelling = _spelling(architecture)
    if spelling.whole_heads and architecture.hidden_size % architecture.num_attention_heads:
        return [
            f"hidden_size {architecture.hidden_size} is not a multiple of num_attention_heads "
            f"{architecture.num_attention_heads}: transformers >= 5 refuses such a "
            f"{spelling.class_name}; the export will not load there"
        ]
    return []


def _size(config: Mapping[str, Any], key: str, origin: str) -> int:
    """A size under the name that the file has for it. Raises UserError."""
    if key not in config:
        raise UserError(f"{origin}: key {key!r} is missing")
    wanted, right = VALUES["int"]
    if not right(config[key]):
        raise UserError(f"{origin}: {key} is {config[key]!r}; it must be {wanted}")
    return int(config[key])


def _spelling(architecture: Architecture) -> HuggingFaceModel:
    return family(architecture.family).hugging_face[architecture.model_type]
