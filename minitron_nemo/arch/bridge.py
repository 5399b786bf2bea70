"""Architecture <-> the `model` section of Megatron-Bridge's run_config.yaml (GPTModelProvider's fields)."""

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

PROVIDERS = {
    "llama": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "mistral": "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider",
}
# Where the classes are that a `model` section of the family may name.
_MODULES = tuple(f"megatron.bridge.models.{name}." for name in ("gpt_provider", "gpt", "llama", "mistral"))
# megatron/core/models/common/embeddings/rotary_pos_embedding.py fixes all of llama3's scaling but the factor.
_FIXED_SCALING = (1.0, 4.0, 8192)


def architecture_from_bridge(model: Mapping[str, Any], origin: str, tokenizer_size: int | None) -> Architecture:
    """Read an Architecture from the fields of a `model` section, nested `transformer` fields included.

    Raises UserError, naming `origin`, for a class of another family and for a feature that the family does not have.
    """
    nested = model.get("transformer")
    fields = {**model, **(nested if isinstance(nested, Mapping) else {})}
    target = str(model.get("_target_"))
    if not target.startswith(_MODULES):
        raise UserError(f"{origin}._target_ {target} is not supported; known: {', '.join(PROVIDERS.values())}")
    if fields.get("activation_func") == "silu":  # how the nested form spells it
        fields["activation_func"] = SILU
    return architecture_from_fields(
        fields,
        origin,
        model_type="mistral" if ".mistral." in target else "llama",
        rope_scaling=megatron_scaling(fields.get("rope_scaling"), fields.get("rope_scaling_factor"), origin),
        tokenizer_size=tokenizer_size,
    )


def megatron_scaling(scaled: Any, factor: Any, origin: str) -> dict[str, Any] | None:
    """Rotary scaling as Megatron-core's `rope_scaling` (on or off) and `rope_scaling_factor` mean it."""
    return llama3_scaling((factor or 8.0, *_FIXED_SCALING), origin) if scaled else None


def bridge_model(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The `model` section for an architecture.

    Raises UserError for what `fields_of` refuses and for rotary scaling that Megatron-core does not have.
    """
    fields, scaling = fields_of(architecture), architecture.rope_scaling
    if scaling is not None and tuple(scaling[key] for key in SCALING_KEYS[1:]) != _FIXED_SCALING:
        raise UserError(
            f"rope_scaling {dict(scaling)}: Megatron-core fixes {', '.join(SCALING_KEYS[1:])} to {_FIXED_SCALING}; "
            "export to another format, e.g. hf"
        )
    return {
        "_target_": PROVIDERS[architecture.model_type],
        **fields,
        **precision_fields(dtype),
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": 1.0 if scaling is None else scaling["factor"],
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
