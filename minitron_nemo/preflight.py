"""`minitron plan`: check a recipe against its model and say what it will cost, before anything runs.

Everything here is arithmetic on the families' tables; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import (
    active_parameters,
    forward_flops_per_token,
    non_embedding_parameters,
    parameters,
    parameters_by_part,
)
from minitron_nemo.arch.huggingface import hf_warnings
from minitron_nemo.checkpoint.sink import check_formats
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.config import Recipe
from minitron_nemo.data.pypi import cached
from minitron_nemo.distillation.cached import check_cached
from minitron_nemo.distillation.communication import Transfer, transfers
from minitron_nemo.distillation.intermediate import AUTO, resolve_pairs
from minitron_nemo.distillation.phases import Segment, check_phases, segments
from minitron_nemo.distillation.schedule import Schedule
from minitron_nemo.distillation.separate import Worlds, shared_out
from minitron_nemo.distillation.teacher import colocated_layout
from minitron_nemo.distillation.train import correction_config
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.checks import check_evaluation, evaluation_warnings
from minitron_nemo.models.groups import padding
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.estimate import Estimate
from minitron_nemo.planning.job import Job
from minitron_nemo.pruning import depth
from minitron_nemo.pruning.repair import fits, repair_warnings
from minitron_nemo.pruning.repair import planned as planned_repair
from minitron_nemo.pruning.target import target_architecture
from minitron_nemo.recipe_checks import absent, check_values


@dataclass(frozen=True)
class Preflight:
    """What a recipe, or one stage of it, amounts to. `flops` are arithmetic; `tokens` count positions, separators
    included.
    """

    recipe: Recipe
    original: Architecture  # of `model.source`: of a later stage it is evaluated, and may be the teacher
    source: Architecture  # what the student is cut out of
    teacher: Architecture  # what the student learns from: the source, or in a later stage the first one's
    student: Architecture
    layout: Layout
    teacher_layout: Layout  # while the student trains
    world_size: int
    warnings: tuple[str, ...]
    worlds: Worlds | None = None  # of the distillation, with a separate teacher
    stage: str | None = None
    first: bool = True  # of the stages

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The updates of the distillation."""
        return segments(self.recipe.train, self.recipe.data.sequence_length) if self.recipe.train.steps else ()

    @property
    def tokens_per_step(self) -> int:
        """Of the distillation, the mean over phases; 0 without one."""
        return self.tokens["distillation"] // max(self.recipe.train.steps, 1)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that each step that runs the model reads; for the teacher's cache as if no sample came twice.

        None for the steps of the run in `from_run`, nor for Scores that are given.
        """
        recipe, job, length = self.recipe, self.job, self.recipe.data.sequence_length
        distillation = sum(segment.samples * segment.sequence_length for segment in self.segments)
        return {
            "correction": 0 if job.correction is None else job.correction.samples * length,
            "calibration": recipe.prune.calibration.samples * length * job.calibrates,
            "depth": recipe.prune.depth.samples * length * (recipe.prune.depth.metric == "loss") * bool(self.drop),
            "repair": recipe.prune.repair.samples * length * fits(self.source, self.student, recipe.prune.repair),
            "cache": distillation * job.caches,
            "distillation": distillation,
        }

    @property
    def drop(self) -> int:
        """Layers that are chosen by measuring the teacher without some."""
        return depth.layers_to_drop(self.source, self.student, self.recipe.prune)

    @property
    def depth_search(self) -> dict[str, float]:
        """Models to measure for that, and evaluations of a layer for each sequence, also in passes through all."""
        return depth.depth_search(
            self.source, self.layout, self.recipe.prune, [self.drop], self.recipe.data.sequence_length
        )

    @property
    def flops(self) -> dict[str, int]:
        """Forward = 1, backward = 2: correction 3 sources, calibration 1, distillation 1 teacher + 3 students.

        A cached teacher's is in the cache, not in the distillation. Of depth on text; how long the sequences of a task
        are is not known before they are tokenised. Of repair at most, and without the systems that are solved.
        """
        source = forward_flops_per_token(self.source, self.recipe.data.sequence_length)
        search = 0
        if self.drop:
            found = self.depth_search
            search = depth.flops_per_token(
                self.source,
                self.recipe.data.sequence_length,
                int(found["models"]),
                int(found["layer_evaluations"]),
            )
        tokens = self.tokens
        repair = 0
        if tokens["repair"]:
            length = self.recipe.data.sequence_length
            repair = sum(planned_repair(self.source, self.student, self.recipe.prune, self.layout, length)[1:])
        teacher = distillation = 0
        for segment in self.segments:
            positions = segment.samples * segment.sequence_length
            teacher += forward_flops_per_token(self.teacher, segment.sequence_length) * positions
            distillation += 3 * forward_flops_per_token(self.student, segment.sequence_length) * positions
        cached = self.job.caches
        beside = self.recipe.distill.logits_weight != 0 and not cached
        return {
            "correction": 3 * source * tokens["correction"],
            "calibration": source * tokens["calibration"],
            "depth": search * tokens["depth"],
            "repair": repair * tokens["repair"],
            "cache": teacher * cached,
            "distillation": distillation + teacher * beside,
        }

    @property
    def communication(self) -> list[list[Transfer]]:
        """By pipeline rank, what one of its ranks communicates in the distillation's largest update, if any."""
        if not self.segments:
            return []
        update = self.job.distillation(max(self.segments, key=lambda segment: segment.tokens_per_step))
        return [transfers(update, rank) for rank in range(self.layout.pipeline_model_parallel_size)]

    @property
    def job(self) -> Job:
        return Job(
            self.recipe,
            self.original,
            self.source,
            self.teacher,
            self.student,
            self.layout,
            self.teacher_layout,
            self.world_size,
            self.worlds,
            self.first,
        )

    @cached_property
    def estimate(self) -> Estimate:
        """Memory, time and disk on the device of `cluster.gpu`."""
        return Estimate(self.job, Device.of_recipe(self.recipe), self.flops)

    @property
    def padding(self) -> dict[str, dict[str, Any] | None]:
        """Groups of zeros of both models while the student trains, and their cost."""
        both = {"teacher": (self.teacher, self.teacher_layout), "student": (self.student, self.layout)}
        length = self.recipe.data.sequence_length
        return {name: padding(model, layout, length) for name, (model, layout) in both.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.recipe.name,
            "source": _model(self.source),
            "teacher": _model(self.teacher),
            "student": _model(self.student),
            "steps": self.recipe.train.steps,
            "tokens_per_step": self.tokens_per_step,
            "segments": [asdict(segment) for segment in self.segments],
            "tokens": self.tokens,
            "flops": self.flops,
            "depth_search": self.depth_search if self.drop else None,
            "processes": self.world_size,
            "communication": [
                [{**asdict(transfer), "wire_bytes": transfer.wire_bytes} for transfer in of_rank]
                for of_rank in self.communication
            ],
            "data_parallel_size": self.layout.data_parallel_size(self.world_size),
            "distillation": None if self.worlds is None else self.worlds.to_dict(),
            "padding": self.padding,
            **self.estimate.to_dict(),
            "warnings": list(self.warnings),
        }


