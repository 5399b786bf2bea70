"""What the search knows of a candidate after some updates, on disk and compared with the others.

    RUN/search/NAME/result_100.json     what evaluation.json said then; the next rung's training replaces that file

A result has the key of what it was measured with: teacher, text, Scores and all settings that decide it. Another recipe
finds other keys, and measures again. That a training diverged is a result, too; the loss is NaN then, as that of any
candidate that failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from minitron_nemo.chain import Chain
from minitron_nemo.checkpoint.files import read_json, to_json, write_atomic
from minitron_nemo.evaluation.report import with_numbers
from minitron_nemo.manifest import step_key
from minitron_nemo.parallel import launch
from minitron_nemo.search.costs import Costs
from minitron_nemo.search.shapes import Candidate
from minitron_nemo.steps import fingerprint_of

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Result:
    """A candidate after `steps` updates. `losses` are those of the documents, the same ones for every candidate.

    `failure` says why there is no loss.
    """

    steps: int
    loss: float
    loss_se: float | None
    kl_to_teacher: float
    losses: tuple[float, ...]
    tokens_per_second: float | None
    failure: str | None = None

    @property
    def finite(self) -> bool:
        """Whether there is a loss to rank it by."""
        return isfinite(self.loss)

    @staticmethod
    def of(steps: int, evaluation: Mapping[str, Any]) -> Result:
        """Out of the content of evaluation.json."""
        record = evaluation["distilled" if steps else "pruned"]
        failure = None if isfinite(record["loss"]) else "its held-out loss is not finite"
        return Result(
            steps=steps,
            loss=record["loss"],
            loss_se=record["loss_se"],
            kl_to_teacher=record["kl_to_teacher"],
            losses=tuple(record["losses_per_document"]),
            tokens_per_second=record["generation_tokens_per_second"],
            failure=failure,
        )

    @staticmethod
    def failed(steps: int, failure: str) -> Result:
        """Of a candidate that did not get so far."""
        return Result(steps, nan, None, nan, (), None, failure)

    def minus(self, other: Result) -> tuple[float, float | None]:
        """Difference of the losses, paired by document, with its standard error; None for a single document."""
        differences = np.array(self.losses) - np.array(other.losses)
        count = len(differences)
        error = float(differences.std(ddof=1)) / sqrt(count) if count > 1 else None
        return float(differences.mean()), error


def result_key(chain: Chain) -> str | None:
    """What decides a candidate's result; None while teacher, text or Scores are not there. Collective."""
    shared = {"teacher": chain.teacher, "data": chain.prepared / "prepared.json", "scores": chain.scores}
    found = launch.from_rank_0(lambda: {name: fingerprint_of(path) for name, path in shared.items()})
    known = {name: mark for name, mark in found.items() if mark is not None}
    if len(known) < len(found):
        return None
    return step_key(known, {step.record: dict(step.settings) for step in chain.steps()})


def load_result(path: Path, key: str | None) -> Result | None:
    """The result in the file if it was measured with `key`. Raises UserError for a damaged file."""
    if key is None or not path.exists():
        return None
    data = read_json(path, "remove it, and it is measured again")
    if data.get("schema_version") != SCHEMA_VERSION or data.get("key") != key:
        return None
    if "failure" in data:
        return Result.failed(data["steps"], data["failure"])
    return Result.of(data["steps"], with_numbers(data["evaluation"]))


def save_result(path: Path, key: str, steps: int, evaluation: Mapping[str, Any]) -> Result:
    """Keep what evaluation.json says now."""
    content = {"schema_version": SCHEMA_VERSION, "key": key, "steps": steps, "evaluation": evaluation}
    write_atomic(path, to_json(content) + "\n")
    return Result.of(steps, evaluation)


def save_failure(path: Path, key: str, steps: int, failure: str) -> None:
    """Keep that it failed, and will again with the same settings."""
    content = {"schema_version": SCHEMA_VERSION, "key": key, "steps": steps, "failure": failure}
    write_atomic(path, to_json(content) + "\n")


@dataclass(frozen=True)
class Standing:
    """A candidate and its results by updates, those of the last rung it came to last."""

    candidate: Candidate
    results: tuple[Result, ...]

    @property
    def last(self) -> Result:
        return self.results[-1]

    @property
    def costs(self) -> Costs:
        return self.candidate.costs

    @property
    def tokens_per_second(self) -> float | None:
        """As measured before any training, which leaves it as it is; None where nothing was generated."""
        return self.results[0].tokens_per_second

    def after(self, steps: int) -> Result | None:
        """Its result after so many updates; None if it never got there."""
        return next((result for result in self.results if result.steps == steps), None)


def ranked(standings: Sequence[Standing]) -> list[Standing]:
    """Best first: by the rung reached, then by the loss there; equal ones as they came, and last those without one."""
    return sorted(standings, key=lambda each: (not each.last.finite, -each.last.steps, each.last.loss))


def usable(standings: Sequence[Standing], min_tokens_per_second: float | None) -> list[Standing]:
    """Those that have a loss and generate so fast, best first."""
    least = min_tokens_per_second or 0.0
    return [each for each in ranked(standings) if each.last.finite and (each.tokens_per_second or 0.0) >= least]


def survivors(standings: Sequence[Standing], keep: float) -> list[Standing]:
    """The share `keep` of these, rounded up, with the lowest losses; none without a loss."""
    return [each for each in ranked(standings)[: ceil(len(standings) * keep)] if each.last.finite]


def pareto(standings: Sequence[Standing]) -> set[str]:
    """Names of the candidates that no other dominates in parameters, active ones, memory, latency, speed and loss.

    A candidate is compared with all that were measured after the last updates it got: losses after different numbers of
    updates do not compare. One without a loss is neither on the front nor in the way of others.
    """
    return {
        each.candidate.name
        for each in standings
        if each.last.finite
        and not any(
            _dominates(other, each, result)
            for other in standings
            if (result := other.after(each.last.steps)) is not None and result.finite
        )
    }


def _dominates(other: Standing, each: Standing, result: Result) -> bool:
    theirs, own = (*_costs(other), result.loss), (*_costs(each), each.last.loss)
    return theirs != own and all(a <= b for a, b in zip(theirs, own, strict=True))


def _costs(standing: Standing) -> tuple[float, ...]:
    found, speed = standing.costs, standing.tokens_per_second or 0.0
    return found.parameters, found.active_parameters, found.memory_bytes, found.latency_seconds or 0.0, -speed
