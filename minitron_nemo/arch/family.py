"""What makes a model family: its tensors, what its layers compute, and how other projects name and spell it.

Every family is one module of `arch.families` that defines a `FAMILY`; no code elsewhere knows one by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minitron_nemo.errors import UserError

if TYPE_CHECKING:
    from minitron_nemo.arch.architecture import Architecture
    from minitron_nemo.arch.tensors import TensorSpec


@dataclass(frozen=True)
class HuggingFaceModel:
    """How one of Hugging Face's model types says that it is this family.

    `class_name` is the class that loads it. `keys` maps fields of Architecture to the key of `config.json` that holds
    them and to what an absent key means; the fields that all types spell alike are known elsewhere. `opposites` are the
    same for fields that are true where their key is false. `fixed` are keys for which the family computes one value
    alone; an absent key has it. `whole_heads` is whether transformers refuses a hidden size that is not a multiple of
    the number of heads, whatever `head_dim` says.
    """

    class_name: str
    keys: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]
    whole_heads: bool = False
    opposites: Mapping[str, tuple[str, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class NeMoModel:
    """How NeMo 2.7 names one of Hugging Face's model types.

    `module` has its classes and `model` is the one of the model. `configs` maps the configuration classes to the one
    that each is derived from and to what it presets beside what the family says; the first is what is written, or
    `scaled`, where there is one, with llama3's rotary scaling. `length` is the field of the number of positions.
    """

    module: str
    model: str
    configs: Mapping[str, tuple[str | None, Mapping[str, Any]]]
    scaled: str | None = None
    length: str = "seq_length"


def nemo_sizes(layers: int, hidden: int, heads: int, groups: int | None, ffn: int, **more: Any) -> dict[str, Any]:
    """What one of NeMo's configuration classes presets; None for as many query groups as heads."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
        **more,
    }


@dataclass(frozen=True)
class BridgeModel:
    """How Megatron-Bridge names one of Hugging Face's model types.

    `classes` begin the dotted names of the configuration classes that stand for it alone. `written` is the one that is
    written; None: the class that Megatron-Bridge has for many families, told apart by their features.
    """

    classes: tuple[str, ...]
    written: str | None = None


@dataclass(frozen=True)
class Family:
    """The named axes of a family's tensors and, in the names of Megatron-core's TransformerConfig, its layers.

    `table` lists all tensors of an architecture in the order of the forward pass. `hugging_face` maps each `model_type`
    that is this family to its configuration. `normalization` is "RMSNorm" or "LayerNorm" (with a bias); gains are
    stored minus one under `layernorm_zero_centered_gamma`. `activation` is "silu" or "squared_relu", of the gate where
    `gated_linear_unit` and of the product itself otherwise. `nemo` and `bridge` map a `model_type` to its names there;
    without one it is not written for NeMo, and written for Megatron-Bridge as a model that has no name. In a
    `mixture_of_experts` every layer's MLP is a router and experts; no layer has an MLP beside them. With
    `moe_shared_expert_gate` there is one more expert, which sees every token; its output is multiplied by a sigmoid.
    What reads the residual stream stands in `table` behind the norm that it reads.
    """

    table: Callable[[Architecture], tuple[TensorSpec, ...]]
    hugging_face: Mapping[str, HuggingFaceModel]
    normalization: str = "RMSNorm"
    layernorm_zero_centered_gamma: bool = False
    activation: str = "silu"
    gated_linear_unit: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    nemo: Mapping[str, NeMoModel] = field(default_factory=dict)
    bridge: Mapping[str, BridgeModel] = field(default_factory=dict)
    mixture_of_experts: bool = False
    moe_shared_expert_gate: bool = False

    @property
    def rescales_norms(self) -> bool:
        """Whether a cut may multiply the stored gains of norms by constants, and rotate the residual stream.

        Gains stored minus one do not scale like that, and LayerNorm over fewer channels has another mean as well, which
        Scores do not measure; nor does the mean over channels stay what it is in a rotation.
        """
        return self.normalization == "RMSNorm" and not self.layernorm_zero_centered_gamma


def family(name: str) -> Family:
    """The family called `name`. Raises UserError for a name that is none."""
    from minitron_nemo.arch.families import FAMILIES

    if name not in FAMILIES:
        raise UserError(f"architecture: family {name!r} is not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of_type(model_type: object, origin: str) -> tuple[str, HuggingFaceModel]:
    """Name of the family that Hugging Face's `model_type` is, and its spelling. Raises UserError naming `origin`."""
    from minitron_nemo.arch.families import FAMILIES

    for name, candidate in FAMILIES.items():
        for known, spelling in candidate.hugging_face.items():
            if known == model_type:
                return name, spelling
    known_types = ", ".join(known for candidate in FAMILIES.values() for known in candidate.hugging_face)
    raise UserError(f"{origin}: model_type {model_type!r} is not supported; known: {known_types}")
