"""What a search amounts to, before anything runs: its candidates, its updates, its cost; every key checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.config import Recipe, SearchConfig
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.plan_text import searched
from minitron_nemo.planning.disk import Kept
from minitron_nemo.preflight import Preflight, preflight
from minitron_nemo.pruning import depth, repair
from minitron_nemo.search.candidates import candidate_recipe
from minitron_nemo.search.costs import BYTES
from minitron_nemo.search.disk import search_disk
from minitron_nemo.search.shapes import Candidate, candidates, grid, has_grid

LAUNCHERS = ("none", "local", "slurm")


@dataclass(frozen=True)
class SearchPlan:
    """`grid_size` counts the grid's combinations, those that no architecture can have included.

    `world_size` is that of the job that every candidate runs in.
    """

    recipe: Recipe
    teacher: Architecture
    world_size: int
    grid_size: int
    candidates: tuple[Candidate, ...]

    @property
    def entrants(self) -> list[int]:
        """How many candidates every rung trains."""
        config, counts = self.recipe.search, []
        left = min(len(self.candidates), config.top_k or len(self.candidates))
        for _ in config.rungs:
            counts.append(left)
            left = ceil(left * config.keep)
        return counts

    @property
    def drops(self) -> set[int]:
        """How many layers the teacher is measured without, to choose those that candidates lose."""
        found = {depth.layers_to_drop(self.teacher, each.architecture, self.recipe.prune) for each in self.candidates}
        return found - {0}

    @property
    def depth_search(self) -> dict[str, float]:
        """What that takes for all candidates, as `Preflight.depth_search` has it for one."""
        layout = Layout.from_config(self.recipe.parallel)
        return depth.depth_search(self.teacher, layout, self.recipe.prune, self.drops, self.recipe.data.sequence_length)

    @property
    def tokens(self) -> dict[str, int]:
        """Positions that the search reads, calibration and what comes before it left out; of repairs in every pass.

        How long the sequences of a task are is not known before they are tokenised: with it depth has none.
        """
        recipe, length = self.recipe, self.recipe.data.sequence_length
        updates = sum(count * steps for count, steps in zip(self.entrants, recipe.search.rungs, strict=True))
        measured = recipe.prune.depth.samples * (recipe.prune.depth.metric == "loss") * bool(self.drops)
        return {
            "depth": measured * length,
            "repair": sum(passes for passes, _, _ in self._repairs) * recipe.prune.repair.samples * length,
            "distillation": updates * recipe.train.global_batch_size * length,
        }

    @property
    def flops(self) -> dict[str, int]:
        """Of the distillation at most: as if the largest candidates had got to every rung. Forward = 1, backward = 2.

        Of repairs without the systems that they solve.
        """
        recipe, length = self.recipe, self.recipe.data.sequence_length
        found, tokens = self.depth_search, self.tokens
        a_token = depth.flops_per_token(self.teacher, length, int(found["models"]), int(found["layer_evaluations"]))
        teacher = forward_flops_per_token(self.teacher, length)
        students = [forward_flops_per_token(each.architecture, length) for each in self.candidates]
        students.sort(reverse=True)
        distillation = sum(
            steps * recipe.train.global_batch_size * length * sum(teacher + 3 * student for student in students[:count])
            for count, steps in zip(self.entrants, recipe.search.rungs, strict=True)
        )
        return {
            "depth": a_token * tokens["depth"],
            "repair": sum(through + sums for _, through, sums in self._repairs) * recipe.prune.repair.samples * length,
            "distillation": distillation,
        }

    @property
    def disk(self) -> list[Kept]:
        """What the candidates take at most, beside the run's own files."""
        trained = max(self.entrants, default=0)
        return search_disk(self.recipe, self.teacher, self.candidates, trained, self.world_size)

    @property
    def _repairs(self) -> list[tuple[int, int, int]]:
        """Of every candidate: passes, and FLOPs of a token in all of them, and in what is summed."""
        recipe, layout = self.recipe, Layout.from_config(self.recipe.parallel)
        return [
            repair.planned(self.teacher, each.architecture, recipe.prune, layout, recipe.data.sequence_length)
            for each in self.candidates
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "grid": self.grid_size,
            "candidates": [{"name": each.name, **asdict(each.costs)} for each in self.candidates],
            "rungs": [list(rung) for rung in zip(self.recipe.search.rungs, self.entrants, strict=True)],
            "depth_search": self.depth_search if self.drops else None,
            "tokens": self.tokens,
            "flops": self.flops,
            "disk": [{**asdict(each), "total": each.total} for each in self.disk],
        }

    def text(self) -> str:
        """As a person reads it, in the manner of `minitron plan`."""
        rungs = [
            f"{count} of {steps} updates" for steps, count in zip(self.recipe.search.rungs, self.entrants, strict=True)
        ]
        rows = [
            ("search", f"{len(self.candidates)} candidates within the budget, of {self.grid_size:,} in the grid"),
            *(("", f"{each.name:<36}{priced(each)}") for each in self.candidates),
            *((("search, depth", searched(self.recipe.prune.depth, self.depth_search)),) if self.drops else ()),
            ("search, trainings", ", ".join(rungs) or "none"),
            *((f"tokens, search {name}", f"{count:,}") for name, count in self.tokens.items()),
            *(
                (f"FLOPs, search {name}", f"{'at most ' * (name == 'distillation')}{count:.3e} (arithmetic)")
                for name, count in self.flops.items()
            ),
            ("disk, search", _stored(self.disk)),
        ]
        return "\n".join(f"{name:<30}{value}" for name, value in rows)


