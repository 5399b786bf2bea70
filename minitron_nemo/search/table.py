"""The ranked table, as data and for people, and the section of a recipe that the winner is.

RUN/search/table.json, table.tsv, table.md     every candidate, best first; in table.json those without a loss apart
RUN/search/best.yaml                           the `prune` section that makes the best one, where one is usable

They are always of the search that was called last: it begins by removing those of others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import yaml

from minitron_nemo.arch import Axis
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.config import Recipe
from minitron_nemo.search.candidates import pruning, search_directory
from minitron_nemo.search.results import SCHEMA_VERSION, Standing, pareto, ranked, usable
from minitron_nemo.search.shapes import sizes

TABLES = ("table.json", "table.tsv", "table.md")
BEST = "best.yaml"

LABELS = {
    Axis.LAYERS: "layers",
    Axis.HIDDEN: "hidden",
    Axis.EXPERTS: "experts",
    Axis.FFN: "ffn",
    Axis.MOE_FFN: "expert ffn",
    Axis.SHARED_FFN: "shared ffn",
    Axis.HEADS: "heads",
    Axis.GROUPS: "groups",
}


def forget(recipe: Recipe) -> None:
    """Remove the table and the winner of an earlier search, which may have had other settings."""
    for name in (*TABLES, BEST):
        (search_directory(recipe) / name).unlink(missing_ok=True)


def rows(standings: Sequence[Standing], rungs: Sequence[int]) -> list[dict[str, Any]]:
    """One record per candidate, best first.

    `delta` is the loss minus that of the best candidate after the same updates, the last that this one got, paired by
    document. What is not finite is None, and `failure` says why.
    """
    front = pareto(standings)
    found = []
    for rank, standing in enumerate(ranked(standings), 1):
        last, candidate = standing.last, standing.candidate
        delta, delta_se = None, None
        if last.finite:
            rivals = [result for each in standings if (result := each.after(last.steps)) is not None and result.finite]
            delta, delta_se = last.minus(min(rivals, key=lambda result: result.loss))
        by_rung = {steps: result for steps in rungs if (result := standing.after(steps)) is not None}
        found.append(
            {
                "rank": rank,
                "name": candidate.name,
                **{axis.value: size for axis, size in sizes(candidate.architecture).items()},
                **asdict(candidate.costs),
                "losses": {str(steps): _finite(result.loss) for steps, result in by_rung.items()},
                "steps": last.steps,
                "loss": _finite(last.loss),
                "loss_se": _finite(last.loss_se),
                "kl_to_teacher": _finite(last.kl_to_teacher),
                "delta": delta,
                "delta_se": delta_se,
                "generation_tokens_per_second": standing.tokens_per_second,
                "pareto": candidate.name in front,
                "failure": last.failure,
            }
        )
    return found


def write_table(recipe: Recipe, standings: Sequence[Standing], rungs: Sequence[int]) -> str:
    """Write the table's files, and best.yaml if a candidate is `usable`; returns the table as markdown.

    `rungs` begin with 0, before training.
    """
    directory, found = search_directory(recipe), rows(standings, rungs)
    as_json, as_tsv, as_markdown = (directory / name for name in TABLES)
    content = {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.name,
        "search": asdict(recipe.search),
        "rungs": list(rungs),
        "candidates": [row for row in found if row["loss"] is not None],
        "failed": [row for row in found if row["loss"] is None],
    }
    write_atomic(as_json, json.dumps(content, indent=2) + "\n")
    axes = list(sizes(standings[0].candidate.architecture))
    cells = [_header(axes, rungs), *(_cells(row, axes, rungs) for row in found)]
    write_atomic(as_tsv, "".join("\t".join(line) + "\n" for line in cells))
    markdown = _markdown(cells)
    write_atomic(as_markdown, markdown + "\n")
    if winners := usable(standings, recipe.search.budget.min_tokens_per_second):
        write_atomic(directory / BEST, best(recipe, winners[0], len(standings)))
    else:
        (directory / BEST).unlink(missing_ok=True)  # of an earlier rung
    return markdown


def best(recipe: Recipe, winner: Standing, count: int) -> str:
    """The winner's `prune` section, with how to go on from it."""
    section = asdict(pruning(winner.candidate, recipe.prune))
    names = [axis.value for axis in sizes(winner.candidate.architecture)]
    chosen = {name: section[name] for name in names if section[name] is not None}
    overrides = " ".join(f"prune.{name}={size}" for name, size in chosen.items())
    return (
        f"# The best of {count} candidates of {recipe.name} after {winner.last.steps} updates: {winner.candidate.name},"
        f" loss {winner.last.loss:.4f}.\n"
        "# Put the sizes into the recipe's `prune` section, or behind the command:\n"
        f"#   minitron run RECIPE {overrides}\n" + yaml.safe_dump({"prune": chosen}, sort_keys=False)
    )


def _header(axes: Sequence[Axis], rungs: Sequence[int]) -> list[str]:
    losses = [f"loss after {steps}" if steps else "loss as cut" for steps in rungs]
    counts = ["parameters", *(["active"] if Axis.EXPERTS in axes else []), "memory, GB", "latency, s"]
    return ["", *(LABELS[axis] for axis in axes), *counts, *losses, "minus the best", "tokens/s", "Pareto"]


def _cells(row: dict[str, Any], axes: Sequence[Axis], rungs: Sequence[int]) -> list[str]:
    latency, speed = row["latency_seconds"], row["generation_tokens_per_second"]
    error = "" if row["delta_se"] is None else f" ± {row['delta_se']:.4f}"
    return [
        str(row["rank"]),
        *(str(row[axis.value]) for axis in axes),
        str(row["parameters"]),
        *([str(row["active_parameters"])] if Axis.EXPERTS in axes else []),
        f"{row['memory_bytes'] / 1e9:.4g}",
        "" if latency is None else f"{latency:.4g}",
        *(_loss(row["losses"][str(steps)]) if str(steps) in row["losses"] else "" for steps in rungs),
        f"{row['delta']:+.4f}{error}" if row["delta"] else "",
        "" if speed is None else f"{speed:.1f}",
        "yes" if row["pareto"] else "",
    ]


def _loss(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4f}"


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or not isfinite(value) else value


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
