"""The shapes of a grid that lie within the budget, one by one: no list of the grid is made, no model is built.

Layers of a shape are alike, so its counts are affine in their number: the tables are asked for one layer and for two,
and all depths of a width follow. Only what passes the limits on parameters is priced further.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import inf, prod
from typing import Any

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.counts import non_embedding_parameters, parameters
from minitron_nemo.config import BudgetConfig, PruneConfig, SearchConfig
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.target import BY_INFLUENCE, target_architecture
from minitron_nemo.search.costs import Costs, costs

LETTERS = {
    Axis.LAYERS: "l",
    Axis.HIDDEN: "h",
    Axis.EXPERTS: "e",
    Axis.FFN: "f",
    Axis.MOE_FFN: "f",
    Axis.SHARED_FFN: "s",
    Axis.HEADS: "a",
    Axis.GROUPS: "g",
}
AXES = tuple(LETTERS)
EXPANSION = "ffn_expansion"


@dataclass(frozen=True)
class Candidate:
    """A shape within the budget."""

    architecture: Architecture
    costs: Costs

    @property
    def name(self) -> str:
        """What tells it from the other shapes of one teacher; also its directory."""
        return "-".join(f"{LETTERS[axis]}{size}" for axis, size in sizes(self.architecture).items())


@dataclass(frozen=True)
class Grid:
    """What there is to choose from: sizes of every axis that the teacher has, and what `base` says of all else.

    `expansions`, multiples of the hidden size, take the place of the sizes of `ffn_hidden_size` where there are any.
    Without sizes of `num_attention_heads`, groups keep all heads that they have.
    """

    teacher: Architecture
    base: Architecture
    values: Mapping[Axis, Sequence[int]]
    expansions: Sequence[Fraction]

    @property
    def size(self) -> int:
        """How many combinations there are, those included that no architecture can have."""
        return prod(map(len, self.values.values())) * (len(self.expansions) or 1)


def sizes(architecture: Architecture) -> dict[Axis, int]:
    """The sizes of a shape, by the axes that it has."""
    return {axis: architecture.size(axis) for axis in AXES if architecture.has(axis)}


def has_grid(config: SearchConfig) -> bool:
    """Whether the recipe gives the search anything to choose from."""
    return any(getattr(config, key) is not None for key in (*map(str, AXES), EXPANSION))


def grid(teacher: Architecture, prune: PruneConfig, config: SearchConfig) -> Grid:
    """The values of every axis; those that `search` does not give are what `prune` makes of the teacher.

    Raises UserError, naming the key, for values that the teacher cannot be cut to.
    """
    base = target_architecture(teacher, prune)
    _check_axes(teacher, prune, config)
    values = {axis: [size] for axis, size in sizes(base).items()}
    for axis in values:
        if (given := getattr(config, axis.value)) is not None:
            values[axis] = _values(axis, given, teacher.size(axis))
    expansions = _expansions(config)
    if expansions:
        del values[Axis.FFN]
    if config.num_query_groups is not None and config.num_attention_heads is None and prune.num_attention_heads is None:
        del values[Axis.HEADS]
    for heads in values.get(Axis.HEADS, ()):
        if not any(_pair(teacher, heads, groups) for groups in values[Axis.GROUPS]):
            raise UserError(
                f"search.num_attention_heads: {heads} is no multiple, up to {teacher.heads_per_group} times, of any "
                f"num_query_groups {values[Axis.GROUPS]}"
            )
    by_influence = config.num_layers is not None and prune.depth_method in BY_INFLUENCE
    if by_influence and values[Axis.LAYERS][0] == 1 < teacher.num_layers:
        raise UserError(
            f"search.num_layers: 1 is too few, {prune.depth_method} keeps the first and the last layer; begin with 2, "
            "or use another prune.depth_method"
        )
    topk = teacher.moe_router_topk or 0
    if (experts := values.get(Axis.EXPERTS)) and experts[0] < topk:
        raise UserError(
            f"search.num_moe_experts: {experts[0]} are too few, a token is routed to {topk}; begin with {topk}"
        )
    return Grid(teacher, base, values, expansions)


def shapes(grid: Grid) -> Iterator[tuple[Architecture, int, int]]:
    """Every shape of the grid with its parameters and non-embedding parameters, depth varying fastest.

    Sizes that `ffn_expansion` gives are skipped where the teacher's FFN is smaller. Raises UserError where an expansion
    of a hidden size is no whole number.
    """
    for width in _widths(grid):
        one, two = (grid.base.resized({**width, Axis.LAYERS: layers}) for layers in (1, 2))
        total, inside = parameters(one), non_embedding_parameters(one)
        a_layer = parameters(two) - total
        for layers in grid.values[Axis.LAYERS]:
            more = (layers - 1) * a_layer
            yield grid.base.resized({**width, Axis.LAYERS: layers}), total + more, inside + more


def candidates(grid: Grid, config: SearchConfig) -> Iterator[Candidate]:
    """The shapes of the grid that are within the budget, the teacher's own left out."""
    budget = config.budget
    for architecture, total, inside in shapes(grid):
        if sizes(architecture) == sizes(grid.teacher) or not _counts_fit(budget, total, inside):
            continue
        candidate = Candidate(architecture, costs(architecture, config.serving))
        if _within(None, candidate.costs.memory_bytes, budget.max_memory_bytes) and _within(
            None, candidate.costs.latency_seconds, budget.max_latency_seconds
        ):
            yield candidate


