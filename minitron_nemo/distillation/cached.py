"""`teacher.placement: cached`: the teacher's sparse distributions are read from disk; it is not in memory.

The cache is made before the training (`cache_teacher`), for the samples that the training will visit: those are a
function of the recipe and its data. Batch sizes, layout and order are free to change between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.fingerprint import model_identity
from minitron_nemo.config import Recipe
from minitron_nemo.data.dataset import Blend, open_train
from minitron_nemo.data.sampler import Microbatch, Sampler
from minitron_nemo.distillation.cache import Identity, TeacherCache, Visits, import_zarr
from minitron_nemo.distillation.phases import segments, stretches
from minitron_nemo.distillation.teacher import TeacherSignal, interleaved_microbatches, window_size
from minitron_nemo.errors import UserError
from minitron_nemo.kernels import SparseEntries, SparseTeacher
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout


class CachedTeacher:
    """Reads what the loss needs of a teacher that is not there. Only ranks of the last pipeline stage read."""

    def __init__(
        self,
        caches: Mapping[int, TeacherCache],
        layout: Layout,
        *,
        sequence_length: int,
        micro_batch_size: int,
        buffer_bytes: int,
    ) -> None:
        """`caches` by sequence length; `buffer_bytes` bounds what is held, for microbatches of the largest shape."""
        self.caches = caches
        identity = next(iter(caches.values())).identity
        entry_bytes = 8 + 4 + 4 * bool(identity.tail_samples)  # id, log-probability, weight
        self.window = window_size(
            state_bytes=micro_batch_size
            * sequence_length
            * ((identity.top_k + identity.tail_samples) * entry_bytes + 4),
            buffer_bytes=buffer_bytes,
            multiple_of=interleaved_microbatches(layout),
        )
        self.last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    def step(self, microbatches: Sequence[Microbatch]) -> TeacherSignal:
        """Read these microbatches. Raises UserError for a sample that the cache lacks and for a damaged file."""
        if not self.last_stage:
            return TeacherSignal([], None)
        return TeacherSignal([], None, sparse=[self._read(batch) for batch in microbatches])

    def _read(self, microbatch: Microbatch) -> SparseTeacher:
        """In the order of the student's states: [s*b], the sequence outermost."""
        samples, tokens = microbatch["tokens"].shape
        stored = self.caches[tokens].read(microbatch["sample_ids"])  # [b*s]
        device = current_device()

        def turned(values: Tensor) -> Tensor:
            return values.unflatten(0, (samples, tokens)).transpose(0, 1).flatten(0, 1).to(device)

        return SparseEntries(
            turned(stored.token_ids), turned(stored.log_probs), turned(stored.tail_log_probs), stored.top_k
        ).teacher()


def check_cached(recipe: Recipe, with_pairs: bool) -> None:
    """Raise UserError for a recipe whose losses a cache cannot serve; `with_pairs`: it has intermediate losses."""
    cache = recipe.teacher.cache
    if cache.tail_samples < 0:
        raise UserError(f"teacher.cache.tail_samples: {cache.tail_samples} must not be negative")
    if recipe.teacher.placement != "cached":
        return
    if with_pairs:
        raise UserError(
            "distill.intermediate.pairs: need the teacher's states, which a cache does not have; set them to [], or "
            "teacher.placement to colocated"
        )
    if cache.tail_samples and recipe.distill.divergence != "forward_kl":
        raise UserError(
            f"teacher.cache.tail_samples: {cache.tail_samples} draws are unbiased for distill.divergence forward_kl "
            f"alone, not for {recipe.distill.divergence}; set them to 0"
        )
    if recipe.teacher.layout is not None:
        raise UserError(
            "teacher.layout: a cached teacher does not run beside the student; leave it out, and give cache-teacher "
            "another `parallel` where it needs one"
        )
    if recipe.parallel.context_parallel_size > 1:
        raise UserError("teacher.placement: cached does not go with parallel.context_parallel_size above 1")
    import_zarr()


@dataclass(frozen=True)
class Needed:
    """One cache that a recipe needs: where it is, what it must hold, and how its samples are had."""

    directory: Path
    identity: Identity
    blend: Blend
    visits: Visits
    micro_batch_size: int

    def open(self) -> TeacherCache:
        return TeacherCache(self.directory, self.identity)


def needed_caches(recipe: Recipe, teacher_dir: Path, prepared: Path) -> list[Needed]:
    """One for each sequence length that the training has. Collective. Raises UserError for data that does not fit."""
    cache = recipe.teacher.cache
    directory = Path(cache.path or Path(recipe.run_dir) / "teacher_cache")
    teacher = launch.from_rank_0(lambda: model_identity(teacher_dir))
    vocab_size = Architecture.load(teacher_dir).vocab_size
    blend = open_train(recipe.data, prepared)
    sampler = Sampler(blend, recipe.data.seed, stretches(recipe.train, blend))
    found: dict[int, Needed] = {}
    position = 0
    for segment in segments(recipe.train, recipe.data.sequence_length):
        length, size = segment.sequence_length, segment.micro_batch_size
        visits = visited(sampler, position, segment.samples)
        if (earlier := found.get(length)) is not None:
            visits = visits.after(earlier.visits)
            size = max(size, earlier.micro_batch_size)
        identity = Identity(
            teacher=teacher,
            vocab_size=vocab_size,
            sequence_length=length,
            temperature=recipe.distill.temperature,
            top_k=min(cache.top_k, vocab_size),
            tail_samples=cache.tail_samples,
            seed=cache.seed,
            precision=cache.precision,
        )
        found[length] = Needed(directory / str(length), identity, sampler.blend_at(position), visits, size)
        position += segment.samples
    return list(found.values())


def visited(sampler: Sampler, position: int, samples: int) -> Visits:
    """The distinct ones of `samples` positions from `position` on, which must be of one sequence length."""
    blend = sampler.blend_at(position)
    places = np.array(sampler.global_batch(position, samples), np.int64)
    return Visits(tuple(source.fingerprint for source in blend.sources), places).distinct()


def checked_caches(recipe: Recipe, teacher_dir: Path, prepared: Path) -> list[Needed]:
    """`needed_caches`, all of which have what the training needs. Collective. Raises UserError."""
    needed = needed_caches(recipe, teacher_dir, prepared)

    def check() -> None:
        for each in needed:
            each.open().check(each.visits)

    launch.from_rank_0(check)
    return needed


def cached_teacher(recipe: Recipe, needed: Sequence[Needed], layout: Layout) -> CachedTeacher:
    """Open the caches on this rank."""
    largest = max(needed, key=lambda each: each.micro_batch_size * each.identity.sequence_length)
    return CachedTeacher(
        {each.identity.sequence_length: each.open() for each in needed},
        layout,
        sequence_length=largest.identity.sequence_length,
        micro_batch_size=largest.micro_batch_size,
        buffer_bytes=recipe.teacher.buffer_bytes,
    )
