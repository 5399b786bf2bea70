"""A run directory as the report sees it: every part is there or not yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minitron_nemo.arch import Plan
from minitron_nemo.arch.plan import FILE_NAME as PLAN_FILE
from minitron_nemo.checkpoint.files import read_json
from minitron_nemo.config import RECIPE_FILE, Recipe
from minitron_nemo.data.prepared import load_prepared
from minitron_nemo.distillation.records import read_metrics
from minitron_nemo.distillation.status import FILE_NAME as STATUS_FILE
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation import tasks
from minitron_nemo.evaluation.report import read_evaluation
from minitron_nemo.importance.scores import Scores
from minitron_nemo.manifest import FILE_NAME as MANIFEST_FILE
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.report.record import Record, read_record, step_of
from minitron_nemo.stages import STAGES

CANDIDATES_FILE = "search/table.json"
DEPTH_FILES = ("depth.npz", "search/depth.npz")  # of a run, and of its search, from which `score-depth` takes

# Directories below RUN/training are named MODEL-KEY; the steps that make them.
TRAININGS = {"corrected": "correct", "distilled": "distill"}


@dataclass(frozen=True)
class Training:
    """The records of one metrics.jsonl; `earlier` are the tokens of the trainings that its student goes back to."""

    records: Sequence[Mapping[str, Any]]
    earlier: float = 0.0

    @property
    def tokens(self) -> float:
        """Consumed by now."""
        return max((record.get("data/tokens", 0.0) for record in self.records), default=0.0)

    def series(self, tag: str) -> list[tuple[float, float]]:
        """(tokens consumed, value) of every record that has a finite value under `tag`.

        Validations do not say how many tokens were consumed: that is interpolated between reports, and not known before
        the first.
        """
        reports = [record for record in self.records if "data/tokens" in record]
        if not reports:
            return []
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
    stage: str | None  # that the directory is of
    status: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]  # records of manifest.json; the stage's own, without its name
    recipe: Recipe | None
    evaluation: Mapping[str, Mapping[str, Any]]  # by model; empty: not evaluated yet
    tasks: tasks.Content  # by model, as in evaluation; empty: none measured
    scores: Scores | None
    plan: Plan | None
    trainings: Mapping[str, Training]  # by name, of TRAININGS
    candidates: Sequence[Candidate]
    failed: int  # candidates that have no loss
    depth: DepthScores | None  # of the model that `scores` are of: what score-depth measured, or will take over
    baseline: Training | None  # of another run
    outdated: Mapping[str, str]  # models of `evaluation` that a step has made anew since, or is making: with that step
    outdated_tasks: Mapping[str, str]  # the same of `tasks`

    @property
    def name(self) -> str:
        name = self.recipe.name if self.recipe else self.directory.resolve().name
        return name if self.stage is None else f"{name}, stage {self.stage}"

    @property
    def stages(self) -> Mapping[str, Path]:
        """Directories of its stages, which need not be there yet; none for a run without them, and for a stage."""
        return {name: self.directory / STAGES / name for name in (self.recipe.stages if self.recipe else ())}


def read_run(directory: Path, baseline: Path | None = None) -> Run:
    """Read what is there of a run, or of one of its stages (RUN/stages/NAME); a job may be writing meanwhile.

    `baseline` is another run whose training this one's is compared with. Raises UserError for what is no run
    directory, or damaged, and for a baseline without validations, or with those of other documents.
    """
    record = _record(directory)
    own = step_of(record.stage, "")
    scores_file = (record.lender or directory) / "scores.npz"
    scores = Scores.load(scores_file) if scores_file.is_file() else None
    measured = directory / "evaluation.json"
    evaluation = read_evaluation(measured) if measured.exists() else {}
    on_tasks = tasks.read_tasks(directory / tasks.FILE_NAME)
    plans = [directory / name / PLAN_FILE for name in ("pruned", "plan")]
    candidates, failed = _candidates(directory / CANDIDATES_FILE)
    return Run(
        directory=directory,
        stage=record.stage,
        status={**record.status, "step": (record.status.get("step") or "").removeprefix(own)} if record.status else {},
        steps={name.removeprefix(own): step for name, step in record.steps.items() if name.startswith(own)},
        recipe=record.recipe,
        evaluation=evaluation,
        tasks=on_tasks,
        scores=scores,
        plan=next((Plan.load(path) for path in plans if path.is_file()), None),
        trainings=_trainings(record),
        candidates=candidates,
        failed=failed,
        depth=_depth(record, directory, scores),
        baseline=None if baseline is None else read_baseline(baseline, record),
        outdated=record.outdated_evaluation(evaluation),
        outdated_tasks=record.outdated_tasks(on_tasks),
    )


def read_baseline(directory: Path, run: Record) -> Training:
    """The training of a run that has held-out losses: the last that its student went through.

    Raises UserError where there is none, and where they are not of the documents that `run` is measured on.
    """
    baseline = _record(directory)
    for record in (run, baseline):
        if record.recipe and record.recipe.stages:
            raise UserError(
                f"--baseline: {record.home} has stages, each with its training; give {record.home / STAGES}/NAME"
            )
    found = _trainings(baseline)
    for name in ("distilled", "corrected"):
        if name in found and found[name].series("validation/loss"):
            ours, its = _measured_on(run), _measured_on(baseline)
            if others := [key for key in ours if ours[key] != its[key]]:
                raise UserError(
                    f"--baseline {directory}: its {' and '.join(others)} are not those of {run.directory(run.stage)}; "
                    "losses compare on the same documents only, give a run that was measured on these"
                )
            return found[name]
    raise UserError(
        f"--baseline {directory}: no training in it has held-out losses yet; give it train.eval_interval, or wait for "
        "its first report"
    )


def _record(directory: Path) -> Record:
    record = read_record(directory)
    if not any((record.home / name).is_file() for name in (STATUS_FILE, MANIFEST_FILE, RECIPE_FILE)):
        raise UserError(f"{directory}: not a run directory; give the run_dir of a recipe that has been started")
    return record


def _measured_on(record: Record) -> dict[str, Any]:
    """What decides which documents held-out losses are of. Raises UserError where it is not there any more."""
    recipe = record.recipe
    if recipe is None:
        raise UserError(f"{record.home}: no {RECIPE_FILE} in it, which says what was measured on; run its recipe again")
    own = [record.directory(stage) / "data" for stage in (record.stage, *reversed(record.before)) if stage is not None]
    shared = (record.lender or record.home) / "data"
    prepared = load_prepared(next((path for path in own if path.is_dir()), shared))
    return {
        "held-out documents": [source.heldout.sha256 for source in prepared.sources if source.heldout],
        "evaluate.documents": recipe.evaluate.documents,
        "evaluate.sequence_length": recipe.evaluate.sequence_length or recipe.data.sequence_length,
        "data.separator_weight": recipe.data.separator_weight,
    }


def _trainings(record: Record) -> dict[str, Training]:
    """The distillation of a run or of a stage, and the correction of the teacher, which may be in another run."""
    corrected = _training(record if record.lender is None else read_record(record.lender), None, "corrected")
    distilled = _training(record, record.stage, "distilled")
    found = {} if corrected is None else {"corrected": corrected}
    if distilled is not None:
        earlier = [corrected, *(_training(record, stage, "distilled") for stage in record.before)]
        tokens = sum(training.tokens for training in earlier if training is not None)
        found["distilled"] = replace(distilled, earlier=tokens)
    return found


def _training(record: Record, stage: str | None, name: str) -> Training | None:
    """The one that the manifest's output came from; the newest while there is none, or another one runs."""
    step = step_of(stage, TRAININGS[name])
    places = (record.directory(stage) / "training").glob(f"{name}-*/metrics.jsonl")
    paths = sorted(places, key=lambda path: path.stat().st_mtime_ns)
    if step in record.steps and not record.underway(step):
        key = record.steps[step]["key"][:8]
        paths = [path for path in paths if path.parent.name == f"{name}-{key}"]
    return Training(records) if paths and (records := read_metrics(paths[-1])) else None


def _depth(record: Record, directory: Path, scores: Scores | None) -> DepthScores | None:
    """The run's own, else what `score-depth` takes over from the lender or a search; not that of another model."""
    shared = record.lender or record.home
    for path in (directory / DEPTH_FILES[0], *(shared / name for name in DEPTH_FILES)):
        found = DepthScores.load(path) if path.is_file() else None
        if found and scores and found.identity.get("model_fingerprint") == scores.model_fingerprint:
            return found
    return None


def _candidates(path: Path) -> tuple[list[Candidate], int]:
    """What `minitron search` has ranked so far, of its columns those that are shown; and how many have failed."""
    known = Candidate.__dataclass_fields__
    if not path.exists():
        return [], 0
    try:
        content = read_json(path, "search again")
        rows, failed = content["candidates"], len(content.get("failed", ()))  # tables have not always had them apart
        return [Candidate(**{key: value for key, value in row.items() if key in known}) for row in rows], failed
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a table of candidates ({error}); search again") from None
