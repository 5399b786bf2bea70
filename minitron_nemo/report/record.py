"""What a run has on record, seen from its directory or from one of a stage; and which figures that makes outdated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_nemo.checkpoint.files import read_json
from minitron_nemo.config import RECIPE_FILE, Recipe, load_recipe
from minitron_nemo.distillation.status import FILE_NAME as STATUS_FILE
from minitron_nemo.evaluation import tasks
from minitron_nemo.manifest import Manifest
from minitron_nemo.stages import STAGES, stage_recipes


@dataclass(frozen=True)
class Record:
    """status.json, manifest.json and recipe.yaml of a run; of `stage` where it is looked at from RUN/stages/NAME.

    Steps have the names that the manifest gives them: "NAME/distill" is one of the stage NAME.
    """

    home: Path  # the run directory
    stage: str | None
    status: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]
    recipe: Recipe | None  # the stage's own, if it is looked at from one
    before: Sequence[str]  # the stages before this one, in their order

    @property
    def lender(self) -> Path | None:
        """The run whose teacher, text and Scores this one works on, where these are not its own."""
        return Path(self.recipe.from_run) if self.recipe and self.recipe.from_run else None

    def directory(self, stage: str | None) -> Path:
        """That of a stage; the run's for None."""
        return self.home if stage is None else self.home / STAGES / stage

    def underway(self, step: str) -> bool:
        """Whether the run is in this step, or ended in it before it was done."""
        return self.status.get("step") == step and self.status.get("state") != "done"

    def outdated(self, measured: Mapping[str, str | None]) -> dict[str, str]:
        """Of the `measured` models, by fingerprint, those that a step has since made anew or is making; with it."""
        found = {}
        for name, mark in measured.items():
            possible = self._makers().get(name, ())
            makers = [step for step in possible if step in self.steps]
            if underway := [step for step in possible if self.underway(step)]:
                found[name] = underway[0]
            elif mark is not None and makers and mark not in [self.steps[step]["output"] for step in makers]:
                found[name] = makers[0]
        return found

    def outdated_evaluation(self, evaluation: Mapping[str, Any]) -> dict[str, str]:
        """`outdated` of evaluation.json's models."""
        inputs = self.steps.get(step_of(self.stage, "evaluate"), {"inputs": {}})["inputs"]
        return self.outdated({name: inputs.get(name) for name in evaluation})

    def outdated_tasks(self, on_tasks: tasks.Content) -> dict[str, str]:
        """`outdated` of the models of tasks.json."""
        return self.outdated({name: model.get("fingerprint") for name, model in on_tasks.items()})

    def _makers(self) -> dict[str, tuple[str, ...]]:
        """What a measured model is the output of: one of these steps."""
        original = cut = ("correct", "convert")
        if self.before:
            cut = (step_of(self.before[-1], "distill"), step_of(self.before[-1], "prune"))
        previous = self.recipe is not None and self.recipe.teacher.model == "previous"
        return {
            "distilled": (step_of(self.stage, "distill"),),
            "pruned": (step_of(self.stage, "prune"),),
            "intermediate": cut,
            "teacher": cut if previous else original,
            "corrected": ("correct",),
            "source": ("convert",),
        }


def read_record(directory: Path) -> Record:
    """What is there of it. Raises UserError for damaged files."""
    home, stage = (directory.parents[1], directory.name) if directory.parent.name == STAGES else (directory, None)
    recipe = load_recipe(home / RECIPE_FILE) if (home / RECIPE_FILE).is_file() else None
    before: list[str] = []
    if stage is not None and recipe is not None:
        own = stage_recipes(recipe)
        recipe, names = own.get(stage), list(own)
        before = names[: names.index(stage)] if stage in names else []
    status = home / STATUS_FILE
    return Record(
        home=home,
        stage=stage,
        status=read_json(status, "run the step that writes it again") if status.exists() else {},
        steps=Manifest(home).steps,
        recipe=recipe,
        before=before,
    )


def step_of(stage: str | None, step: str) -> str:
    """The manifest's name of a step of a stage, or of a run without stages."""
    return step if stage is None else f"{stage}/{step}"
