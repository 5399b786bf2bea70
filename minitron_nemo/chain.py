"""The chain of steps.

    convert -> prepare -> (correct) -> calibrate -> (score-depth) -> (repair) -> prune -> (cache-teacher) -> (distill)
        -> evaluate -> (export) -> (tasks) -> report

A recipe with stages has the steps from `calibrate` on once for each: a stage cuts the student of the one before. In the
end comes a page that leads to those of the stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minitron_nemo.arch import Plan
from minitron_nemo.config import RECIPE_FILE, TrainConfig
from minitron_nemo.data.prepare import inputs_stamp
from minitron_nemo.distillation.train import correction_config
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch
from minitron_nemo.preflight import Preflight
from minitron_nemo.report.page import FILE_NAME as REPORT_FILE
from minitron_nemo.report.page import write_page
from minitron_nemo.report.read import read_run
from minitron_nemo.steps import Step, inputs_of, is_done, outdated
from minitron_nemo.work import Work

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


class Chain(Work):
    """The steps of one recipe, or of a stage of one."""

    def steps(self) -> list[Step]:
        """All steps of the recipe, or of the stage, in order."""
        own = [replace(step, stage=self.plan.stage) for step in self._own_steps()]
        return own if self.before is not None else [*self._first_steps(), *own]

    def planned(self) -> Plan:
        """As of `Work`; a repaired Plan has to be what the manifest says of this recipe and of what is there now."""

        def check() -> None:
            for step in self._repairing():
                reason = outdated(replace(step, stage=self.plan.stage), self.run_dir)
                if reason is not None:
                    raise UserError(f"{step.output}: {reason}; run {self._command(step.name)} first")

        launch.from_rank_0(check)
        return super().planned()

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
            *self._repairing(),
            Step("prune", {**source, **chosen}, self._cut(), self.pruned, self._prune),
            *self._caching({**teacher, **data}),
        ]
        if recipe.train.steps:
            inputs = {**teacher, "pruned": self.pruned, **data, **({"cache": self.cached} if self._reads_cache else {})}
            settings = {"distill": asdict(recipe.distill), "train": _numerics(recipe.train), "data": visits}
            steps.append(Step("distill", inputs, settings, self.distilled, self._distill))
        shown = {"recipe": self.run_dir / RECIPE_FILE, "evaluation": self.evaluation, "scores": self.scores}
        steps.append(Step("evaluate", {**self._models(), **data}, self._measuring(), self.evaluation, self._evaluate))
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

    def _measuring(self) -> dict[str, Any]:
        """What decides the figures of given models and text, however the models came about."""
        recipe = self.recipe
        settings = {key: value for key, value in asdict(recipe.evaluate).items() if key != "tasks"}
        settings["sequence_length"] = recipe.evaluate.sequence_length or recipe.data.sequence_length
        return settings | {"separator_weight": recipe.data.separator_weight, "precision": recipe.train.precision}

    @property
    def _data(self) -> dict[str, Path]:
        return {"data": self.prepared / "prepared.json"}

    def _preparation(self) -> Step:
        tokenizer = {"tokenizer": self.converted / "tokenizer"}
        return Step("prepare", tokenizer, self._text(), self._data["data"], self._prepare)

    def _repairing(self) -> list[Step]:
        if not self._repairs:
            return []
        inputs = {"source": self.source, **self._data, **self._plan_input()}
        settings = {**self._cut(), "data": asdict(self.recipe.data)}
        return [Step("repair", inputs, settings, self.repaired, self._repair)]

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
    steps = chain.steps()
    return all(
        step.output.exists() and (step.finds_out or is_done(step, inputs_of(step, steps), chain.run_dir))
        for step in steps
    )


def _numerics(config: TrainConfig) -> dict[str, Any]:
    """The settings of `train` that decide the weights; intervals, console and overlap do not."""
    intervals = ("log_interval", "eval_interval", "save_interval", "keep_last", "fail_on_save_error", "async_save")
    neutral = (*intervals, "peak_flops", "max_nonfinite_steps", "hang_timeout", "recompute")
    settings = {key: value for key, value in asdict(config).items() if key not in neutral}
    return {key: value for key, value in settings.items() if not key.startswith("overlap_")}
