"""The cells of one model: students made, trained and measured by the code that ships."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.claims.arms import CE, CORRECTED, CUTS, PLAIN, RANDOM, SCRATCH, Arm
from benchmarks.claims.models import Setting
from benchmarks.claims.small import CURVE, learn, write_random
from benchmarks.rankings import drawn, ranked
from minitron_nemo.arch import Architecture
from minitron_nemo.config import Recipe
from minitron_nemo.distillation.train import train
from minitron_nemo.importance.scores import Array
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.target import target_architecture


class Claims(Bench):
    def __init__(self, setting: Setting, base: Path, place: Path) -> None:
        super().__init__(base, place, samples=setting.samples, documents=setting.documents, overrides=setting.overrides)
        self.setting = setting

    def run(self, arm: Arm, seed: int) -> None:
        cell = arm.cell(self.setting, seed)
        if self.losses(cell.file) is not None:
            return
        student = self.student(arm, seed)
        if not arm.training:
            self.measure(cell.file, student)
            return
        teacher = self.corrected() if arm.training == CORRECTED else self.teacher
        layers = Architecture.load(self.teacher).num_layers
        self.measure_trained(cell, student, teacher, *arm.training_overrides(self.setting, layers))

    def by_seed(self, arm: Arm, seeds: int) -> dict[int, Array]:
        """Losses of the seeds that have been measured: of seed 0 alone where seeds have no bearing on them."""
        found = {seed: self.losses(arm.cell(self.setting, seed).file) for seed in range(seeds if arm.seeded else 1)}
        return {seed: losses for seed, losses in found.items() if losses is not None}

    def student(self, arm: Arm, seed: int) -> Path:
        """The student before any training, made if it is not there."""
        cell = Arm(arm.shape, arm.cut).cell(self.setting, seed)
        directory = self.place / f"{Path(cell.file).stem}.samples_{self.samples}"
        if directory.exists():
            return directory
        if arm.cut == SCRATCH:
            write_random(directory, self.target(arm), self.teacher / "tokenizer", 1 + seed)
            return directory
        scores = ranked(self.scores, *drawn(self.scores.architecture, seed)) if arm.cut == RANDOM else self.scores
        plan = make_plan(scores, scores.architecture, self.cut(arm).prune)
        prune(self.teacher, plan, directory)
        return directory

    def target(self, arm: Arm) -> Architecture:
        return target_architecture(Architecture.load(self.teacher), self.cut(arm).prune)

    def cut(self, arm: Arm) -> Recipe:
        hidden, ffn, layers = self.setting.shapes[arm.shape]
        shape = (f"prune.hidden_size={hidden}", f"prune.ffn_hidden_size={ffn}", f"prune.num_layers={layers}")
        return self.recipe(*shape, *PLAIN, *CUTS[arm.cut])

    def corrected(self) -> Path:
        """The teacher after the quickstart's correction, on as many updates of this model's batch."""
        directory = self.place / "corrected"
        if not directory.exists():
            outcome = train(
                self.recipe("train.steps=0"),
                student_dir=self.teacher,
                teacher_dir=None,
                prepared=self.data,
                work_dir=self.place / "training" / "correction",
                output_dir=directory,
                run_dir=self.place / "training" / "correction",
            )
            if outcome == "stopped":
                raise SystemExit(f"{directory}: stopped; start again and it goes on")
        return directory

    def scratch_recipe(self) -> Recipe:
        """Cross-entropy alone: of the small teacher, and of a student's shape."""
        arm = Arm(self.setting.main, SCRATCH, CE)
        return self.recipe(*arm.training_overrides(self.setting, layers=0), f"train.steps={self.setting.scratch_steps}")

    def learn_from_scratch(self) -> None:
        """The main shape from random weights: how many tokens does it take?"""
        start = self.student(Arm(self.setting.main, SCRATCH), 0)
        learn(self.scratch_recipe(), start, self.data, self.place / "scratch", self.place / CURVE)

    def curve(self, directory: Path) -> list[tuple[float, float]]:
        """Tokens and held-out loss on the way; nothing where it has not been measured."""
        path = directory / CURVE
        return [(tokens, loss) for tokens, loss in json.loads(path.read_text())] if path.exists() else []
