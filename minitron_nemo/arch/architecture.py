"""`Architecture`: the shape of a model, in Megatron-core's names. No weights, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any

from minitron_nemo.arch.axes import Axis
from minitron_nemo.arch.family import family
from minitron_nemo.errors import UserError

FILE_NAME = "architecture.json"
SCHEMA_VERSION = 1
# The numbers of `rope_scaling`.
SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# By the type of a field: what a value of it must be, and whether one is. True and false are no numbers here.
VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number, at least 1", lambda value: type(value) is int and value >= 1),
    "float": ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < inf),
    "bool": ("true or false", lambda value: type(value) is bool),
    "str": ("a name", lambda value: type(value) is str),
    "Mapping[str, Any]": ("keys with values", lambda value: isinstance(value, Mapping)),
}


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder-only transformer of one family.

    `kv_channels` is the size of one attention head and need not be `hidden_size / num_attention_heads`.
    `rope_scaling` is None or Hugging Face's llama3 mapping (`rope_type`, `factor`, `low_freq_factor`,
    `high_freq_factor`, `original_max_position_embeddings`). `rotary_percent` is the share, up to 1, of a head's
    channels that turn with the position; `window_size` is the number of tokens that attention reaches back to, the
    token itself included, None for all. `model_type` is the name Hugging Face gives the model (`llama`, `mistral`):
    one family here may have several.

    A mixture of experts has `num_moe_experts` of `moe_ffn_hidden_size` neurons in every layer, `moe_router_topk` of
    which see a token; `ffn_hidden_size` is the same as `moe_ffn_hidden_size` then. The router's weights of a token are
    the softmax over the experts that see it, or under `moe_router_pre_softmax` over all experts. A shared expert, which
    sees all tokens, has `moe_shared_expert_intermediate_size` neurons.

    Raises UserError for a field of another type or out of its range, sizes that do not fit together and an unknown
    family.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: Mapping[str, Any] | None = None
    window_size: int | None = None
    share_embeddings_and_output_weights: bool = False
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int | None = None
    moe_router_pre_softmax: bool = False
    moe_shared_expert_intermediate_size: int | None = None
    family: str = "llama"
    model_type: str = "llama"

    def __post_init__(self) -> None:
        self._check_values()
        experts, shared = family(self.family).mixture_of_experts, family(self.family).moe_shared_expert_gate
        needed = dict.fromkeys(("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk"), experts)
        for name, has in (needed | {"moe_shared_expert_intermediate_size": shared}).items():
            if (getattr(self, name) is not None) != has:
                wanted = "needs a number" if has else "has no such experts"
                raise UserError(f"architecture: {name} is {getattr(self, name)}, and family {self.family!r} {wanted}")
        if experts:
            self._check_experts()
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"architecture: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        if int(self.kv_channels * self.rotary_percent) % 2:
            raise UserError(
                f"architecture: kv_channels {self.kv_channels} x rotary_percent {self.rotary_percent:g} is odd; "
                f"rotary embeddings need pairs"
            )
        if self.model_type not in (known := family(self.family).hugging_face):
            raise UserError(
                f"architecture: model_type {self.model_type!r} is not one of family {self.family!r}: {', '.join(known)}"
            )

    def _check_values(self) -> None:
        """Raise UserError for a field that is wrong by itself."""
        for field in fields(self):
            value, optional = getattr(self, field.name), str(field.type).endswith(" | None")
            wanted, right = VALUES[str(field.type).removesuffix(" | None")]
            if not (right(value) or (optional and value is None)):
                raise UserError(
                    f"architecture: {field.name} is {value!r}; it must be {wanted}{', or null' if optional else ''}"
                )
        if self.rotary_percent > 1:
            raise UserError(f"architecture: rotary_percent is {self.rotary_percent:g}; it must be a share, up to 1")
        if self.rope_scaling is not None:
            wanted, right = VALUES["float"]
            for key in SCALING_KEYS:
                if not right(value := self.rope_scaling.get(key)):
                    raise UserError(f"architecture: rope_scaling: {key} is {value!r}; it must be {wanted}")

    def _check_experts(self) -> None:
        if not 1 <= (self.moe_router_topk or 0) <= self.size(Axis.EXPERTS):
            raise UserError(
                f"architecture: moe_router_topk {self.moe_router_topk} is not from 1 to num_moe_experts "
                f"{self.num_moe_experts}"
            )
        if self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            raise UserError(
                "architecture: moe_router_topk is 1 and moe_router_pre_softmax is false: every router weight would be "
                "1, which Megatron-core refuses"
            )
        if self.ffn_hidden_size != self.moe_ffn_hidden_size:
            raise UserError(
                f"architecture: ffn_hidden_size {self.ffn_hidden_size} is not moe_ffn_hidden_size "
                f"{self.moe_ffn_hidden_size}; layers without experts are not supported"
            )

    def has(self, axis: Axis) -> bool:
        """Whether tensors of the family have this axis: an MLP is either whole or made of experts."""
        traits = family(self.family)
        if axis == Axis.SHARED_FFN:
            return traits.moe_shared_expert_gate
        of_experts = {Axis.EXPERTS: True, Axis.MOE_FFN: True, Axis.FFN: False}
        return of_experts.get(axis) in (None, traits.mixture_of_experts)

    def size(self, axis: Axis) -> int:
        """Number of entries on an axis; 0 where the family has not this axis."""
        return int(getattr(self, axis.value) or 0) if self.has(axis) else 0

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    def resized(self, sizes: Mapping[Axis, int]) -> Architecture:
        """The same architecture with other axis sizes."""
        changes: dict[str, Any] = {axis.value: size for axis, size in sizes.items()}
        if Axis.MOE_FFN in sizes:
            changes["ffn_hidden_size"] = sizes[Axis.MOE_FFN]
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any], origin: str = "architecture") -> Architecture:
        """Inverse of `to_dict`. Raises UserError naming `origin` for a missing, unknown, newer or wrong field."""
        known = {field.name for field in fields(Architecture)}
        given = {key: value for key, value in data.items() if key != "schema_version"}
        if data.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise UserError(f"{origin}: schema_version {data['schema_version']} is not {SCHEMA_VERSION}")
        if unknown := sorted(set(given) - known):
            raise UserError(f"{origin}: unknown key {unknown[0]!r}")
        if missing := [
            field.name for field in fields(Architecture) if field.default is MISSING and field.name not in given
        ]:
            raise UserError(f"{origin}: key {missing[0]!r} is missing")
        try:
            return Architecture(**given)
        except UserError as error:
            raise UserError(f"{origin}: {str(error).removeprefix('architecture: ')}") from None

    def save(self, directory: Path) -> None:
        (directory / FILE_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def load(directory: Path) -> Architecture:
        """Inverse of `save`. Raises UserError for what is not there, or damaged."""
        path = directory / FILE_NAME
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: not found; is {directory} a checkpoint?") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; copy it again") from None
        except ValueError as error:  # of JSON, or of UTF-8
            raise UserError(f"{path}: not valid JSON: {error}; copy it again") from None
        if not isinstance(data, dict):
            raise UserError(f"{path}: expected a JSON object; copy it again")
        return Architecture.from_dict(data, str(path))
