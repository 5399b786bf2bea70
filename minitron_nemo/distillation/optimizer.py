"""Megatron's DistributedOptimizer over the student, at every data-parallel size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer import MegatronModule

from minitron_nemo.config import TrainConfig
from minitron_nemo.models.build import Model


def ddp_config(config: TrainConfig) -> DistributedDataParallelConfig:
    """Gradients are summed in fp32 and reduce-scattered."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.overlap_grad_reduce or config.overlap_param_gather,
        overlap_param_gather=config.overlap_param_gather,
    )


def params_dtype(config: TrainConfig) -> torch.dtype:
    """Data type of the model; its main parameters are fp32 either way."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def build_optimizer(config: TrainConfig, student: Model, others: Sequence[MegatronModule] = ()) -> MegatronOptimizer:
    """AdamW with decoupled weight decay on matrices alone (norm gains are not decayed), global-norm clipping.

    `others` are modules in DDP that this rank trains besides the student's chunks.
    """
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=config.precision == "bf16",
            params_dtype=params_dtype(config),
            use_distributed_optimizer=True,
            overlap_param_gather=config.overlap_param_gather,
        ),
        [*student.chunks, *others],
    )


def update(optimizer: MegatronOptimizer) -> float:
    """Clip and apply the gradients, and return their norm before clipping; apply nothing if it is not finite.

    The steps of `ChainedOptimizer.step`, which would make every parameter NaN.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Set the rate of every group; the groups without decay carry `wd_mult` 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]