def preflight(
    recipe: Recipe,
    world_size: int | None = None,
    distils: bool = True,
    stage: str | None = None,
    earlier: Sequence[Preflight] = (),
) -> Preflight:
    """Check every key and every divisibility. Raises UserError for the first that is wrong.

    `world_size` is the size of the job; None takes `cluster.nodes * cluster.processes_per_node`. A job that does not
    distil need not have the processes of a separate teacher. `recipe` may be that of a `stage`, after `earlier` ones.
    """
    check_values(recipe)
    if world_size is None:
        world_size = recipe.cluster.nodes * recipe.cluster.processes_per_node
    if recipe.prune.scores is not None and not Path(recipe.prune.scores).is_file():
        raise UserError(f"prune.scores: {recipe.prune.scores}: no such file; leave it out to calibrate")
    original = earlier[0].original if earlier else teacher_architecture(recipe)
    source = earlier[-1].student if earlier else original
    teacher = source if recipe.teacher.model == "previous" else original
    student = target_architecture(source, recipe.prune)
    if depth.layers_to_drop(source, student, recipe.prune):
        depth.check_depth(recipe.prune.depth)
    layout = Layout.from_config(recipe.parallel)
    for architecture in (original, source, student):  # all of which are evaluated
        layout.check(architecture, world_size)
    layout.check_split("student", student.num_layers)
    if layout.sequence_parallel:  # then every pass splits its states, not only a training's
        layout.check_length(recipe.data.sequence_length)
    correction, longest = correction_config(recipe), original.max_position_embeddings
    if recipe.data.sequence_length > longest:
        raise UserError(
            f"data.sequence_length {recipe.data.sequence_length} is longer than the model's "
            f"max_position_embeddings {longest}"
        )
    check_evaluation(recipe, layout, longest)
    check_formats(recipe.export.formats, student)
    if correction.steps:
        Schedule.from_config(correction).check("teacher.correction")
        check_phases(correction, recipe.data, layout, world_size, longest, "teacher.correction")
    worlds, teacher_layout = None, layout
    if recipe.train.steps:
        worlds, teacher_layout = _check_distillation(recipe, teacher, student, layout, world_size, distils)
    warnings = [said for said in _absent(recipe) if all(said not in plan.warnings for plan in earlier)]
    warnings += evaluation_warnings(layout)
    warnings += hf_warnings(student) if "hf" in recipe.export.formats else []
    warnings += repair_warnings(source, student, recipe.prune.repair, recipe.data.sequence_length)
    return Preflight(
        recipe,
        original,
        source,
        teacher,
        student,
        layout,
        teacher_layout,
        world_size,
        tuple(warnings),
        worlds,
        stage,
        first=not earlier,
    )


