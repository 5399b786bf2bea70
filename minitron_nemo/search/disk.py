"""Bytes that the candidates of a search grow to: what each of them has of a run's own files.

Teacher, Scores and the teacher's cache are the run's own; `minitron plan` counts them there.
"""

from __future__ import annotations

from collections.abc import Sequence

from minitron_nemo.arch import Architecture
from minitron_nemo.config import Recipe
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.disk import Kept, disk
from minitron_nemo.planning.job import Job
from minitron_nemo.search.candidates import candidate_recipe
from minitron_nemo.search.shapes import Candidate

CHECKPOINTS = "distillation, checkpoints"  # what `disk` calls those that go when a training is measured


def search_disk(
    recipe: Recipe, teacher: Architecture, candidates: Sequence[Candidate], trained: int, world_size: int
) -> list[Kept]:
    """Of all candidates, each kind of file and how many have it, as if the largest, which come first, are `trained`."""
    config, layout = recipe.search, Layout.from_config(recipe.parallel)
    found: dict[str, list[int]] = {}
    for number, each in enumerate(candidates):
        steps = config.rungs[-1] if number < trained else 0
        own = candidate_recipe(recipe, each, steps)
        for kept in disk(Job(own, teacher, teacher, teacher, each.architecture, layout, layout, world_size)):
            if not kept.what.startswith("teacher"):
                found.setdefault(kept.what, []).append(kept.total)
    if CHECKPOINTS in found:
        found[CHECKPOINTS] = found[CHECKPOINTS][: 1 if config.launcher == "none" else config.jobs]
    return [Kept(f"{what} ({len(sizes)})", sum(sizes)) for what, sizes in found.items()]