def priced(candidate: Candidate) -> str:
    """The costs of a candidate in a line."""
    found = candidate.costs
    parts = [f"{found.parameters:,} parameters"]
    if found.active_parameters < found.parameters:
        parts.append(f"{found.active_parameters:,} for each token")
    parts.append(f"{found.memory_bytes / 1e9:.2f} GB")
    if found.latency_seconds is not None:
        parts.append(f"{found.latency_seconds:.3g} s")
    return ", ".join(parts)


def _stored(found: list[Kept]) -> str:
    kept = ", ".join(f"{each.what} {each.total / 1e9:.3g}" for each in found)
    return f"at most {sum(each.total for each in found) / 1e9:.3g} GB: {kept} (arithmetic)"


def plan_search(plan: Preflight) -> SearchPlan:
    """Check the `search` section against the model and the job of `plan`. Raises UserError naming the key.

    Every candidate's own recipe is checked as `minitron plan` would.
    """
    recipe, teacher = plan.recipe, plan.teacher
    config = recipe.search
    if not has_grid(config):
        raise UserError("search: gives no axis to choose from; list sizes, e.g. search.hidden_size=[3072,3584]")
    _check_values(recipe)
    if config.launcher != "none" and recipe.teacher.placement == "cached":
        raise UserError(
            f"search.launcher: {config.launcher} trains several candidates at once, and they would fill one "
            "teacher.cache; use launcher none, or another teacher.placement"
        )
    started = recipe.cluster.processes_per_node if recipe.cluster.launcher == "local" else 1
    if config.launcher == "local" and plan.world_size != started:
        raise UserError(
            f"search.launcher: local gives a training {started} of the {plan.world_size} processes that cluster.nodes "
            "and cluster.processes_per_node say; set cluster.launcher to local and cluster.nodes to 1"
        )
    if recipe.stages:
        raise UserError(
            "search: a recipe with stages cannot be searched; search the stage's shape by a recipe of its own"
        )
    if recipe.from_run is not None:
        raise UserError("search: its candidates take teacher and Scores from its own run; leave from_run out")
    choice = grid(teacher, recipe.prune, config)
    found = []
    for candidate in candidates(choice, config):
        found.append(candidate)
        if len(found) > config.max_candidates:
            raise UserError(
                f"search.max_candidates: more than {config.max_candidates} shapes of the grid are within the budget; "
                "narrow search.budget or the axes, or raise it"
            )
    if not found:
        raise UserError("search.budget: no shape of the grid is within it; `minitron plan` without it lists the shapes")
    for candidate in found:
        _check_recipe(candidate_recipe(recipe, candidate, 0), candidate.name, plan.world_size)
    for steps in config.rungs:
        _check_recipe(candidate_recipe(recipe, found[0], steps), "search.rungs", plan.world_size)
    found.sort(key=lambda each: -each.costs.parameters)
    return SearchPlan(recipe, teacher, plan.world_size, choice.size, tuple(found))


def _check_recipe(recipe: Recipe, name: str, world_size: int) -> None:
    try:
        preflight(recipe, world_size)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _check_values(recipe: Recipe) -> None:
    config = recipe.search
    if config.launcher not in LAUNCHERS:
        raise UserError(f"search.launcher: {config.launcher!r} is not one of {', '.join(LAUNCHERS)}")
    if config.budget.min_tokens_per_second is not None and not recipe.evaluate.generate_tokens:
        raise UserError("search.budget.min_tokens_per_second: needs evaluate.generate_tokens, which is 0")
    positive = {"max_candidates": config.max_candidates, "jobs": config.jobs, "top_k": config.top_k}
    for name, value in positive.items():
        if value is not None and value < 1:
            raise UserError(f"search.{name}: {value} must be greater than 0")
    if not 0 < config.keep <= 1:
        raise UserError(f"search.keep: {config.keep:g} must be a share, above 0 and up to 1")
    if any(steps < 1 for steps in config.rungs) or sorted(set(config.rungs)) != config.rungs:
        raise UserError(f"search.rungs: {config.rungs} must be numbers of updates, each larger than the one before")
    _check_serving(config)
    for what in ("parameters", "non_embedding_parameters"):
        least, most = (getattr(config.budget, f"{end}_{what}") for end in ("min", "max"))
        if least is not None and most is not None and least > most:
            raise UserError(f"search.budget.min_{what}: {least:g} is more than max_{what} {most:g}")


def _check_serving(config: SearchConfig) -> None:
    serving = config.serving
    if serving.dtype not in BYTES:
        raise UserError(f"search.serving.dtype: {serving.dtype!r} is not one of {', '.join(BYTES)}")
    for name, value in asdict(serving).items():
        if name != "dtype" and value is not None and value <= 0:
            raise UserError(f"search.serving.{name}: {value:g} must be greater than 0")
    device = {"peak_flops": serving.peak_flops, "bandwidth": serving.bandwidth}
    if missing := [name for name, value in device.items() if value is None]:
        needed = config.budget.max_latency_seconds is not None
        if needed or len(missing) == 1:
            raise UserError(f"search.serving.{missing[0]}: needed for the latency, by the roofline of a device")
