"""The shapes of a grid that lie within the budget, one by one: no list of the grid is made, no model is built.

Layers of a shape are alike, so its counts are affine in their number: the tables are asked for one layer and for two,
and all depths of a width follow. Only what passes the limits on parameters is priced further.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.counts import non_embedding_parameters, parameters
from minitron_nemo.config import BudgetConfig, PruneConfig, SearchConfig
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.target import target_architecture
from minitron_nemo.search.costs import Costs, costs

AXES = (Axis.LAYERS, Axis.HIDDEN, Axis.FFN, Axis.HEADS, Axis.GROUPS)
EXPANSION = "ffn_expansion"


@dataclass(frozen=True)
class Candidate:
    """A shape within the budget."""

    architecture: Architecture
    costs: Costs

    @property
    def name(self) -> str:
        """What tells it from the other shapes of one teacher; also its directory."""
        a = self.architecture
        heads = f"a{a.num_attention_heads}-g{a.num_query_groups}"
        return f"l{a.num_layers}-h{a.hidden_size}-f{a.ffn_hidden_size}-{heads}"


def has_grid(config: SearchConfig) -> bool:
    """Whether the recipe gives the search anything to choose from."""
    return any(getattr(config, key) is not None for key in (*map(str, AXES), EXPANSION))


def grid(teacher: Architecture, prune: PruneConfig, config: SearchConfig) -> dict[Axis, list[int]]:
    """The values of every axis; those that `search` does not give are what `prune` makes of the teacher.

    `ffn_expansion` has no sizes before a hidden size is chosen, and leaves the axis' own list empty. Raises UserError,
    naming the key, for values that the teacher cannot be cut to.
    """
    fixed = target_architecture(teacher, prune)
    values = {axis: [fixed.size(axis)] for axis in AXES}
    for axis in AXES:
        if (given := getattr(config, axis.value)) is not None:
            values[axis] = _values(axis, given, teacher.size(axis))
    if config.ffn_expansion is not None:
        if config.ffn_hidden_size is not None:
            raise UserError("search.ffn_expansion: search.ffn_hidden_size is given too; keep one of the two")
        if not config.ffn_expansion or min(config.ffn_expansion) <= 0:
            raise UserError(f"search.{EXPANSION}: {config.ffn_expansion} must be a list of numbers greater than 0")
        values[Axis.FFN] = []
    if config.num_layers is not None and prune.drop_layers is not None:
        raise UserError("search.num_layers: prune.drop_layers says which layers go; leave one of the two out")
    if config.num_query_groups is not None and config.num_attention_heads is None and prune.num_attention_heads is None:
        values[Axis.HEADS] = sorted({groups * teacher.heads_per_group for groups in values[Axis.GROUPS]})
    for heads in values[Axis.HEADS]:
        if not any(_pair(teacher, heads, groups) for groups in values[Axis.GROUPS]):
            raise UserError(
                f"search.num_attention_heads: {heads} is no multiple, up to {teacher.heads_per_group} times, of any "
                f"num_query_groups {values[Axis.GROUPS]}"
            )
    if values[Axis.LAYERS][0] == 1 < teacher.num_layers and config.num_layers is not None:
        raise UserError("search.num_layers: 1 is too few, the first and the last layer stay; begin with 2")
    return values


def shapes(
    teacher: Architecture, values: dict[Axis, list[int]], config: SearchConfig
) -> Iterator[tuple[Architecture, int, int]]:
    """Every shape of the grid with its parameters and non-embedding parameters, depth varying fastest.

    Sizes that `ffn_expansion` gives are skipped where the teacher's FFN is smaller. Raises UserError where an expansion
    of a hidden size is no whole number.
    """
    for hidden, heads, groups in product(values[Axis.HIDDEN], values[Axis.HEADS], values[Axis.GROUPS]):
        if not _pair(teacher, heads, groups):
            continue
        for ffn in values[Axis.FFN] or _expanded(hidden, config.ffn_expansion or [], teacher):
            sizes = {Axis.HIDDEN: hidden, Axis.FFN: ffn, Axis.HEADS: heads, Axis.GROUPS: groups}
            one, two = (teacher.resized({**sizes, Axis.LAYERS: layers}) for layers in (1, 2))
            total, inside = parameters(one), non_embedding_parameters(one)
            a_layer = parameters(two) - total
            for layers in values[Axis.LAYERS]:
                more = (layers - 1) * a_layer
                yield teacher.resized({**sizes, Axis.LAYERS: layers}), total + more, inside + more


def candidates(teacher: Architecture, values: dict[Axis, list[int]], config: SearchConfig) -> Iterator[Candidate]:
    """The shapes of the grid that are within the budget, the teacher's own left out."""
    budget = config.budget
    for architecture, total, inside in shapes(teacher, values, config):
        if architecture == teacher or not _counts_fit(budget, total, inside):
            continue
        candidate = Candidate(architecture, costs(architecture, config.serving))
        if _within(None, candidate.costs.memory_bytes, budget.max_memory_bytes) and _within(
            None, candidate.costs.latency_seconds, budget.max_latency_seconds
        ):
            yield candidate


def _counts_fit(budget: BudgetConfig, total: int, inside: int) -> bool:
    return _within(budget.min_parameters, total, budget.max_parameters) and _within(
        budget.min_non_embedding_parameters, inside, budget.max_non_embedding_parameters
    )


def _within(least: float | None, value: float | None, most: float | None) -> bool:
    """Limits that are not given hold; a value of None has none given."""
    return value is None or ((least is None or least <= value) and (most is None or value <= most))


def _values(axis: Axis, given: Any, most: int) -> list[int]:
    """The sizes that a key of `search` asks for, ascending."""
    key = f"search.{axis}"
    if isinstance(given, dict):
        given = _multiples(key, given, most)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise UserError(f"{key}: {given!r} is neither a list of sizes nor {{min, max, divisor}}")
    for size in given:
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise UserError(f"{key}: {size!r} is not a size to prune to; the source has {most}")
    return sorted(set(given))


def _multiples(key: str, given: dict[str, Any], most: int) -> list[int]:
    """All multiples of `divisor` from `min` to `max`, which is the source's size unless it is given."""
    known = {"min", "max", "divisor"}
    if unknown := sorted(map(str, given.keys() - known)):
        raise UserError(f"{key}.{unknown[0]}: no such key; a range has min, max and divisor")
    bounds = {"divisor": 1, "max": most, **given}
    for name, value in bounds.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}.{name}: {value!r} must be a whole number greater than 0")
    if "min" not in given:
        raise UserError(f"{key}.min: required, but not given")
    divisor = bounds["divisor"]
    found = list(range(-(-bounds["min"] // divisor) * divisor, bounds["max"] + 1, divisor))
    if not found:
        raise UserError(f"{key}: no multiple of {divisor} lies between {bounds['min']} and {bounds['max']}")
    return found


def _expanded(hidden: int, expansions: Sequence[float], teacher: Architecture) -> Iterator[int]:
    for expansion in sorted(set(expansions)):
        ffn = expansion * hidden
        if ffn != int(ffn):
            raise UserError(f"search.{EXPANSION}: {expansion:g} x hidden_size {hidden} is {ffn:g}, no whole number")
        if ffn <= teacher.ffn_hidden_size:
            yield int(ffn)


def _pair(teacher: Architecture, heads: int, groups: int) -> bool:
    """Whether every one of `groups` query groups can keep equally many of its heads."""
    return heads % groups == 0 and heads // groups <= teacher.heads_per_group
