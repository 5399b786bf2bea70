"""Calibration of a checkpoint on given tokens, as a function that the process pool runs on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state

from minitron_nemo.arch import Architecture
from minitron_nemo.importance.scores import Scores
from minitron_nemo.models.build import build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import measure


def measured(
    directory: Path,
    layout: Layout,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    micro_batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """Scores of the model in `directory` on `tokens` [n, s], dealt out to data-parallel ranks in turn."""
    launch.initialize(layout, seed=1)
    model = build_model(Architecture.load(directory), layout, dtype=dtype)
    load_model(model, directory)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = [
        {
            "tokens": tokens[start : start + micro_batch_size],
            "labels": tokens[start : start + micro_batch_size],
            "position_ids": torch.arange(tokens.shape[1]).expand(micro_batch_size, -1),
            "token_weights": weights[start : start + micro_batch_size],
        }
        for start in range(rank * micro_batch_size, len(tokens), size * micro_batch_size)
    ]
    return measure(model, batches, model_fingerprint="model", data_fingerprint="data", settings={})
