"""What a shape costs to keep and to run: arithmetic on the family's tables, nothing is measured.

memory    parameters x bytes + keys and values; activations, of one token a sequence while generating, are left out
latency   of one batch, by a roofline: every pass takes what is longer, its arithmetic or its traffic

    time of a pass = max(FLOPs / peak_flops, bytes / bandwidth)
    latency        = one pass over the prompt + one for each new token after the first

A pass reads every weight once (of the embedding only the tokens' rows, unless it is the output weight too; of a mixture
the experts that see one of its tokens), and the keys and values before it. Logits are those of the last position.
Kernels reach less than the roofline: it ranks shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.counts import (
    active_parameters,
    forward_flops_per_token,
    non_embedding_parameters,
    parameters,
    parameters_by_part,
)
from minitron_nemo.config import ServingConfig

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Costs:
    """Of one shape. `active_parameters` are those that a token meets: of a mixture fewer than all.

    `latency_seconds` is None where `search.serving` gives no device.
    """

    parameters: int
    active_parameters: int
    non_embedding_parameters: int
    memory_bytes: int
    latency_seconds: float | None


def costs(architecture: Architecture, serving: ServingConfig) -> Costs:
    """All costs of a shape."""
    timed = serving.peak_flops is not None and serving.bandwidth is not None
    return Costs(
        parameters(architecture),
        active_parameters(architecture),
        non_embedding_parameters(architecture),
        memory_bytes(architecture, serving),
        latency_seconds(architecture, serving) if timed else None,
    )


def memory_bytes(architecture: Architecture, serving: ServingConfig) -> int:
    """Weights, and the keys and values of a full batch at its end; a tied output weight counts once."""
    context = serving.prompt_tokens + serving.new_tokens
    weights = parameters(architecture) * BYTES[serving.dtype]
    return weights + serving.batch_size * key_value_bytes(architecture, context, serving.dtype)


def key_value_bytes(architecture: Architecture, context: int, dtype: str) -> int:
    """Of one sequence: 2 x layers x num_query_groups x kv_channels x tokens x bytes; at most window_size tokens."""
    tokens = context if architecture.window_size is None else min(context, architecture.window_size)
    return tokens * _key_value_bytes_per_token(architecture, dtype)


def latency_seconds(architecture: Architecture, serving: ServingConfig) -> float:
    """Seconds from a batch of prompts to the last of its new tokens, by the roofline of `serving`.

    `serving.peak_flops` and `serving.bandwidth` must be given.
    """
    assert serving.peak_flops is not None and serving.bandwidth is not None
    a, batch, prompt = architecture, serving.batch_size, serving.prompt_tokens
    item = BYTES[serving.dtype]
    logits = 2 * a.vocab_size * a.hidden_size
    prefill = batch * (prompt * (forward_flops_per_token(a, prompt) - logits) + logits)
    first = max(prefill / serving.peak_flops, _read_parameters(a, batch * prompt) * item / serving.bandwidth)
    # Tokens that each further pass attends to, its own included.
    contexts = np.arange(prompt + 1, prompt + serving.new_tokens, dtype=np.float64)
    if a.window_size is not None:
        contexts = np.minimum(contexts, a.window_size)
    per_context = 4 * a.num_layers * a.num_attention_heads * a.kv_channels  # FLOPs: scores and values
    linear = forward_flops_per_token(a, 1) - per_context // 2
    flops = batch * (linear + per_context * contexts)
    traffic = _read_parameters(a, batch) * item + batch * contexts * _key_value_bytes_per_token(a, serving.dtype)
    passes = np.maximum(flops / serving.peak_flops, traffic / serving.bandwidth)
    return first + float(passes.sum())


def _key_value_bytes_per_token(architecture: Architecture, dtype: str) -> int:
    return 2 * architecture.num_layers * architecture.num_query_groups * architecture.kv_channels * BYTES[dtype]


def _read_parameters(architecture: Architecture, tokens: int) -> float:
    """Parameters that a pass over so many tokens reads: all but an embedding that is no output weight.

    Of a mixture those experts that see a token, as many as are expected when the router favours none: an expert is not
    one of the `moe_router_topk` of a token with probability 1 - moe_router_topk / num_moe_experts.
    """
    parts = parameters_by_part(architecture)
    read: float = sum(parts.values())
    if not architecture.share_embeddings_and_output_weights:
        read -= parts["embedding"]
    if experts := architecture.size(Axis.EXPERTS):
        read -= parts["experts"] * (1 - (architecture.moe_router_topk or 0) / experts) ** tokens
    return read
