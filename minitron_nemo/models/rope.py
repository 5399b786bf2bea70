"""Rotary frequencies with llama3 scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def scaled_frequencies(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Rotary frequencies (radians per position, fp32 [kv_channels/2]) under Hugging Face's `rope_type: llama3`.

    A frequency that turns more than `high_freq_factor` times within the original context stays, one that turns less
    than `low_freq_factor` times is divided by `factor`, those between are blended linearly in the number of turns.
    Megatron-core has the same formula with all but `factor` fixed to Llama 3.1's values.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share_kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (share_kept + (1 - share_kept) / scaling["factor"])
