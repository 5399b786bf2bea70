"""Comparisons judged by one rule, as markdown.

A difference is paired: by document, and by seed, which is an order of the text. It is resolved where its mean over
documents, seeds averaged before, is FLOOR and two standard errors over documents from 0 and all seeds have its sign.
Where the papers say that two are level, two standard errors around it must lie within MARGIN to agree; where they say
that nothing is gained, those on the side of a gain must.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Protocol

from benchmarks.bench import differences, standard_error
from benchmarks.claims.arms import Arm
from benchmarks.claims.claims import HIGHER, LEVEL, LOWER, NO_LOWER, Claim, Comparison
from minitron_nemo.importance.scores import Array

AGREES, CONTRADICTS, UNRESOLVED, NOT_SAID = "agrees", "does not", "not resolved", "papers do not say"
MARGIN, FLOOR = 0.02, 0.002  # nats
Losses = Mapping[int, Array]  # by seed: of every document


class Measured(Protocol):
    """Where losses are found; see `cells.Claims`."""

    def by_seed(self, arm: Arm, seeds: int) -> dict[int, Array]: ...


@dataclass(frozen=True)
class Difference:
    """Of two arms: mean and standard error over documents, and the mean of each seed that both have."""

    mean: float
    error: float
    seeds: tuple[float, ...]

    @staticmethod
    def of(own: Losses, others: Losses) -> Difference | None:
        """None where no seed has both."""
        if not own.keys() & others.keys():
            return None
        found = differences(dict(own), dict(others))
        means = tuple(float((own[seed] - others[seed]).mean()) for seed in sorted(own.keys() & others.keys()))
        return Difference(float(found.mean()), standard_error(found), means)

    @property
    def resolved(self) -> bool:
        return abs(self.mean) >= max(2 * self.error, FLOOR) and len({seed > 0 for seed in self.seeds}) == 1

    def verdict(self, said: str | None) -> str:
        if said is None:
            found = LOWER if self.mean < 0 else HIGHER
            return f"{NOT_SAID}; {found if self.resolved else UNRESOLVED}"
        if said in (LEVEL, NO_LOWER):
            apart = abs(self.mean) if said == LEVEL else -self.mean
            if apart + 2 * self.error <= MARGIN:
                return AGREES
            return CONTRADICTS if self.resolved and apart - 2 * self.error > MARGIN else UNRESOLVED
        if not self.resolved:
            return UNRESOLVED
        return AGREES if (self.mean < 0) == (said == LOWER) else CONTRADICTS

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Row:
    """A comparison of claim `number` as one model has it; `letter` is its place among the claim's."""

    model: str
    number: int
    letter: str
    comparison: Comparison
    difference: Difference

    @property
    def verdict(self) -> str:
        return self.difference.verdict(self.comparison.said)


def rows(number: int, claim: Claim, model: str, measured: Measured, seeds: int) -> Iterator[Row]:
    """What has been measured of a claim."""
    for letter, comparison in zip(ascii_lowercase, claim.comparisons, strict=False):
        own, other = measured.by_seed(comparison.own, seeds), measured.by_seed(comparison.other, seeds)
        difference = Difference.of(_for_seeds(own, comparison.own, other), _for_seeds(other, comparison.other, own))
        if difference is not None:
            yield Row(model, number, letter, comparison, difference)


def _for_seeds(losses: Losses, arm: Arm, others: Losses) -> Losses:
    """Losses on which seeds have no bearing are those of every seed of what they are compared with."""
    return losses if arm.seeded or not losses else dict.fromkeys(others, losses[0])


def summary(listed: Sequence[Claim], found: Sequence[Row]) -> str:
    """One row for each claim: what the papers say, how many comparisons of how many seeds say so on each model."""
    models = list(dict.fromkeys(row.model for row in found))
    lines = [f"| | the papers | where | {' | '.join(models)} |", "|---|---|---|" + "---|" * len(models)]
    for number, claim in enumerate(listed, start=1):
        counts = [_counted([row for row in found if (row.model, row.number) == (model, number)]) for model in models]
        lines.append(f"| {number} | {claim.statement} | {claim.source} | {' | '.join(counts)} |")
    return "\n".join(lines)


def _counted(found: Sequence[Row]) -> str:
    verdicts = [row.verdict for row in found if row.comparison.said is not None]
    if not verdicts:
        return "not measured"
    if len(set(verdicts)) == 1:
        text = verdicts[0] if len(verdicts) == 1 else f"{verdicts[0]}, {len(verdicts)} of {len(verdicts)}"
    else:
        text = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    seeds = [len(row.difference.seeds) for row in found if row.comparison.own.seeded or row.comparison.other.seeded]
    return f"{text} (seeds: {min(seeds)})" if seeds else text


def details(found: Sequence[Row]) -> str:
    """Every comparison that has been measured, claim by claim."""
    lines = [
        "| | model | loss of | minus that of | papers | difference | seed by seed | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: (row.number, row.letter)):
        own, other = row.comparison.own, row.comparison.other
        theirs = other.shown if own.shape == other.shape else f"{other.shape}: {other.shown}"
        seeds = ", ".join(f"{seed:+.3f}" for seed in row.difference.seeds) if own.seeded or other.seeded else ""
        arms = f"{own.shape}: {own.shown} | {theirs} | {row.comparison.said or ''}"
        lines.append(
            f"| {row.number}{row.letter} | {row.model} | {arms} | {row.difference} | {seeds} | {row.verdict} |"
        )
    return "\n".join(lines)


def reached(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Tokens at which a curve of (tokens, loss) first comes down to `loss`, on a line between points; None if never."""
    for (before, above), (tokens, below) in zip([(0.0, float("inf")), *curve], curve, strict=False):
        if below <= loss:
            share = 1.0 if above == float("inf") else (above - loss) / (above - below)
            return before + share * (tokens - before)
    return None
