"""A recipe in the words of NeMo's own tasks: trainer, strategy, optimizer, data module.

Left to the caller: the checkpoints' paths, and `paths`, the tokenised text as NeMo wants it (one prefix, or weights and
prefixes in turn, between spaces). NeMo-Run 0.11 cannot set `data.paths` on the command line, so it is an argument here.
"""

from typing import Any

import nemo_run as run
from fiddle._src.experimental.dataclasses import convert_dataclasses_to_configs
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.modelopt import PruningConfig
from nemo.collections.llm.recipes.log.default import default_log, default_resume, tensorboard_logger
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule

from minitron_nemo.config import Recipe, TrainConfig
from minitron_nemo.errors import UserError
from minitron_nemo.nemo.distill import llm_distill


def prune_task(recipe: Recipe, paths: str | None) -> run.Partial:
    """`llm.prune` to the recipe's target. Missing: nemo_checkpoint, save_path, and data.paths where not given."""
    target, batch = recipe.prune, recipe.prune.calibration.micro_batch_size
    groups = None
    if target.num_attention_heads is not None and recipe.model.architecture is not None:
        groups = recipe.model.architecture["num_query_groups"]
    return run.Partial(
        llm.prune,
        pruning_config=run.Config(
            PruningConfig,
            target_hidden_size=target.hidden_size,
            target_ffn_hidden_size=target.ffn_hidden_size,
            target_num_attention_heads=target.num_attention_heads,
            target_num_query_groups=groups,
            target_num_layers=target.num_layers,
            # Counted from 1 there.
            drop_layers=None if target.drop_layers is None else [layer + 1 for layer in target.drop_layers],
        ),
        num_train_samples=recipe.prune.calibration.samples,
        data=_data(recipe, batch, batch, paths),  # refused there unless both batch sizes are the same
    )


def distill_task(recipe: Recipe, target: Any, paths: str | None) -> run.Partial:
    """`llm.distill` or `llm_distill` with the recipe's `train`, `parallel`, `cluster`, and the latter's `distill`.

    Missing: student_model_path, teacher_model_path, and data.paths where not given. Raises UserError for what NeMo's
    trainer has not.
    """
    train = recipe.train
    if train.phases:
        raise UserError("train.phases: NeMo's trainer has one phase; use `minitron distill`")
    if train.lr_decay_style != "cosine":
        raise UserError(f"train.lr_decay_style: {train.lr_decay_style} has no factory here; set `optim` by hand")
    partial = run.Partial(
        target,
        data=_data(recipe, train.micro_batch_size, train.global_batch_size, paths),
        trainer=_trainer(recipe),
        optim=_optimizer(train),
        log=default_log(name=recipe.name, tensorboard_logger=tensorboard_logger(name=recipe.name)),
        resume=default_resume(),
    )
    if target is llm_distill:
        partial.objective = convert_dataclasses_to_configs(recipe.distill, allow_post_init=True)
    return partial


def _data(recipe: Recipe, micro_batch_size: int, global_batch_size: int, paths: str | None) -> run.Config:
    return run.Config(
        llm.PreTrainingDataModule,
        seq_length=recipe.data.sequence_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        seed=recipe.data.seed,
        **({} if paths is None else {"paths": paths.split()}),
    )


def _trainer(recipe: Recipe) -> run.Config:
    train, parallel = recipe.train, recipe.parallel
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        ckpt_async_save=train.async_save,
        ddp=run.Config(
            DistributedDataParallelConfig,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=train.overlap_grad_reduce,
            overlap_param_gather=train.overlap_param_gather,
        ),
    )
    return run.Config(
        nl.Trainer,
        accelerator="gpu",
        num_nodes=recipe.cluster.nodes,
        devices=recipe.cluster.processes_per_node,
        max_steps=train.steps,
        val_check_interval=train.eval_interval or train.save_interval,
        limit_val_batches=1,
        log_every_n_steps=train.log_interval,
        use_distributed_sampler=False,
        plugins=bf16_mixed() if train.precision == "bf16" else None,
        strategy=strategy,
    )


def _optimizer(train: TrainConfig) -> run.Config:
    return run.Config(
        MegatronOptimizerModule,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=train.lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            clip_grad=train.clip_grad,
            bf16=train.precision == "bf16",
            use_distributed_optimizer=True,
        ),
        lr_scheduler=run.Config(
            CosineAnnealingScheduler,
            max_steps=train.steps,
            warmup_steps=train.warmup_steps,
            constant_steps=0,
            min_lr=train.min_lr,
        ),
    )
