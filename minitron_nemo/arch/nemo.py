"""Architecture <-> the configuration classes of NeMo 2 (those of 2.7.3, nemo/collections/llm/gpt/model/).

A checkpoint's context names a class and the arguments it was made with, so what the class presets has to be known: the
families say it (`NeMoModel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_nemo.arch.architecture import SCALING_KEYS, Architecture
from minitron_nemo.arch.families import FAMILIES
from minitron_nemo.arch.family import NeMoModel, family, family_of_type
from minitron_nemo.arch.transformer_config import (
    architecture_from_fields,
    features,
    fields_of,
    llama3_scaling,
    precision_fields,
)
from minitron_nemo.errors import UserError

_SCALING = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
_SQUARED_RELU = "nemo.collections.llm.fn.activation.squared_relu"


def presets(class_name: str) -> tuple[str, dict[str, Any]]:
    """`model_type` of a configuration class, given by its dotted name, and the fields it presets. Raises UserError."""
    module, _, name = class_name.rpartition(".")
    for layers in FAMILIES.values():
        for model_type, names in layers.nemo.items():
            if module == names.module and name in names.configs:
                parent, fields = names.configs[name]
                if parent is not None:
                    return model_type, {**presets(f"{module}.{parent}")[1], **fields}
                own = {
                    field: supported for field, (supported, default) in features(layers).items() if supported != default
                }
                return model_type, {**own, "share_embeddings_and_output_weights": False, **fields}
    known = ", ".join(name for layers in FAMILIES.values() for names in layers.nemo.values() for name in names.configs)
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
    length = family(family_of_type(model_type, origin)[0]).nemo[model_type].length
    return architecture_from_fields(
        fields, origin, model_type=model_type, rope_scaling=scaling, tokenizer_size=tokenizer_size, length=length
    )


def nemo_model(architecture: Architecture) -> NeMoModel:
    """The names of an architecture's classes. Raises UserError for a model that NeMo has no classes for."""
    names = family(architecture.family).nemo.get(architecture.model_type)
    if names is None:
        raise UserError(f"NeMo has no classes for {architecture.model_type}; export to another format, e.g. hf")
    return names


def nemo_config(architecture: Architecture, dtype: str) -> tuple[str, dict[str, Any]]:
    """Dotted name of the configuration class for an architecture, and its arguments.

    Raises UserError for what NeMo has no class for: most models with rotary scaling.
    """
    names = nemo_model(architecture)
    fields = fields_of(architecture, _SQUARED_RELU) | precision_fields(dtype)
    fields[names.length] = architecture.max_position_embeddings
    if architecture.rope_scaling is None:
        return f"{names.module}.{next(iter(names.configs))}", fields
    if names.scaled is None:
        raise UserError(f"NeMo's {names.model} has no rotary scaling; export to another format, e.g. hf")
    scaling = [architecture.rope_scaling[key] for key in SCALING_KEYS]
    return f"{names.module}.{names.scaled}", fields | dict(zip(_SCALING, scaling, strict=True))
