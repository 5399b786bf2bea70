"""Bytes that a run directory grows to: every checkpoint of the chain, with what is kept of trainings and repairs."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.counts import parameters
from minitron_nemo.config import PruneConfig
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.job import Job
from minitron_nemo.pruning.repair import stage_passes
from minitron_nemo.pruning.target import rotates

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
OPTIMIZER_BYTES = 12  # main parameter and two moments in fp32, whatever the model's data type
MATRICES = "repair, matrices"
ENTRY_BYTES = {"fp32": 4 + 4, "fp16": 4 + 2}  # of the teacher's cache: token id and log-probability


@dataclass(frozen=True)
class Kept:
    """One kind of file: bytes of each, and how many there are at most at once."""

    what: str
    bytes: int
    count: int = 1

    @property
    def total(self) -> int:
        return self.bytes * self.count


def disk(job: Job) -> list[Kept]:
    """By arithmetic; the tokenised text, logs and a cut's Plan are left out, and the cache is not compressed here."""
    recipe, trained = job.recipe, job.element_size
    stored = SIZES[recipe.model.dtype or "bfloat16"]
    own = recipe.from_run is None  # or teacher and correction are in another run's directory
    found = [Kept("teacher, converted", parameters(job.source) * stored)] if job.first and own else []
    if recipe.teacher.correction.steps:
        if own:
            found.append(_training("teacher's correction, checkpoints", job.source, job))
            found.append(Kept("teacher, corrected", parameters(job.source) * trained))
        stored = trained
    if amount := matrix_bytes(job.source, job.student, recipe.prune):
        found.append(Kept(MATRICES, amount))
    found.append(Kept("student, pruned", parameters(job.student) * stored))
    if job.caches:
        found.append(Kept("teacher's cache, at most", _cache_bytes(job)))
    if recipe.train.steps:
        found.append(_training("distillation, checkpoints", job.student, job))
        found.append(Kept("student, distilled", parameters(job.student) * trained))
        stored = trained
    for name in recipe.export.formats:
        size = SIZES[recipe.export.dtype] if recipe.export.dtype else stored
        found.append(Kept(f"student, exported ({name})", parameters(job.student) * size))
    return found


def matrix_bytes(source: Architecture, target: Architecture, config: PruneConfig) -> int:
    """Of a Plan's file, in fp32: behind each norm that is fitted a map [h_s, h_t], a gain [h_t] and a LayerNorm's bias
    [h_t], for each linear_fc2 (of a mixture each expert's) the rows of the neurons that go, [f_s - f_t, f_t]; and a
    rotation [h_s, h_t].
    """
    places = [place for run in stage_passes(source, target, config.repair, Layout(), 0) for place in run]
    elements = sum(
        (each.rows - each.columns + (each.axis == Axis.HIDDEN) + each.means) * each.columns for each in places
    )
    if rotates(target, source, config):
        elements += source.hidden_size * target.hidden_size
    return elements * SIZES["float32"]


def training_checkpoint_bytes(model: Architecture, element_size: int) -> int:
    """Weights and the optimizer's state."""
    return parameters(model) * (element_size + OPTIMIZER_BYTES)


def _training(what: str, model: Architecture, job: Job) -> Kept:
    """`train.keep_last`, the best one where updates are validated, and the next one while it is written."""
    train = job.recipe.train
    best = train.eval_interval > 0
    return Kept(what, training_checkpoint_bytes(model, job.element_size), train.keep_last + best + 1)


def _cache_bytes(job: Job) -> int:
    cache = job.recipe.teacher.cache
    entries = min(cache.top_k, job.teacher.vocab_size) + cache.tail_samples
    tokens = sum(segment.samples * segment.sequence_length for segment in job.segments)
    return tokens * (entries * ENTRY_BYTES[cache.precision] + 4)
