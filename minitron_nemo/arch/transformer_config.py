"""Architecture <-> the fields of Megatron-core's TransformerConfig, as NeMo 2 and Megatron-Bridge keep them.

A configuration comes here as a mapping of field names to plain values; classes, functions and data types in it are
their dotted names (`torch.nn.functional.silu`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.errors import UserError

SILU = "torch.nn.functional.silu"

SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# What the family is, in these fields, with the default that a missing field has in GPTConfig and GPTModelProvider.
_FEATURES: dict[str, tuple[Any, Any]] = {  # field: (supported, default)
    "normalization": ("RMSNorm", "LayerNorm"),
    "activation_func": (SILU, "torch.nn.functional.gelu"),
    "gated_linear_unit": (True, False),
    "add_bias_linear": (False, True),
    "add_qkv_bias": (False, False),
    "qk_layernorm": (False, False),
    "layernorm_zero_centered_gamma": (False, False),
    "apply_residual_connection_post_layernorm": (False, False),
    "multi_latent_attention": (False, False),
    "softmax_type": ("vanilla", "vanilla"),
    "num_moe_experts": (None, None),
    "position_embedding_type": ("rope", "learned_absolute"),
    "rotary_percent": (1.0, 1.0),
    "rotary_interleaved": (False, False),
    "seq_len_interpolation_factor": (None, None),
}

# The fields of the family that do not depend on sizes, as they are written.
_FAMILY = {field: supported for field, (supported, default) in _FEATURES.items() if supported != default}


def architecture_from_fields(
    fields: Mapping[str, Any],
    origin: str,
    *,
    model_type: str,
    rope_scaling: Mapping[str, Any] | None,
    tokenizer_size: int | None,
) -> Architecture:
    """Read an Architecture from the fields of a configuration; `origin` is what messages call it.

    `tokenizer_size` stands in for a vocabulary that is not given. Raises UserError for another family, a feature that
    the family does not have, and a size that is missing or no whole number.
    """
    for field, (supported, default) in _FEATURES.items():
        if (found := fields.get(field, default)) != supported:
            raise UserError(f"{origin}.{field} is {found!r}; only {supported!r} is supported")
    hidden, heads = _size(fields, "hidden_size", origin), _size(fields, "num_attention_heads", origin)
    vocabulary = fields.get("vocab_size") or tokenizer_size
    if vocabulary is None:
        raise UserError(f"{origin}.vocab_size is not given, and no tokenizer tells it; set it to the model's")
    sizes: dict[str, Any] = {
        "num_layers": _size(fields, "num_layers", origin),
        "hidden_size": hidden,
        "ffn_hidden_size": _size(fields, "ffn_hidden_size", origin, 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": _size(fields, "num_query_groups", origin, heads),
        "kv_channels": _size(fields, "kv_channels", origin, hidden // max(heads, 1)),
        "vocab_size": _size({"vocab_size": vocabulary}, "vocab_size", origin),
        "max_position_embeddings": _size(fields, "seq_length", origin),
        "layernorm_epsilon": _number(fields, "layernorm_epsilon", origin, 1e-5),
        "rotary_base": _number(fields, "rotary_base", origin, 10000.0),
    }
    _check_window(fields.get("window_size"), sizes["max_position_embeddings"], origin)
    try:
        return Architecture(
            **sizes,
            rope_scaling=rope_scaling,
            share_embeddings_and_output_weights=fields.get("share_embeddings_and_output_weights", True) is True,
            model_type=model_type,
        )
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _check_window(window: Any, length: int, origin: str) -> None:
    """Raise UserError for an attention window that does not reach back over the whole length."""
    if window is None:
        return
    if not isinstance(window, (list, tuple)) or not window or not isinstance(window[0], int) or 0 <= window[0] < length:
        raise UserError(f"{origin}.window_size is {window!r}, seq_length {length}; only full attention is supported")


def fields_of(architecture: Architecture) -> dict[str, Any]:
    """The fields that make an architecture; what they say of rotary scaling is not common to NeMo and Bridge.

    Raises UserError for another family than Llama's, and for attention that does not reach back over the whole length.
    """
    if architecture.family != "llama":
        raise UserError(
            f"family {architecture.family!r} is not written to this format, of which llama alone is known; use hf or "
            "megatron"
        )
    if architecture.window_size is not None and architecture.window_size < architecture.max_position_embeddings:
        raise UserError(
            f"window_size {architecture.window_size} of {architecture.max_position_embeddings} positions: this format "
            "is written for full attention alone; use hf or megatron"
        )
    return {
        **_FAMILY,
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.kv_channels,
        "vocab_size": architecture.vocab_size,
        "seq_length": architecture.max_position_embeddings,
        "layernorm_epsilon": architecture.layernorm_epsilon,
        "rotary_base": architecture.rotary_base,
        "share_embeddings_and_output_weights": architecture.share_embeddings_and_output_weights,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # On by default in NeMo, and refused by Megatron-core where TransformerEngine is not installed.
        "apply_rope_fusion": False,
    }


def precision_fields(dtype: str) -> dict[str, Any]:
    """The fields that say in which data type (`bfloat16`, ...) the weights are."""
    return {"bf16": dtype == "bfloat16", "fp16": dtype == "float16", "params_dtype": f"torch.{dtype}"}


def llama3_scaling(values: Sequence[Any], origin: str) -> dict[str, Any]:
    """Rotary scaling as `Architecture.rope_scaling` has it, from the values of SCALING_KEYS. Raises UserError."""
    if not all(isinstance(value, (int, float)) and value > 0 for value in values):
        raise UserError(
            f"{origin}: rotary scaling by {list(values)}; {', '.join(SCALING_KEYS)} must be numbers above 0"
        )
    return {"rope_type": "llama3", **dict(zip(SCALING_KEYS, values, strict=True))}


def _size(fields: Mapping[str, Any], field: str, origin: str, default: int | None = None) -> int:
    found = fields.get(field)
    value = default if found is None else found
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{origin}.{field} is {found!r}; set it to the model's, a whole number")
    return value


def _number(fields: Mapping[str, Any], field: str, origin: str, default: float) -> float:
    value = fields.get(field, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UserError(f"{origin}.{field} is {value!r}; it must be a number")
    return float(value)
