"""Calibration of a checkpoint on given tokens, as a function that the process pool runs on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.identity_op import IdentityOp
from torch import nn

from minitron_nemo.arch import Architecture
from minitron_nemo.importance.scores import Scores
from minitron_nemo.models.build import Model, build_model
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
    fused_norms: bool = False,
) -> Scores:
    """Scores of the model in `directory` on `tokens` [n, s], dealt out to data-parallel ranks in turn.

    With `fused_norms` the model has its norms where TransformerEngine's layers have them.
    """
    model = loaded(directory, layout, dtype, fused_norms)
    batches = dealt_out(tokens, weights, micro_batch_size)
    return measure(model, batches, model_fingerprint="model", data_fingerprint="data", settings={})


def loaded(directory: Path, layout: Layout, dtype: torch.dtype = torch.float32, fused_norms: bool = False) -> Model:
    """The model in `directory` on this rank."""
    launch.initialize(layout, seed=1)
    model = build_model(Architecture.load(directory), layout, dtype=dtype)
    load_model(model, directory)
    if fused_norms:
        fuse_norms(model)
    return model


def dealt_out(tokens: torch.Tensor, weights: torch.Tensor, micro_batch_size: int = 1) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's microbatches of `tokens` [n, s]."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [
        {
            "tokens": tokens[start : start + micro_batch_size],
            "labels": tokens[start : start + micro_batch_size],
            "position_ids": torch.arange(tokens.shape[1]).expand(micro_batch_size, -1),
            "token_weights": weights[start : start + micro_batch_size],
        }
        for start in range(rank * micro_batch_size, len(tokens), size * micro_batch_size)
    ]


class NormedLinear(nn.Module):
    """What TransformerEngine calls a LayerNormLinear, as far as hooks can see: the norm happens inside."""

    def __init__(self, norm: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.layer_norm_weight = norm.weight
        self.layer_norm_bias = norm.bias
        # In a list: not modules of this one, as they are none in TransformerEngine.
        self.steps = [norm, linear]

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        norm, linear = self.steps
        return linear(norm(states))


def fuse_norms(model: Model) -> None:
    for module in model.modules:
        for layer in module.decoder.layers:
            attention, mlp = layer.self_attention, layer.mlp
            attention.linear_qkv = NormedLinear(layer.input_layernorm, attention.linear_qkv)
            layer.input_layernorm = IdentityOp()
            if hasattr(mlp, "linear_fc1"):  # experts have no norm in theirs
                mlp.linear_fc1 = NormedLinear(layer.pre_mlp_layernorm, mlp.linear_fc1)
                layer.pre_mlp_layernorm = IdentityOp()
