"""Architecture <-> the fields of Megatron-core's TransformerConfig, as NeMo 2 and Megatron-Bridge keep them.

A configuration comes here as a mapping of field names to plain values; classes, functions and data types in it are
their dotted names (`torch.nn.functional.silu`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minitron_nemo.arch.architecture import SCALING_KEYS, Architecture
from minitron_nemo.arch.family import Family, family, family_of_type
from minitron_nemo.errors import UserError

SILU = "torch.nn.functional.silu"
# Where the functions are that families call `activation`.
ACTIVATIONS = {
    SILU: "silu",
    "megatron.core.activations.squared_relu": "squared_relu",
    "nemo.collections.llm.fn.activation.squared_relu": "squared_relu",
    "megatron.bridge.models.nemotron.nemotron_bridge.squared_relu": "squared_relu",
    "megatron.bridge.models.nemotron.nemotron_provider.squared_relu": "squared_relu",
}


def features(layers: Family) -> dict[str, tuple[Any, Any]]:
    """A family in these fields: what it has, and what a missing field means in GPTConfig and GPTModelProvider."""
    return {
        "normalization": (layers.normalization, "LayerNorm"),
        "activation_func": (layers.activation, "gelu"),
        "gated_linear_unit": (layers.gated_linear_unit, False),
        "add_bias_linear": (False, True),
        "add_qkv_bias": (layers.add_qkv_bias, False),
        "qk_layernorm": (layers.qk_layernorm, False),
        "layernorm_zero_centered_gamma": (layers.layernorm_zero_centered_gamma, False),
        "apply_residual_connection_post_layernorm": (False, False),
        "multi_latent_attention": (False, False),
        "softmax_type": ("vanilla", "vanilla"),
        "num_moe_experts": (None, None),
        "position_embedding_type": ("rope", "learned_absolute"),
        "rotary_interleaved": (False, False),
        "seq_len_interpolation_factor": (None, None),
    }


def difference(fields: Mapping[str, Any], layers: Family) -> tuple[str, Any, Any] | None:
    """The first field in which a configuration is not of a family, what it says, and what the family has."""
    for field, (supported, default) in features(layers).items():
        found = fields.get(field, default)
        if field == "activation_func":
            found = ACTIVATIONS.get(str(found), found)
        if found != supported:
            return field, found, supported
    return None


def architecture_from_fields(
    fields: Mapping[str, Any],
    origin: str,
    *,
    model_type: str,
    rope_scaling: Mapping[str, Any] | None,
    tokenizer_size: int | None,
    length: str = "seq_length",
) -> Architecture:
    """Read an Architecture from the fields of a configuration; `origin` is what messages call it.

    `tokenizer_size` stands in for a vocabulary that is not given; `length` is the field of the number of positions.
    Raises UserError for another family, a feature that the family does not have, and a size that is missing or no
    whole number.
    """
    name, spelling = family_of_type(model_type, origin)
    if (unlike := difference(fields, family(name))) is not None:
        field, found, supported = unlike
        raise UserError(f"{origin}.{field} is {found!r}; only {supported!r} is supported for {model_type}")
    hidden, heads = _size(fields, "hidden_size", origin), _size(fields, "num_attention_heads", origin)
    vocabulary = fields.get("vocab_size") or tokenizer_size
    if vocabulary is None:
        raise UserError(f"{origin}.vocab_size is not given, and no tokenizer tells it; set it to the model's")
    positions = _size(fields, length, origin)
    sizes: dict[str, Any] = {
        "num_layers": _size(fields, "num_layers", origin),
        "hidden_size": hidden,
        "ffn_hidden_size": _size(fields, "ffn_hidden_size", origin, 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": _size(fields, "num_query_groups", origin, heads),
        "kv_channels": _size(fields, "kv_channels", origin, hidden // max(heads, 1)),
        "vocab_size": _size({"vocab_size": vocabulary}, "vocab_size", origin),
        "max_position_embeddings": positions,
        "layernorm_epsilon": _number(fields, "layernorm_epsilon", origin, 1e-5),
        "rotary_base": _number(fields, "rotary_base", origin, 10000.0),
        "rotary_percent": _number(fields, "rotary_percent", origin, 1.0),
        "window_size": _window(fields.get("window_size"), positions, origin),
    }
    for field, whole in (("rotary_percent", 1.0), ("window_size", None)):
        if field not in spelling.keys and sizes[field] != whole:
            raise UserError(f"{origin}.{field} is {fields[field]!r}; only {whole} is supported for {model_type}")
    try:
        return Architecture(
            **sizes,
            rope_scaling=rope_scaling,
            share_embeddings_and_output_weights=fields.get("share_embeddings_and_output_weights", True) is True,
            family=name,
            model_type=model_type,
        )
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _window(window: Any, length: int, origin: str) -> int | None:
    """`Architecture.window_size` of [tokens to the left, tokens to the right]; None where it covers the whole length.

    NeMo and Megatron-Bridge put Hugging Face's `sliding_window` there as it is, though it counts the token itself.
    """
    if window is None:
        return None
    whole = isinstance(window, (list, tuple)) and len(window) == 2 and all(type(reach) is int for reach in window)
    if not whole or window[1] > 0:
        raise UserError(f"{origin}.window_size is {window!r}; set it to [tokens, 0], or null for full attention")
    return window[0] if 0 <= window[0] < length else None


def fields_of(architecture: Architecture, squared_relu: str) -> dict[str, Any]:
    """The fields that make an architecture; what they say of rotary scaling is not common to NeMo and Bridge.

    `squared_relu` is the dotted name of that function there. Raises UserError for a mixture of experts.
    """
    if family(architecture.family).mixture_of_experts:
        raise UserError(
            f"{architecture.model_type}: mixtures of experts are not written for NeMo and Megatron-Bridge; "
            f"use another format, e.g. hf"
        )
    spelling = family(architecture.family).hugging_face[architecture.model_type]
    own = {
        field: supported
        for field, (supported, default) in features(family(architecture.family)).items()
        if supported != default
    }
    own["activation_func"] = {"silu": SILU, "squared_relu": squared_relu}[own["activation_func"]]
    if "rotary_percent" in spelling.keys:
        own["rotary_percent"] = architecture.rotary_percent
    if "window_size" in spelling.keys:
        window = architecture.window_size
        own["window_size"] = None if window is None else [window, 0]
        own["cp_comm_type"] = None if window is None else "a2a"  # the only one for windows in TransformerEngine
    return {
        **own,
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
