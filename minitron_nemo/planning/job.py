"""What is planned: the models of a recipe on the layouts they run on, and the updates of its trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from minitron_nemo.arch import Architecture
from minitron_nemo.config import Recipe
from minitron_nemo.distillation.cache import BLOCK
from minitron_nemo.distillation.communication import Update
from minitron_nemo.distillation.optimizer import params_dtype
from minitron_nemo.distillation.phases import Segment, segments
from minitron_nemo.distillation.separate import AHEAD, Worlds
from minitron_nemo.distillation.teacher import interleaved_microbatches, window_size
from minitron_nemo.distillation.train import correction_config
from minitron_nemo.models.states import owners
from minitron_nemo.parallel.layout import Layout


@dataclass(frozen=True)
class Job:
    """A recipe, or one of its stages. `source` is cut and corrected, `teacher` teaches.

    `original` is the recipe's own model; of a later stage it may be neither, and is evaluated all the same.
    """

    recipe: Recipe
    original: Architecture
    source: Architecture
    teacher: Architecture
    student: Architecture
    layout: Layout
    teacher_layout: Layout
    world_size: int
    worlds: Worlds | None = None  # with a separate teacher
    first: bool = True  # of the stages: its source is converted, a later one's is the student of the one before

    @property
    def students(self) -> int:
        """Processes that train the student."""
        return self.worlds.student.processes if self.worlds else self.world_size

    @property
    def element_size(self) -> int:
        return params_dtype(self.recipe.train).itemsize

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Of the distillation; none without one."""
        return segments(self.recipe.train, self.recipe.data.sequence_length) if self.recipe.train.steps else ()

    @property
    def correction(self) -> Segment | None:
        """The updates of the teacher's correction, if there are any; another run's are not this job's."""
        config = correction_config(self.recipe)
        if not config.steps or self.recipe.from_run is not None:
            return None
        return segments(config, self.recipe.data.sequence_length)[0]

    @property
    def calibrates(self) -> bool:
        """Whether the Scores are made, and not those of a file or of another run."""
        return self.recipe.prune.scores is None and self.recipe.from_run is None

    def distillation(self, segment: Segment) -> Update:
        """One update of the distillation."""
        return Update.of_recipe(
            self.recipe, self.teacher, self.student, self.layout, self.teacher_layout, self.students, segment
        )

    def correcting(self, segment: Segment) -> Update:
        """One update of the correction: the source learns from labels."""
        size, layout = segment.micro_batch_size, self.layout
        return Update(
            self.source,
            layout,
            self.world_size,
            segment.global_batch_size // size // layout.data_parallel_size(self.world_size),
            size,
            segment.sequence_length,
            self.element_size,
            recompute=self.recipe.train.recompute,
        )

    @property
    def caches(self) -> bool:
        """Whether the teacher runs before the training, for its cache."""
        recipe = self.recipe
        return recipe.train.steps > 0 and recipe.teacher.placement == "cached" and recipe.distill.logits_weight != 0

    def caching(self) -> list[tuple[Update, int]]:
        """Of each sequence length of the teacher's cache a block, as an update whose teacher is colocated, and blocks.

        There are so many at most: as if no sample came twice and the cache held none yet.
        """
        found = []
        for length in dict.fromkeys(segment.sequence_length for segment in self.segments if self.caches):
            alike = [segment for segment in self.segments if segment.sequence_length == length]
            size = max(segment.micro_batch_size for segment in alike)
            multiple = interleaved_microbatches(self.layout)
            block = replace(
                self.distillation(alike[0]),
                microbatches=ceil(ceil(BLOCK / size) / multiple) * multiple,
                micro_batch_size=size,
                teacher_layout=self.layout,
                placement="colocated",
            )
            found.append((block, ceil(sum(segment.samples for segment in alike) / BLOCK)))
        return found

    def window(self, update: Update) -> int:
        """Microbatches of `update` whose teacher's states are there at once: the schedules run once for each window."""
        buffer_bytes = self.recipe.teacher.buffer_bytes
        if update.teacher is None:
            return update.microbatches
        if update.placement == "cached":
            held = update.micro_batch_size * update.sequence_length * self.cached_bytes(update)
        else:
            held = max(1 + max(pair_states(update)), 1) * state_bytes(update)
        if update.placement == "separate":
            buffer_bytes //= 2  # the other half is for what comes meanwhile
        layouts = [self.layout] if update.placement != "colocated" else [self.teacher_layout, self.layout]
        most = window_size(state_bytes=held, buffer_bytes=buffer_bytes, multiple_of=interleaved_microbatches(*layouts))
        return min(most, update.microbatches)

    def held_microbatches(self, update: Update) -> int:
        """Microbatches whose states are on a rank at once, those included that come meanwhile."""
        window = self.window(update)
        if update.placement != "separate":
            return window
        room = max(self.recipe.teacher.buffer_bytes // ((1 + max(pair_states(update))) * state_bytes(update)), window)
        return min(room, (1 + AHEAD) * window)

    def cached_bytes(self, update: Update) -> int:
        """Of one token's entries: id, log-probability and, with a tail that is sampled, weight."""
        return update.cached_entries * (8 + 4 + 4 * bool(self.recipe.teacher.cache.tail_samples)) + 4


def state_bytes(update: Update) -> int:
    """One state of the teacher's of a microbatch on a rank, [s/tp, b, h_t]."""
    assert update.teacher is not None
    tokens = update.micro_batch_size * update.sequence_length // update.tp
    return tokens * update.teacher.hidden_size * update.element_size


def pair_states(update: Update) -> Sequence[int]:
    """States that pairs of layers need, of one microbatch, by pipeline rank of the student.

    A rank holds those that it compares and, with a colocated teacher, those that it computes.
    """
    if update.teacher is None:
        return [0] * update.pp
    targets = owners(update.student.num_layers, update.layout)
    sources = owners(update.teacher.num_layers, update.teacher_layout or update.layout)
    held: list[set[int]] = [set() for _ in range(update.pp)]
    for pair in update.pairs:
        held[targets[pair.student]].add(pair.teacher)
        if update.placement == "colocated":
            held[sources[pair.teacher]].add(pair.teacher)
    return [len(states) for states in held]
