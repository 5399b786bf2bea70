"""A run directory as the report sees it: every part is there or not yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron_nemo.arch import Plan
from minitron_nemo.arch.plan import FILE_NAME as PLAN_FILE
from minitron_nemo.checkpoint.files import read_json
from minitron_nemo.config import RECIPE_FILE, Recipe, load_recipe
from minitron_nemo.distillation.records import read_metrics
from minitron_nemo.distillation.status import FILE_NAME as STATUS_FILE
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation import tasks
from minitron_nemo.importance.scores import Scores
from minitron_nemo.manifest import FILE_NAME as MANIFEST_FILE
from minitron_nemo.manifest import Manifest
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.stages import STAGES, stage_recipes

CANDIDATES_FILE = "search/table.json"
DEPTH_FILE = "depth.npz"

# Directories below RUN/training are named MODEL-KEY; the steps that make them.
TRAININGS = {"corrected": "correct", "distilled": "distill"}

# What a measured model is the output of: one of these steps, those of the run or of the stage itself.
MAKERS = {
    "distilled": ("distill",),
    "pruned": ("prune",),
    "teacher": ("correct", "convert"),
    "corrected": ("correct",),
    "source": ("convert",),
}


@dataclass(frozen=True)
class Training:
    """The records of one metrics.jsonl."""

    records: Sequence[Mapping[str, Any]]

    def series(self, tag: str) -> list[tuple[float, float]]:
        """(tokens consumed, value) of every record that has a finite value under `tag`.

        Validations do not say how many tokens were consumed: that is interpolated between reports.
        """
        reports = [record for record in self.records if "data/tokens" in record]
        iterations = [0, *(record["iteration"] for record in reports)]
        tokens = [0.0, *(record["data/tokens"] for record in reports)]
        found = [record for record in self.records if record.get(tag) is not None]
        consumed = np.interp([record["iteration"] for record in found], iterations, tokens)
        return [(at, record[tag]) for at, record in zip(consumed.tolist(), found, strict=True)]


@dataclass(frozen=True)
class Candidate:
    """A shape that a search distilled briefly, for `steps` updates. Loss in nats per token, latency in seconds."""

    name: str
    parameters: int
    steps: int
    loss: float
    pareto: bool
    loss_se: float | None = None
    latency_seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """What a run directory holds by now."""

    directory: Path
    status: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]  # records of manifest.json
    recipe: Recipe | None
    evaluation: Mapping[str, Mapping[str, Any]]  # by model; empty: not evaluated yet
    tasks: tasks.Content  # by model, as in evaluation; empty: none measured
    scores: Scores | None
    plan: Plan | None
    trainings: Mapping[str, Training]  # by name, of TRAININGS
    candidates: Sequence[Candidate]
    depth: DepthScores | None  # what score-depth measured
    baseline: Training | None  # of another run
    outdated: Mapping[str, str]  # models of `evaluation` that a step has made anew since, or is making: with that step
    outdated_tasks: Mapping[str, str]  # the same of `tasks`

    @property
    def name(self) -> str:
        return self.recipe.name if self.recipe else self.directory.resolve().name


def read_run(directory: Path, baseline: Path | None = None) -> Run:
    """Read what is there of a run, or of one of its stages (RUN/stages/NAME); a job may be writing meanwhile.

    `baseline` is another run whose training this one's is compared with. Raises UserError for what is no run
    directory, or damaged, and for a baseline without validations.
    """
    home, stage = (directory.parents[1], directory.name) if directory.parent.name == STAGES else (directory, None)
    if not any((home / name).is_file() for name in (STATUS_FILE, MANIFEST_FILE, RECIPE_FILE)):
        raise UserError(f"{directory}: not a run directory; give the run_dir of a recipe that has been started")
    status = _json(home / STATUS_FILE)
    steps = Manifest(home).steps
    recipe = load_recipe(home / RECIPE_FILE) if (home / RECIPE_FILE).is_file() else None
    if stage is not None:  # what is its own, under the names of a run without stages
        own = f"{stage}/"
        status = {**status, "step": (status.get("step") or "").removeprefix(own)}
        steps = {name.removeprefix(own): step for name, step in steps.items() if name.startswith(own)}
        recipe = stage_recipes(recipe).get(stage) if recipe else None
    scores = directory / "scores.npz"
    evaluation = _json(directory / "evaluation.json")
    on_tasks = tasks.read_tasks(directory / tasks.FILE_NAME)
    measured = {name: steps.get("evaluate", {"inputs": {}})["inputs"].get(name) for name in evaluation}
    plans = [directory / name / PLAN_FILE for name in ("pruned", "plan")]
    return Run(
        directory=directory,
        status=status,
        steps=steps,
        recipe=recipe,
        evaluation=evaluation,
        tasks=on_tasks,
        scores=Scores.load(scores) if scores.is_file() else None,
        plan=next((Plan.load(path) for path in plans if path.is_file()), None),
        trainings=_trainings(directory, status, steps),
        candidates=_candidates(directory / CANDIDATES_FILE),
        depth=DepthScores.load(directory / DEPTH_FILE) if (directory / DEPTH_FILE).is_file() else None,
        baseline=None if baseline is None else read_baseline(baseline),
        outdated=_outdated(measured, status, steps),
        outdated_tasks=_outdated({name: model.get("fingerprint") for name, model in on_tasks.items()}, status, steps),
    )


def read_baseline(directory: Path) -> Training:
    """The training of a run that has held-out losses: the last that its student went through.

    Raises UserError where there is none.
    """
    found = read_run(directory).trainings
    for name in ("distilled", "corrected"):
        if name in found and found[name].series("validation/loss"):
            return found[name]
    raise UserError(f"--baseline {directory}: no training in it has held-out losses; give it train.eval_interval")


def _trainings(directory: Path, status: Mapping[str, Any], steps: Mapping[str, Any]) -> dict[str, Training]:
    """Of each name the one that the manifest's output came from; the newest while none has, or another one runs."""
    found = {}
    for name, step in TRAININGS.items():
        paths = sorted(directory.glob(f"training/{name}-*/metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        if step in steps and not _underway(step, status):
            recorded = directory / "training" / f"{name}-{steps[step]['key'][:8]}" / "metrics.jsonl"
            paths = [path for path in paths if path == recorded]
        if paths and (records := read_metrics(paths[-1])):
            found[name] = Training(records)
    return found


def _underway(step: str, status: Mapping[str, Any]) -> bool:
    """Whether the run is in this step, or ended in it before it was done."""
    return status.get("step") == step and status.get("state") != "done"


def _outdated(
    measured: Mapping[str, str | None], status: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Of the `measured` models, by fingerprint, those that a step has since made anew or is making; with that step."""
    found = {}
    for name, mark in measured.items():
        makers = [step for step in MAKERS.get(name, ()) if step in steps]
        if underway := [step for step in MAKERS.get(name, ()) if _underway(step, status)]:
            found[name] = underway[0]
        elif mark is not None and makers and mark not in [steps[step]["output"] for step in makers]:
            found[name] = makers[0]
    return found


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, nothing where there is none."""
    return read_json(path, "run the step that writes it again") if path.exists() else {}


def _candidates(path: Path) -> list[Candidate]:
    """What `minitron search` has ranked so far; of its columns those that are shown."""
    known = Candidate.__dataclass_fields__
    try:
        rows = _json(path)["candidates"] if path.exists() else []
        return [Candidate(**{key: value for key, value in row.items() if key in known}) for row in rows]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a table of candidates ({error}); search again") from None
