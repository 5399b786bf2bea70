"""Bytes that the candidates of a search grow to: checkpoints, as those of a run, and the matrices of their repairs.

Teacher, Scores and the teacher's cache are the run's own; `minitron plan` counts them there.
"""

from __future__ import annotations

from collections.abc import Sequence

from minitron_nemo.arch import Architecture
from minitron_nemo.config import PruneConfig, Recipe
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.disk import SIZES, Kept, disk
from minitron_nemo.planning.job import Job
from minitron_nemo.pruning.repair import stage_passes
from minitron_nemo.pruning.target import rotates
from minitron_nemo.search.candidates import candidate_recipe
from minitron_nemo.search.shapes import Candidate

CHECKPOINTS = "distillation, checkpoints"  # what `disk` calls those that go when a training is measured
MATRICES = "repair, matrices"


def search_disk(
    recipe: Recipe, teacher: Architecture, candidates: Sequence[Candidate], trained: int, world_size: int
) -> list[Kept]:
    """Of all candidates, each kind of file and how many have it, as if the largest, which come first, are `trained`."""
    config, layout = recipe.search, Layout.from_config(recipe.parallel)
    found: dict[str, list[int]] = {}
    for number, each in enumerate(candidates):
        steps = config.rungs[-1] if number < trained else 0
        own = candidate_recipe(recipe, each, steps)
        for kept in disk(Job(own, teacher, teacher, each.architecture, layout, layout, world_size)):
            if not kept.what.startswith("teacher"):
                found.setdefault(kept.what, []).append(kept.total)
        if amount := matrix_bytes(teacher, each.architecture, recipe.prune):
            found.setdefault(MATRICES, []).append(amount)
    if CHECKPOINTS in found:
        found[CHECKPOINTS] = found[CHECKPOINTS][: 1 if config.launcher == "none" else config.jobs]
    return [Kept(f"{what} ({len(sizes)})", sum(sizes)) for what, sizes in found.items()]


def matrix_bytes(source: Architecture, target: Architecture, config: PruneConfig) -> int:
    """Of a Plan's file, in fp32: behind each norm that is fitted a map [h_s, h_t] and a gain [h_t], for each linear_fc2
    the rows of the neurons that go, [f_s - f_t, f_t]; and a rotation [h_s, h_t].
    """
    places = [place for run in stage_passes(source, target, config.repair, Layout(), 0) for place in run]
    elements = sum((each.rows - each.columns + (not each.ffn)) * each.columns for each in places)
    if rotates(target, source, config):
        elements += source.hidden_size * target.hidden_size
    return elements * SIZES["float32"]