def _check_axes(teacher: Architecture, prune: PruneConfig, config: SearchConfig) -> None:
    """Raises UserError for axes that the teacher has not, and for two keys that say the same."""
    keys = {axis.value: axis for axis in AXES} | {EXPANSION: Axis.FFN}
    for key, axis in keys.items():
        if getattr(config, key) is not None and not teacher.has(axis):
            instead = "use search.moe_ffn_hidden_size" if axis == Axis.FFN else "leave it out"
            raise UserError(f"search.{key}: the layers of {teacher.family} have none; {instead}")
    if config.ffn_expansion is not None and config.ffn_hidden_size is not None:
        raise UserError("search.ffn_expansion: search.ffn_hidden_size is given too; keep one of the two")
    if config.num_layers is not None and prune.drop_layers is not None:
        raise UserError("search.num_layers: prune.drop_layers says which layers go; leave one of the two out")


def _widths(grid: Grid) -> Iterator[dict[Axis, int]]:
    """The grid without its depths."""
    axes: list[Axis] = [axis for axis in grid.values if axis != Axis.LAYERS]
    for combination in product(*(grid.values[axis] for axis in axes)):
        width = dict(zip(axes, combination, strict=True))
        width.setdefault(Axis.HEADS, width[Axis.GROUPS] * grid.teacher.heads_per_group)
        if not _pair(grid.teacher, width[Axis.HEADS], width[Axis.GROUPS]):
            continue
        if not grid.expansions:
            yield width
        for expansion in grid.expansions:
            ffn = _expanded(width[Axis.HIDDEN], expansion)
            if ffn <= grid.teacher.ffn_hidden_size:
                yield {**width, Axis.FFN: ffn}


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


def _expansions(config: SearchConfig) -> list[Fraction]:
    """As they are written: 4.15 of a hidden size is a whole number more often than the float next to it."""
    given = config.ffn_expansion
    if given is None:
        return []
    if not given or not all(0 < expansion < inf for expansion in given):
        raise UserError(f"search.{EXPANSION}: {given} must be a list of numbers greater than 0")
    return sorted({Fraction(str(expansion)) for expansion in given})


def _expanded(hidden: int, expansion: Fraction) -> int:
    ffn = expansion * hidden
    if ffn.denominator != 1:
        raise UserError(
            f"search.{EXPANSION}: {float(expansion)} x hidden_size {hidden} is {float(ffn)}, no whole number"
        )
    return int(ffn)


def _pair(teacher: Architecture, heads: int, groups: int) -> bool:
    """Whether every one of `groups` query groups can keep equally many of its heads."""
    return heads % groups == 0 and heads // groups <= teacher.heads_per_group
