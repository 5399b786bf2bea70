"""Named axes: what each dimension of a weight tensor means.

An **axis** is a dimension of the model (`hidden_size`, heads); a **dim** is a dimension of a tensor. A dim lays
entries of an axis out in rows: one row an entry (`AxisDim`), one block of rows per projection (`GatedDim`),
`kv_channels` rows a head (`HeadsDim`), or the interleaving of queries, keys and values by query group (`QKVDim`). The
channels within a head are no axis: a dim of them (`KVChannelsDim`) is never cut, nor is a single row (`OneDim`).
Given the entries of an axis that are kept, a dim says which of its rows are kept; that is all pruning needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from minitron_nemo.arch.architecture import Architecture

Indices = NDArray[np.int64]


class Axis(StrEnum):
    """The dimensions of a model, spelled as Megatron-core spells their sizes."""

    HIDDEN = "hidden_size"
    FFN = "ffn_hidden_size"
    EXPERTS = "num_moe_experts"
    MOE_FFN = "moe_ffn_hidden_size"
    SHARED_FFN = "moe_shared_expert_intermediate_size"
    HEADS = "num_attention_heads"
    GROUPS = "num_query_groups"
    LAYERS = "num_layers"
    VOCAB = "vocab_size"

    @property
    def per_layer(self) -> bool:
        """Whether each layer has its own entries of this axis (its FFN neurons) or all share them (hidden channels).

        Of `moe_ffn_hidden_size`, each expert of a layer has its own.
        """
        return self not in (Axis.HIDDEN, Axis.LAYERS, Axis.VOCAB)


class Dim(Protocol):
    """One dimension of a tensor."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes whose entries make up this dim."""

    def size(self, architecture: Architecture) -> int:
        """Number of rows."""

    def select(self, architecture: Architecture, kept: Mapping[Axis, Indices]) -> Indices | None:
        """Ascending rows that survive when only `kept` entries do; None when no axis of this dim is cut."""


@dataclass(frozen=True)
class AxisDim:
    """One row per entry of an axis."""

    axis: Axis

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.axis,)

    def size(self, architecture: Architecture) -> int:
        return architecture.size(self.axis)

    def select(self, architecture: Architecture, kept: Mapping[Axis, Indices]) -> Indices | None:
        return kept.get(self.axis)


@dataclass(frozen=True)
class GatedDim:
    """`[gate; up]`: every entry of the axis has one row in the first half and one in the second."""

    axis: Axis

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.axis,)

    def size(self, architecture: Architecture) -> int:
        return 2 * architecture.size(self.axis)

    def select(self, architecture: Architecture, kept: Mapping[Axis, Indices]) -> Indices | None:
        if self.axis not in kept:
            return None
        return np.concatenate([kept[self.axis], kept[self.axis] + architecture.size(self.axis)])


@dataclass(frozen=True)
class HeadsDim:
    """`kv_channels` rows per attention head, heads ordered by query group."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (Axis.HEADS,)

    def size(self, architecture: Architecture) -> int:
        return architecture.num_attention_heads * architecture.kv_channels

    def select(self, architecture: Architecture, kept: Mapping[Axis, Indices]) -> Indices | None:
        if Axis.HEADS not in kept:
            return None
        channels = np.arange(architecture.kv_channels)
        return (kept[Axis.HEADS][:, None] * architecture.kv_channels + channels).reshape(-1)


@dataclass(frozen=True)
class KVChannelsDim:
    """One row per channel of a head, the same for all heads."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        return ()

    def size(self, architecture: Architecture) -> int:
        return architecture.kv_channels

    def select(self, architecture: Architecture, kept: Mapping[Axis, Indices]) -> Indices | None:
        return None


@dataclass(frozen=True)
class OneDim:
    """A single row."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        return ()

    def size(self, architecture: Architecture) -> int:
        return 1

    def select(self, architecture: Architecture, kept: Mapping[Axis, Indices]) -> Indices | None:
        return None


@dataclass(frozen=True)
class QKVDim:
    """For each query group: the rows of its query heads, then of its key, then of its value."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (Axis.HEADS, Axis.GROUPS)

    def size(self, architecture: Architecture) -> int:
        return (architecture.num_attention_heads + 2 * architecture.num_query_groups) * architecture.kv_channels

    def select(self, architecture: Architecture, kept: Mapping[Axis, Indices]) -> Indices | None:
        if Axis.HEADS not in kept:
            return None
        heads_per_group = architecture.heads_per_group
        groups = kept.get(Axis.GROUPS, np.arange(architecture.num_query_groups))
        slots = groups[:, None] * (heads_per_group + 2)
        key_and_value = (slots + heads_per_group + np.arange(2)).reshape(-1)  # slot = kv_channels rows
        queries = kept[Axis.HEADS] // heads_per_group * 2 + kept[Axis.HEADS]
        kept_slots = np.sort(np.concatenate([queries, key_and_value]))
        channels = np.arange(architecture.kv_channels)
        return (kept_slots[:, None] * architecture.kv_channels + channels).reshape(-1)

    def query_rows(self, architecture: Architecture, head: int) -> Indices:
        """The rows of one head's query."""
        slot = head // architecture.heads_per_group * 2 + head
        return slot * architecture.kv_channels + np.arange(architecture.kv_channels)
