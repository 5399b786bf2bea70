"""The same job on other layouts: those that the models and batches fit, ranked by the time of an update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from minitron_nemo.distillation.phases import check_phases
from minitron_nemo.distillation.train import correction_config
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.job import Job
from minitron_nemo.planning.memory import RankMemory, memory, worst
from minitron_nemo.planning.time import distillation

VIRTUAL_STAGES = (None, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """A layout for the student, and for a colocated teacher; seconds of an update are the mean over phases."""

    layout: Layout
    recompute: bool
    data_parallel_size: int
    seconds: float
    fullest: RankMemory
    own: bool  # the recipe's

    def __str__(self) -> str:
        return f"{self.layout} dp={self.data_parallel_size}{' recompute' if self.recompute else ''}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "layout": str(self.layout),
            "data_parallel_size": self.data_parallel_size,
            "recompute": self.recompute,
            "update_seconds": self.seconds,
            "memory_bytes": self.fullest.total,
            "own": self.own,
        }


def candidates(job: Job, device: Device, share: float) -> list[Candidate]:
    """The fastest first, the recipe's own always among them; `share` of the peak is the same for all.

    Batches, precision and a separate teacher's layout stay the recipe's; a colocated teacher has the student's. A
    layout recomputes activations where it would not fit without.
    """
    assert job.segments and device.peak_flops is not None
    own = _candidate(job, device, share, own=True)
    found = [own]
    for layout in _layouts(job):
        for recompute in (False, True):
            other = _on(job, layout, recompute)
            is_own = (other.layout, other.teacher_layout, recompute) == (
                job.layout,
                job.teacher_layout,
                job.recipe.train.recompute,
            )
            candidate = own if is_own else _candidate(other, device, share, own=False)
            if device.fits(candidate.fullest.total) is not False:
                if candidate is not own:
                    found.append(candidate)
                break
    return sorted(found, key=lambda each: each.seconds)


def _candidate(job: Job, device: Device, share: float, own: bool) -> Candidate:
    seconds = sum(segment.steps * distillation(job, segment, device, share).seconds for segment in job.segments)
    return Candidate(
        job.layout,
        job.recipe.train.recompute,
        job.layout.data_parallel_size(job.students),
        seconds / job.recipe.train.steps,
        worst(memory(job, device)),
        own,
    )


def _on(job: Job, layout: Layout, recompute: bool) -> Job:
    recipe = replace(job.recipe, train=replace(job.recipe.train, recompute=recompute))
    return replace(
        job, recipe=recipe, layout=layout, teacher_layout=layout if job.worlds is None else job.teacher_layout
    )


def _layouts(job: Job) -> Iterator[Layout]:
    """Those that every check of `preflight` lets through; tensor-parallel groups stay within a node."""
    context = job.layout.context_parallel_size
    for tensor in _divisors(min(job.recipe.cluster.processes_per_node, job.students)):
        for pipeline in _divisors(job.students // tensor):
            for virtual in VIRTUAL_STAGES:
                layout = Layout(tensor, pipeline, virtual, context, sequence_parallel=tensor > 1)
                if _runs(job, layout):
                    yield layout


def _runs(job: Job, layout: Layout) -> bool:
    recipe, longest = job.recipe, job.teacher.max_position_embeddings
    try:
        for model in (job.original, job.source, job.student):  # which run on it in all processes of the job
            layout.check(model, job.world_size)
        layout.check_processes(job.students)
        check_phases(recipe.train, recipe.data, layout, job.students, longest)
        if (correction := correction_config(recipe)).steps:
            check_phases(correction, recipe.data, layout, job.world_size, longest)
    except UserError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
