"""Architecture <-> the `model` section of Megatron-Bridge's run_config.yaml (GPTModelProvider's fields)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_nemo.arch.architecture import SCALING_KEYS, Architecture
from minitron_nemo.arch.families import FAMILIES
from minitron_nemo.arch.family import family
from minitron_nemo.arch.transformer_config import (
    SILU,
    architecture_from_fields,
    difference,
    fields_of,
    llama3_scaling,
    precision_fields,
)
from minitron_nemo.errors import UserError

PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
# Where the classes are that stand for a model of any family.
_GENERIC = ("megatron.bridge.models.gpt_provider.", "megatron.bridge.models.gpt.")
_SQUARED_RELU = "megatron.core.activations.squared_relu"
# megatron/core/models/common/embeddings/rotary_pos_embedding.py fixes all of llama3's scaling but the factor.
_FIXED_SCALING = (1.0, 4.0, 8192)


def architecture_from_bridge(
    model: Mapping[str, Any], origin: str, tokenizer_size: int | None, model_type: str | None = None
) -> Architecture:
    """Read an Architecture from the fields of a `model` section, nested `transformer` fields included.

    `model_type` is what the model is known to be, None: what its class and features say. Raises UserError, naming
    `origin`, for a class of another family and for a feature that the family does not have.
    """
    nested = model.get("transformer")
    fields = {**model, **(nested if isinstance(nested, Mapping) else {})}
    if fields.get("activation_func") == "silu":  # how the nested form spells it
        fields["activation_func"] = SILU
    named = _model_type(str(model.get("_target_")), fields, origin)
    return architecture_from_fields(
        fields,
        origin,
        model_type=model_type or named,
        rope_scaling=megatron_scaling(fields.get("rope_scaling"), fields.get("rope_scaling_factor"), origin),
        tokenizer_size=tokenizer_size,
    )


def _model_type(target: str, fields: Mapping[str, Any], origin: str) -> str:
    """The model type that a class stands for; of those that share it, the one whose family's features are there."""
    named = {kind: names for layers in FAMILIES.values() for kind, names in layers.bridge.items()}
    for model_type, names in named.items():
        if target.startswith(names.classes):
            return model_type
    if not target.startswith(_GENERIC):
        known = ", ".join([PROVIDER, *(start + "*" for names in named.values() for start in names.classes)])
        raise UserError(f"{origin}._target_ {target} is not supported; known: {known}")
    for layers in FAMILIES.values():
        for model_type, names in layers.bridge.items():
            if names.written is None and difference(fields, layers) is None:
                return model_type
    return "llama"  # whose reader says what is different


def megatron_scaling(scaled: Any, factor: Any, origin: str) -> dict[str, Any] | None:
    """Rotary scaling as Megatron-core's `rope_scaling` (on or off) and `rope_scaling_factor` mean it."""
    return llama3_scaling((factor or 8.0, *_FIXED_SCALING), origin) if scaled else None


def bridge_model(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The `model` section for an architecture.

    Raises UserError for rotary scaling that Megatron-core does not have.
    """
    names = family(architecture.family).bridge.get(architecture.model_type)
    scaling = architecture.rope_scaling
    if scaling is not None and tuple(scaling[key] for key in SCALING_KEYS[1:]) != _FIXED_SCALING:
        raise UserError(
            f"rope_scaling {dict(scaling)}: Megatron-core fixes {', '.join(SCALING_KEYS[1:])} to {_FIXED_SCALING}; "
            "export to another format, e.g. hf"
        )
    return {
        "_target_": PROVIDER if names is None or names.written is None else names.written,
        **fields_of(architecture, _SQUARED_RELU),
        **precision_fields(dtype),
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": 1.0 if scaling is None else scaling["factor"],
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
