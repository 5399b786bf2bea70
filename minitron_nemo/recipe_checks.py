"""What can be said of a recipe without its model: choices, signs, what excludes what, what is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_nemo.checkpoint.sink import FORMATS
from minitron_nemo.config import ClusterConfig, DataConfig, EvaluateConfig, Recipe
from minitron_nemo.data.dataset import given_weights
from minitron_nemo.data.documents import is_here
from minitron_nemo.distillation.balance import DYNAMIC, check_weight
from minitron_nemo.distillation.cache import DTYPES
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.tasks import check_tasks
from minitron_nemo.kernels.objective import DIVERGENCES
from minitron_nemo.parallel.gpus import GPUS
from minitron_nemo.pruning import depth
from minitron_nemo.pruning.target import DEPTH_METHODS

CHOICES = {
    "distill.divergence": DIVERGENCES,
    "distill.intermediate.loss": ("cosine", "mse"),
    "train.precision": ("bf16", "fp32"),
    "prune.calibration.precision": ("bf16", "fp32"),
    "prune.calibration.sequence_aggregation": ("mean", "l2", "var"),
    "prune.calibration.batch_aggregation": ("mean", "l2", "var"),
    "prune.ffn_score": ("activation", "output"),
    "prune.hidden_method": ("select", "rotate"),
    "prune.depth_method": DEPTH_METHODS,
    "prune.depth.metric": depth.METRICS,
    "teacher.model": ("source", "previous"),
    "teacher.placement": ("colocated", "separate", "cached"),
    "teacher.cache.precision": tuple(DTYPES),
    "cluster.launcher": ("none", "local"),
    "cluster.gpu": (None, *GPUS),
    "model.dtype": (None, "bfloat16", "float32", "float16"),
    "export.dtype": (None, "bfloat16", "float32", "float16"),
}
POSITIVE = (  # where they are given
    "data.sequence_length",
    "prune.calibration.samples",
    "prune.calibration.micro_batch_size",
    "prune.calibration.save_interval",
    "prune.depth.samples",
    "prune.depth.states_bytes",
    "prune.repair.ridge",
    "prune.repair.samples",
    "prune.repair.statistics_bytes",
    "teacher.buffer_bytes",
    "teacher.cache.top_k",
    "teacher.correction.global_batch_size",
    "distill.temperature",
    "distill.chunk_bytes",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.lr",
    "train.log_interval",
    "train.save_interval",
    "train.keep_last",
    "train.max_nonfinite_steps",
    "evaluate.documents",
    "evaluate.sequence_length",
    "evaluate.micro_batch_size",
    "evaluate.generate_prompt_tokens",
    "cluster.nodes",
    "cluster.processes_per_node",
    "cluster.signal_seconds",
)
NOT_NEGATIVE = {  # and what 0 does
    "prune.calibration.first_sample": "begins with the first sample",
    "train.steps": "prunes without distilling",
    "train.hang_timeout": "never ends a job",
    "train.eval_interval": "is for no validation",
    "evaluate.generate_tokens": "generates nothing",
    "cluster.max_requeues": "leaves it to you to submit again",
}


def check_values(recipe: Recipe) -> None:
    """Raise UserError, naming the key, for the first value that no model could make right."""
    check_keys(recipe)
    if unknown := set(recipe.export.formats) - set(FORMATS):
        raise UserError(f"export.formats: {sorted(unknown)[0]!r} is not one of {', '.join(FORMATS)}")
    _check_data(recipe.data)
    if not 0 < recipe.distill.jsd_beta < 1:
        raise UserError(f"distill.jsd_beta: {recipe.distill.jsd_beta} must lie between 0 and 1, neither of them")
    check_weight("distill.ce_weight", recipe.distill.ce_weight)
    check_weight("distill.intermediate.alpha", recipe.distill.intermediate.alpha)
    if recipe.distill.logits_weight <= 0 and recipe.distill.ce_weight in (0, DYNAMIC):
        raise UserError(
            "distill: logits_weight is 0, and ce_weight is 0 or dynamic, which is in proportion to L_logits; there is "
            "nothing to train on"
        )
    _check_generation(recipe.evaluate)
    check_tasks(recipe.evaluate.tasks)
    peak = recipe.train.peak_flops
    if peak is not None and peak <= 0:
        raise UserError(f"train.peak_flops: {peak:g} must be greater than 0")
    _check_cluster(recipe.cluster)


def check_keys(recipe: Recipe) -> None:
    """Raise UserError for the first key whose value is wrong by itself, also where not all of a recipe is given."""
    for key, choices in CHOICES.items():
        if (value := _get(recipe, key)) not in choices:
            raise UserError(f"{key}: {value!r} is not one of {', '.join(str(choice) for choice in choices)}")
    for key in POSITIVE:
        if (value := _get(recipe, key)) is not None and value <= 0:
            raise UserError(f"{key}: {value} must be greater than 0")
    for key, zero in NOT_NEGATIVE.items():
        if _get(recipe, key) < 0:
            raise UserError(f"{key}: {_get(recipe, key)} must not be negative; 0 {zero}")


def absent(recipe: Recipe) -> dict[str, str]:
    """What a run reads first and is not on this machine: paths of model and text, by their keys."""
    texts = {
        f"data.{section}[{number}].path": text
        for section, sources in (("train", recipe.data.train), ("heldout", recipe.data.heldout))
        for number, text in enumerate(sources)
    }
    missing = {key: text.path for key, text in texts.items() if not is_here(text)}
    source = recipe.model.source
    return missing if source.startswith("pypi:") or Path(source).exists() else {"model.source": source, **missing}


def _check_data(data: DataConfig) -> None:
    if not data.train:
        raise UserError("data.train: no text to train on; give at least one source")
    given_weights(data)
    if not 0 <= data.heldout_fraction < 1:
        raise UserError(f"data.heldout_fraction: {data.heldout_fraction} must be in [0, 1)")
    if not data.heldout and not data.heldout_fraction:
        raise UserError(
            "data.heldout_fraction: 0, without data.heldout, leaves nothing to evaluate on; raise it or give sources"
        )


def _check_generation(evaluate: EvaluateConfig) -> None:
    sizes = evaluate.generate_batch_sizes
    if not sizes or min(sizes) < 1:
        raise UserError(f"evaluate.generate_batch_sizes: {sizes} must be sizes of batches, at least one; e.g. [1, 8]")


def _check_cluster(cluster: ClusterConfig) -> None:
    if cluster.gpus_per_node not in (None, cluster.processes_per_node):
        raise UserError(
            f"cluster.gpus_per_node: {cluster.gpus_per_node} is not the {cluster.processes_per_node} of "
            "cluster.processes_per_node; every GPU gets one process"
        )
    if cluster.gpu_memory_bytes is not None and cluster.gpu_memory_bytes <= 0:
        raise UserError(f"cluster.gpu_memory_bytes: {cluster.gpu_memory_bytes:g} must be greater than 0")
    if cluster.mfu is not None and not 0 < cluster.mfu <= 1:
        raise UserError(f"cluster.mfu: {cluster.mfu:g} must be a share, above 0 and up to 1")
    if cluster.prune_nodes is not None and cluster.prune_nodes <= 0:
        raise UserError(f"cluster.prune_nodes: {cluster.prune_nodes} must be greater than 0")
    for mount in cluster.container_mounts:
        if ":" not in mount or "," in mount:
            raise UserError(f"cluster.container_mounts: {mount!r} is not SRC:DST")


def _get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value
