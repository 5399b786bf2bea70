"""A candidate as a recipe: what `minitron run` takes to cut it, to train it for some updates and to measure it.

RUN/search/NAME/0.yaml     cut and measured, no training (train.steps: 0)
RUN/search/NAME/100.yaml   trained for 100 updates with a schedule of its own, in the same run directory
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_nemo.config import EvaluateConfig, PruneConfig, Recipe, SearchConfig
from minitron_nemo.search.shapes import Candidate, sizes
from minitron_nemo.work import SEARCH


def search_directory(recipe: Recipe) -> Path:
    """Where a search keeps its candidates and its results."""
    return Path(recipe.run_dir) / SEARCH


def driver_directory(recipe: Recipe) -> Path:
    """What is the search's own, where the run directory belongs to a process or a job that it has started."""
    return search_directory(recipe) / "driver"


def pruning(candidate: Candidate, prune: PruneConfig) -> PruneConfig:
    """The `prune` section that makes the candidate."""
    target: dict[str, Any] = {axis.value: size for axis, size in sizes(candidate.architecture).items()}
    if prune.drop_layers is not None:
        del target["num_layers"]
    return replace(prune, **target)


def candidate_recipe(recipe: Recipe, candidate: Candidate, steps: int) -> Recipe:
    """The candidate's recipe for `steps` updates: it takes teacher, data and Scores from the run of `recipe`.

    The schedule is that of `train` over these steps, so that every training ends at `train.min_lr`; phases and the
    batch's ramp-up belong to the long training and are left out, and tasks to its result. The teacher's cache is the
    search's, shared.
    """
    cache = replace(recipe.teacher.cache, path=recipe.teacher.cache.path or str(Path(recipe.run_dir) / "teacher_cache"))
    return replace(
        recipe,
        name=f"{recipe.name}-{candidate.name}-{steps}",
        run_dir=str(search_directory(recipe) / candidate.name),
        from_run=recipe.run_dir,
        prune=pruning(candidate, recipe.prune),
        teacher=replace(recipe.teacher, cache=cache),
        train=replace(recipe.train, steps=steps, phases=[], rampup_batch_size=None, keep_last=1),
        evaluate=_evaluation(recipe, steps),
        export=replace(recipe.export, formats=[]),
        search=SearchConfig(),
        cluster=replace(recipe.cluster, prune_nodes=None),
    )


def _evaluation(recipe: Recipe, steps: int) -> EvaluateConfig:
    """What is generated: as cut, a batch of `search.serving`, which tells the speed; training leaves that as it is."""
    config, serving = replace(recipe.evaluate, tasks=[]), recipe.search.serving
    if steps or not config.generate_tokens:
        return replace(config, generate_batch_sizes=config.generate_batch_sizes[:1])
    return replace(
        config,
        generate_batch_sizes=[serving.batch_size],
        generate_prompt_tokens=serving.prompt_tokens,
        generate_tokens=serving.new_tokens,
    )
