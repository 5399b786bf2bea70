"""Parameter and FLOP counts, from the family's table alone."""

from __future__ import annotations

from collections import Counter
from math import prod

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Axis
from minitron_nemo.arch.tensors import table


def parameters_by_part(architecture: Architecture) -> dict[str, int]:
    """Parameters of `embedding`, `attention`, `norm`, `mlp` or `router` and `experts`, and, if not tied, `output`."""
    counts: Counter[str] = Counter()
    for spec in table(architecture):
        counts[spec.part] += prod(spec.stacked_shape(architecture))
    return dict(counts)


def parameters(architecture: Architecture) -> int:
    """All parameters; a tied output weight counts once."""
    return sum(parameters_by_part(architecture).values())


def active_parameters(architecture: Architecture) -> int:
    """Parameters that a token meets: of a mixture of experts, those of `moe_router_topk` experts a layer alone."""
    parts = parameters_by_part(architecture)
    return sum(_active(part, count, architecture) for part, count in parts.items())


def _active(part: str, count: int, architecture: Architecture) -> int:
    """Of `count` parameters of a part, those that a token meets."""
    if part != "experts":
        return count
    return count // architecture.size(Axis.EXPERTS) * (architecture.moe_router_topk or 0)


def non_embedding_parameters(architecture: Architecture) -> int:
    """Parameters without the embedding and without an output weight of its own."""
    parts = parameters_by_part(architecture)
    return sum(count for part, count in parts.items() if part not in ("embedding", "output"))


def forward_flops_per_token(architecture: Architecture, sequence_length: int) -> int:
    """FLOPs of one token's forward pass at the mean causal context of `sequence_length`: arithmetic, not measured.

    Two per multiply-add of every matrix that a token meets incl. the output projection, plus scores and values of
    attention (2 x 2 x context x heads x kv_channels a layer, context = sequence_length / 2, or less where attention has
    a window). A backward pass costs twice this.
    """
    matrices = sum(
        _active(spec.part, prod(spec.stacked_shape(architecture)), architecture)
        for spec in table(architecture)
        if spec.part in ("attention", "mlp", "router", "experts") and len(spec.dims) > 1
    )
    linear = 2 * (matrices + architecture.vocab_size * architecture.hidden_size)
    window = min(architecture.window_size or sequence_length, sequence_length)
    twice_context = 2 * window - window**2 // sequence_length  # the first tokens have less than a window before them
    per_layer = 2 * twice_context * architecture.num_attention_heads * architecture.kv_channels
    return linear + architecture.num_layers * per_layer
