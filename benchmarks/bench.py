"""Cells: what a benchmark of cuts and distillations measures one by one, kept as files, and compared in pairs.

A cell is a JSON file of the losses of all held-out documents, written when it is measured; what is there with the same
settings is not measured again, so a killed run goes on where it was. All figures are made of the files alone.

Differences are paired over documents, seeds averaged before; with one standard error over documents.
"""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path

import numpy as np

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.config import Recipe, load_recipe
from minitron_nemo.data.dataset import open_heldout
from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.distillation.optimizer import params_dtype
from minitron_nemo.distillation.train import train
from minitron_nemo.evaluation.documents import document_sums, share
from minitron_nemo.importance.scores import Array, Scores
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import measure, open_calibration

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
# Of the quickstart's source on one process, in updates of 512 tokens; and the shapes that it is cut to.
DISTILLATION = (
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "train.lr=2e-4",
    "train.min_lr=2e-5",
    "train.log_interval=10",
    "train.save_interval=20",
    "parallel.pipeline_model_parallel_size=1",
)
# hidden_size, ffn_hidden_size, num_layers; the shares are of the parameters without embeddings.
SHAPES: dict[str, tuple[int, int, int]] = {
    "ffn 2/3": (576, 853, 30),
    "hidden 2/3": (384, 1536, 30),
    "mixed 1/2": (432, 853, 30),
    "depth 2/3": (576, 1536, 20),
    "mixed 2/3": (504, 1048, 30),
    "ffn 1/2": (576, 512, 30),
    "hidden 1/2": (288, 1536, 30),
    "depth 1/2": (576, 1536, 15),
    "ffn 960": (576, 960, 30),
    "hidden 432": (432, 1536, 30),
}
UNREPAIRED = ("prune.repair.norm_scale=false", "prune.repair.ffn=false", "prune.repair.hidden=false")
ACTIVATION = ("prune.ffn_score=activation",)


@dataclass(frozen=True)
class Cell:
    """One measurement; `steps` is 0 before any distillation."""

    shape: str
    arm: str
    seed: int
    steps: int

    @property
    def file(self) -> str:
        return f"{slug(self.shape)}.{slug(self.arm)}.{self.seed}.{self.steps}.json"


class Bench:
    """The measurements of one base run; its model, scores and documents are opened when they are first needed."""

    def __init__(self, base: Path, place: Path, *, samples: int, documents: int, overrides: tuple[str, ...]) -> None:
        """`overrides` of the quickstart's recipe are of all cells."""
        self.teacher, self.data, self.place = base / "teacher", base / "data", place
        self.samples, self.documents, self.overrides = samples, documents, overrides
        place.mkdir(parents=True, exist_ok=True)

    def settings(self) -> dict[str, int]:
        return {"samples": self.samples, "documents": self.documents}

    def losses(self, name: str) -> Array | None:
        """Loss of every document that a cell's file holds, None where it has not been measured with these settings."""
        path = self.place / name
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return np.array(found["losses"]) if found["settings"] == self.settings() else None

    def measure(self, name: str, directory: Path) -> None:
        if self.losses(name) is None:
            losses = document_losses(self.load(directory), self.batches, self.documents)
            write_atomic(self.place / name, json.dumps({"settings": self.settings(), "losses": losses.tolist()}))
            print(f"{name}: {losses.mean():.3f}", flush=True)

    def load(self, directory: Path) -> Model:
        model = build_model(Architecture.load(directory), Layout(), dtype=params_dtype(self.recipe().train))
        load_model(model, directory)
        return model

    def measure_trained(self, cell: Cell, student: Path, teacher: Path | None, *overrides: str) -> None:
        """Train `student`, by `overrides` of the recipe, and measure what comes out; a seed is an order of the text."""
        training = self.place / "training" / cell.file
        if not (training / "distilled").exists():
            training.mkdir(parents=True, exist_ok=True)
            outcome = train(
                self.recipe(f"train.steps={cell.steps}", f"data.seed={1000 + cell.seed}", *overrides),
                student_dir=student,
                teacher_dir=teacher,
                prepared=self.data,
                work_dir=training / "checkpoints",
                output_dir=training / "distilled",
                run_dir=training,
            )
            if outcome == "stopped":
                raise SystemExit(f"{cell.file}: stopped; start again and it goes on")
            gc.collect()  # models, optimizers and their hooks refer to each other
        self.measure(cell.file, training / "distilled")
        shutil.rmtree(training)

    def recipe(self, *overrides: str) -> Recipe:
        sizes = (f"prune.calibration.samples={self.samples}", f"prune.repair.samples={self.samples}")
        return load_recipe(RECIPE, ("prune.calibration.micro_batch_size=4", *sizes, *self.overrides, *overrides))

    @cached_property
    def calibration(self) -> tuple[Model, list[Microbatch]]:
        return open_calibration(self.teacher, self.data, self.recipe(), Layout(), self.samples)[:2]

    @cached_property
    def scores(self) -> Scores:
        path = self.place / f"scores_{self.samples}.npz"
        if not path.exists():
            measure(*self.calibration, model_fingerprint="", data_fingerprint="", settings={}).save(path)
        return Scores.load(path)

    @cached_property
    def batches(self) -> list[Microbatch]:
        data = self.recipe().data
        return share(open_heldout(self.data, data.sequence_length, self.documents, data.separator_weight), 4)


def document_losses(model: Model, batches: list[Microbatch], documents: int) -> Array:
    sums = document_sums(model, None, batches, documents)
    losses: Array = sums.ce / sums.weight
    return losses


def differences(own: dict[int, Array], others: dict[int, Array]) -> Array:
    """One number per document: the mean over the seeds that both have."""
    together: Array = np.mean([own[seed] - others[seed] for seed in own.keys() & others.keys()], axis=0)
    return together


def standard_error(values: Array) -> float:
    return float(values.std(ddof=1) / sqrt(len(values)))


def paired(own: dict[int, Array], others: dict[int, Array]) -> str:
    """Mean over documents of the mean over the seeds that both have, with the standard error over documents."""
    found = differences(own, others)
    return f"{found.mean():+.3f} ± {standard_error(found):.3f}"


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
