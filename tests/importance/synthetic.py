"""Scores with random moments, for tests that need no model."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitron_nemo.arch import Architecture
from minitron_nemo.importance.scores import Scores


def architecture(**sizes: Any) -> Architecture:
    shape = {
        "num_layers": 6,
        "hidden_size": 10,
        "ffn_hidden_size": 12,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 4,
        "vocab_size": 32,
        "max_position_embeddings": 64,
    }
    return Architecture(**{**shape, **sizes})


def scores_from(values: dict[str, np.ndarray], shape: Architecture, sequences: int = 7) -> Scores:
    """Scores from per-sequence values: `hidden` [sequences, 3, 2L, h], `ffn` and `heads` [sequences, 3, L, n].

    `layers`, `squares`, `columns` and, where there are any, `experts` are taken as they are.
    """
    moments = {name: np.stack([values[name].sum(0), (values[name] ** 2).sum(0)]) for name in ("hidden", "ffn", "heads")}
    return Scores(
        architecture=shape,
        block_influence=values["layers"],
        norm_squares=values["squares"],
        ffn_column_norms=values["columns"],
        experts=values.get("experts", np.zeros((shape.num_layers, 0))),
        routed=np.ones(values.get("experts", np.zeros((shape.num_layers, 0))).shape),
        shared_expert=np.zeros((2, 3, shape.num_layers, 0)),
        shared_expert_column_norms=np.zeros((shape.num_layers, 0)),
        sequences=sequences,
        tokens=sequences * 5,
        model_fingerprint="m" * 64,
        data_fingerprint="d" * 64,
        settings={"precision": "fp32"},
        **moments,
    )


def random_values(shape: Architecture, seed: int = 0, sequences: int = 7) -> dict[str, np.ndarray]:
    """Of a mixture each expert's; one with a shared expert has more than these."""
    generator = np.random.default_rng(seed)
    layers, experts = shape.num_layers, () if shape.num_moe_experts is None else (shape.num_moe_experts,)
    return {
        "hidden": generator.random((sequences, 3, 2 * layers, shape.hidden_size)),
        "ffn": generator.random((sequences, 3, layers, *experts, shape.ffn_hidden_size)),
        "heads": generator.random((sequences, 3, layers, shape.num_attention_heads)),
        "layers": generator.random(layers),
        "squares": generator.random((2 * layers + 1 if shape.family != "nemotron" else 0, shape.hidden_size)),
        "columns": generator.random((layers, *experts, shape.ffn_hidden_size)),
        "experts": generator.random((layers, *(experts or (0,)))),
    }
