"""Architecture <-> the configuration classes of NeMo 2 (those of 2.7.3, nemo/collections/llm/gpt/model/).

A checkpoint's context names a class and the arguments it was made with, so what the class presets has to be known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.transformer_config import (
    SCALING_KEYS,
    SILU,
    architecture_from_fields,
    fields_of,
    llama3_scaling,
    precision_fields,
)
from minitron_nemo.errors import UserError

MODULES = {
    "llama": "nemo.collections.llm.gpt.model.llama",
    "mistral": "nemo.collections.llm.gpt.model.mistral",
}
MODEL_CLASSES = {"llama": "LlamaModel", "mistral": "MistralModel"}

_SCALING = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
_BASE = {
    "normalization": "RMSNorm",
    "activation_func": SILU,
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "share_embeddings_and_output_weights": False,
}


def _shape(layers: int, hidden: int, heads: int, groups: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
        **more,
    }


_LLAMA3 = {"rotary_base": 500_000, "seq_length": 8192}
_LLAMA31 = {"rotary_base": 500_000, "seq_length": 131072}
_LLAMA32 = {**_LLAMA31, "scale_factor": 32.0, "share_embeddings_and_output_weights": True}
_LARGE_MISTRAL = {"kv_channels": 128, "seq_length": 4096, "window_size": None, "rotary_base": 1e6}

# Class: (the class it is derived from, what it presets).
_CLASSES: dict[str, dict[str, tuple[str | None, dict[str, Any]]]] = {
    "llama": {
        "LlamaConfig": (None, {**_BASE, "seq_length": 4096}),
        "Llama2Config7B": ("LlamaConfig", _shape(32, 4096, 32, 32, 11008)),
        "Llama2Config13B": ("LlamaConfig", _shape(40, 5120, 40, 40, 13824)),
        "Llama2Config70B": ("LlamaConfig", _shape(80, 8192, 64, 8, 28672)),
        "CodeLlamaConfig7B": ("Llama2Config7B", {"rotary_base": 1_000_000, "seq_length": 16384}),
        "CodeLlamaConfig13B": ("Llama2Config13B", {"rotary_base": 1_000_000, "seq_length": 16384}),
        "CodeLlamaConfig34B": (
            "LlamaConfig",
            _shape(48, 8192, 64, 8, 22016, rotary_base=1_000_000, seq_length=16384),
        ),
        "CodeLlamaConfig70B": ("Llama2Config70B", {}),
        "Llama3Config": ("LlamaConfig", {"num_query_groups": 8}),
        "Llama3Config8B": ("Llama3Config", _shape(32, 4096, 32, 8, 14336, **_LLAMA3)),
        "Llama3Config70B": ("Llama3Config", _shape(80, 8192, 64, 8, 28672, **_LLAMA3)),
        "Llama31Config": ("Llama3Config", dict(zip(_SCALING, (8.0, 1.0, 4.0, 8192), strict=True))),
        "Llama31Config8B": ("Llama31Config", _shape(32, 4096, 32, 8, 14336, **_LLAMA31)),
        "Llama31Config70B": ("Llama31Config", _shape(80, 8192, 64, 8, 28672, **_LLAMA31)),
        "Llama31Config405B": ("Llama31Config", _shape(126, 16384, 128, 8, 53248, **_LLAMA31)),
        "Llama32Config1B": ("Llama31Config", _shape(16, 2048, 32, 8, 8192, **_LLAMA32)),
        "Llama32Config3B": ("Llama31Config", _shape(28, 3072, 24, 8, 8192, **_LLAMA32)),
    },
    "mistral": {
        "MistralConfig7B": (
            None,
            {**_BASE, **_shape(32, 4096, 32, 8, 14336, seq_length=32768, window_size=[4096, 0])},
        ),
        "MistralNeMoConfig12B": ("MistralConfig7B", {"num_layers": 40, "hidden_size": 5120, **_LARGE_MISTRAL}),
        "MistralNeMoConfig123B": ("MistralConfig7B", _shape(88, 12288, 96, 8, 28672, **_LARGE_MISTRAL)),
        "MistralSmall3Config24B": (
            "MistralConfig7B",
            _shape(40, 5120, 32, 8, 32768, kv_channels=128, seq_length=32768, window_size=None, rotary_base=1e8),
        ),
    },
}


def presets(class_name: str) -> tuple[str, dict[str, Any]]:
    """`model_type` of a configuration class, given by its dotted name, and the fields it presets. Raises UserError."""
    module, _, name = class_name.rpartition(".")
    for model_type, classes in _CLASSES.items():
        if module == MODULES[model_type] and name in classes:
            parent, fields = classes[name]
            inherited = {} if parent is None else presets(f"{module}.{parent}")[1]
            return model_type, {**inherited, **fields}
    known = ", ".join(name for classes in _CLASSES.values() for name in classes)
    raise UserError(f"{class_name} is not supported; known: {known}")


def architecture_from_nemo(
    class_name: str, arguments: Mapping[str, Any], origin: str, tokenizer_size: int | None
) -> Architecture:
    """Read an Architecture from a configuration class and the arguments it was made with.

    Raises UserError, naming `origin`, for a class that is not known and for a feature that the family does not have.
    """
    try:
        model_type, fields = presets(class_name)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    fields = {**fields, **arguments}
    scaling = llama3_scaling([fields[field] for field in _SCALING], origin) if _SCALING[0] in fields else None
    return architecture_from_fields(
        fields, origin, model_type=model_type, rope_scaling=scaling, tokenizer_size=tokenizer_size
    )


def nemo_config(architecture: Architecture, dtype: str) -> tuple[str, dict[str, Any]]:
    """Dotted name of the configuration class for an architecture, and its arguments.

    Raises UserError for what `fields_of` refuses and for what NeMo's Mistral cannot be: its exporter knows neither tied
    weights nor rotary scaling.
    """
    fields = fields_of(architecture) | precision_fields(dtype)
    module = MODULES[architecture.model_type]
    if architecture.model_type == "mistral":
        if architecture.share_embeddings_and_output_weights or architecture.rope_scaling:
            raise UserError(
                "NeMo's Mistral has neither tied embeddings nor rotary scaling; export to another format, e.g. hf"
            )
        return f"{module}.MistralConfig7B", fields | {"window_size": None, "cp_comm_type": None}
    if architecture.rope_scaling is None:
        return f"{module}.LlamaConfig", fields
    scaling = [architecture.rope_scaling[key] for key in SCALING_KEYS]
    return f"{module}.Llama31Config", fields | dict(zip(_SCALING, scaling, strict=True))