def _check_distillation(
    recipe: Recipe, teacher: Architecture, student: Architecture, layout: Layout, world_size: int, distils: bool
) -> tuple[Worlds | None, Layout]:
    """The worlds of a separate teacher and the layout of any. Raises UserError for what does not fit."""
    Schedule.from_config(recipe.train).check("train")
    pairs = resolve_pairs(recipe.distill.intermediate, teacher, student)
    check_cached(recipe, bool(pairs))
    separate = recipe.teacher.placement == "separate"
    if recipe.teacher.processes is not None and not separate:
        raise UserError(
            f"teacher.processes: {recipe.teacher.processes} is for placement separate, not {recipe.teacher.placement}; "
            "leave it out"
        )
    worlds = shared_out(recipe, teacher, world_size) if separate and distils else None
    teacher_layout = worlds.teacher.layout if worlds else colocated_layout(recipe.teacher, teacher, layout, world_size)
    if pairs and recipe.distill.logits_weight == 0 and recipe.distill.intermediate.pairs != AUTO:
        raise UserError(
            "distill.logits_weight: 0 means training without the teacher, and distill.intermediate.pairs need it; "
            "raise it, or set the pairs to []"
        )
    check_phases(
        recipe.train,
        recipe.data,
        layout,
        worlds.student.processes if worlds else world_size,
        teacher.max_position_embeddings,
    )
    return worlds, teacher_layout


def _absent(recipe: Recipe) -> Iterator[str]:
    for key, path in absent(recipe).items():
        instead = "; sizes are those of model.architecture" if key == "model.source" else ""
        yield f"{key}: {path} is not here{instead}"


def teacher_architecture(recipe: Recipe) -> Architecture:
    """The source's architecture; where the source is not on this machine yet, the one `model.architecture` states."""
    stated = recipe.model.architecture
    expected = None if stated is None else Architecture.from_dict(stated, "model.architecture")
    local = cached(recipe.model.source) if recipe.model.source.startswith("pypi:") else Path(recipe.model.source)
    if expected is not None and (local is None or not local.exists()):
        return expected
    if local is None:
        raise UserError(f"model.source {recipe.model.source}: not downloaded yet and model.architecture is not given")
    found = open_source(local).architecture
    if expected is not None and found != expected:
        differing = [key for key, value in expected.to_dict().items() if found.to_dict()[key] != value]
        raise UserError(
            f"model.architecture: {differing[0]} is {expected.to_dict()[differing[0]]}, "
            f"but {local} has {found.to_dict()[differing[0]]}"
        )
    return found


def _model(architecture: Architecture) -> dict[str, Any]:
    return {
        "parameters": parameters(architecture),
        "non_embedding_parameters": non_embedding_parameters(architecture),
        "active_parameters": active_parameters(architecture),
        "parameters_by_part": parameters_by_part(architecture),
        "architecture": architecture.to_dict(),
    }
