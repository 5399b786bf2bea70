"""Ways to cut the same model to the same size, before and after a short distillation, on the same documents.

    minitron convert recipes/quickstart.yaml && minitron prepare recipes/quickstart.yaml
    python benchmarks/cuts.py --base runs/quickstart [--shapes ...] [--arms ...] [--seeds 3] [--steps 20]

The teacher is the quickstart's source, not corrected; every arm is its recipe with another `prune` section. Each cell
(shape, arm, seed, before or after distillation) is a JSON file of the losses of all documents in --place, written when
it is measured; what is there with the same settings is not measured again, so a killed run goes on where it was. The
tables are made of the files alone; --measured prints them of what there is. A seed is the order of the training text
and, of `random`, the draw of what stays.

Differences are paired over documents, seeds averaged before; with one standard error over documents. One calibration
sample and one model, so they say nothing about others.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from rankings import drawn, magnitudes, ranked

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import non_embedding_parameters, parameters
from minitron_nemo.arch.plan import FILE_NAME, Plan
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.config import Recipe, load_recipe
from minitron_nemo.data.dataset import open_heldout
from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.distillation.train import train
from minitron_nemo.evaluation.documents import document_sums, share
from minitron_nemo.importance.scores import Array, Scores
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import measure, open_calibration
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.repair import fits, repair_plan

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
DISTILLATION = (
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "train.lr=2e-4",
    "train.min_lr=2e-5",
    "train.log_interval=10",
    "train.save_interval=10",
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
ACTIVATION = ("prune.ffn_score=activation", "prune.hidden_score=activation")
REPAIRED = ("prune.repair.norm_scale=true", "prune.repair.ffn=true", "prune.repair.hidden=true")
OURS, PAPERS = "ours", "(l2, mean)"
ARMS: dict[str, tuple[str, ...]] = {
    "random": (*ACTIVATION, *UNREPAIRED),
    "magnitude": (*ACTIVATION, *UNREPAIRED),
    PAPERS: (*ACTIVATION, *UNREPAIRED),
    OURS: ("prune.ffn_score=output", "prune.hidden_score=activation", *REPAIRED),
    "ours, unrepaired": ("prune.ffn_score=output", "prune.hidden_score=activation", *UNREPAIRED),
    "ours, norm scale": ("prune.ffn_score=output", *UNREPAIRED, "prune.repair.norm_scale=true"),
    "ours, untied": ("prune.ffn_score=output", *REPAIRED, "prune.untie=true"),
    "rotation, untied": ("prune.ffn_score=output", *REPAIRED, "prune.untie=true", "prune.hidden_method=rotate"),
}


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

    def __init__(self, options: argparse.Namespace) -> None:
        self.teacher, self.data = options.base / "teacher", options.base / "data"
        self.place = options.place or options.base.with_name(options.base.name + "_cuts")
        self.samples, self.documents = options.samples, options.documents
        self.place.mkdir(parents=True, exist_ok=True)

    def settings(self) -> dict[str, int]:
        return {"samples": self.samples, "documents": self.documents}

    def student(self, cell: Cell) -> Path:
        """The student before distillation, which only `random` has one of for every seed."""
        seed = cell.seed if cell.arm == "random" else 0
        return self.place / f"{slug(cell.shape)}.{slug(cell.arm)}.{seed}.samples_{self.samples}"

    def losses(self, name: str) -> Array | None:
        """Loss of every document that a cell's file holds, None where it has not been measured with these settings."""
        path = self.place / name
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return np.array(found["losses"]) if found["settings"] == self.settings() else None

    def measure(self, name: str, directory: Path) -> None:
        if self.losses(name) is None:
            losses = document_losses(load(directory), self.batches, self.documents)
            write_atomic(self.place / name, json.dumps({"settings": self.settings(), "losses": losses.tolist()}))
            print(f"{name}: {losses.mean():.3f}", flush=True)

    def run(self, cell: Cell) -> None:
        if self.losses(cell.file) is not None:
            return
        student, training = self.student(cell), self.place / "training" / cell.file
        if not student.exists():
            self.cut(cell, student)
        if not cell.steps:
            self.measure(cell.file, student)
            return
        if not (training / "distilled").exists():
            self.distil(cell, student, training)
        self.measure(cell.file, training / "distilled")
        shutil.rmtree(training)

    def distil(self, cell: Cell, student: Path, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        outcome = train(
            self.recipe(*DISTILLATION, f"train.steps={cell.steps}", f"data.seed={1000 + cell.seed}"),
            student_dir=student,
            teacher_dir=self.teacher,
            prepared=self.data,
            work_dir=place / "checkpoints",
            output_dir=place / "distilled",
            run_dir=place,
        )
        if outcome == "stopped":
            raise SystemExit(f"{cell.file}: stopped; start again and it goes on")
        gc.collect()  # models, optimizers and their hooks refer to each other

    def cut(self, cell: Cell, destination: Path) -> None:
        model, batches = self.calibration
        hidden, ffn, layers = SHAPES[cell.shape]
        shape = (f"prune.hidden_size={hidden}", f"prune.ffn_hidden_size={ffn}", f"prune.num_layers={layers}")
        config = self.recipe(*shape, *ARMS[cell.arm]).prune
        plan = make_plan(self.ranking(cell), model.architecture, config)
        if fits(plan.source, plan.target, config.repair):
            repair_plan(model, batches, plan, config.repair, self.place / "plan")
            plan = Plan.load(self.place / "plan" / FILE_NAME)
        prune(self.teacher, plan, destination, 0, 1, lambda: None)

    def ranking(self, cell: Cell) -> Scores:
        if cell.arm == "random":
            return ranked(self.scores, *drawn(self.scores.architecture, cell.seed))
        return ranked(self.scores, *magnitudes(self.teacher)) if cell.arm == "magnitude" else self.scores

    def recipe(self, *overrides: str) -> Recipe:
        sizes = (f"prune.calibration.samples={self.samples}", f"prune.repair.samples={self.samples}")
        return load_recipe(RECIPE, ("prune.calibration.micro_batch_size=4", *sizes, *overrides))

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


def load(directory: Path) -> Model:
    model = build_model(Architecture.load(directory), Layout(), dtype=torch.bfloat16)
    load_model(model, directory)
    return model


def document_losses(model: Model, batches: list[Microbatch], documents: int) -> Array:
    sums = document_sums(model, None, batches, documents)
    losses: Array = sums.ce / sums.weight
    return losses


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What is asked for, in the order in which it is measured."""
    for steps in sorted({0, options.steps}):
        for seed in range(options.seeds):
            for shape in options.shapes:
                for arm in options.arms:
                    if steps or arm == "random" or seed == 0:
                        yield Cell(shape, arm, seed, steps)


def tables(bench: Bench, options: argparse.Namespace) -> str:
    """Markdown: per shape and arm, loss minus the teacher's and minus that of the papers' cut, as far as measured."""
    teacher = bench.losses("teacher.json")
    if teacher is None:
        raise SystemExit(f"{bench.place}: the teacher's loss is not there; measure it first")
    lines = []
    for steps in sorted({0, options.steps}):
        columns = ("shape", "arm", "parameters", "without embeddings", f"loss minus the teacher's {teacher.mean():.3f}")
        lines += [f"After {steps} steps:", "", f"| {' | '.join(columns)} | minus {PAPERS} | seed by seed |"]
        lines.append("|---|---|---|---|---|---|---|")
        for shape in options.shapes:
            papers = by_seed(bench, options, shape, PAPERS, steps)
            for arm in options.arms:
                own = by_seed(bench, options, shape, arm, steps)
                if not own:
                    continue
                size = Architecture.load(bench.student(Cell(shape, arm, 0, 0)))
                sizes = f"{parameters(size) / 1e6:.1f} M | {non_embedding_parameters(size) / 1e6:.1f} M"
                loss = paired(own, dict.fromkeys(own, teacher))
                against = f"{paired(own, papers)} | {seeds(own, papers)}" if arm != PAPERS and papers else "|"
                lines.append(f"| {shape} | {arm} | {sizes} | {loss} | {against} |")
        lines.append("")
    return "\n".join(lines)


def by_seed(bench: Bench, options: argparse.Namespace, shape: str, arm: str, steps: int) -> dict[int, Array]:
    """Losses of the seeds that have been measured; where no seed has a bearing on them, the one counts for all."""
    fixed = steps == 0 and arm != "random"
    found = {seed: bench.losses(Cell(shape, arm, 0 if fixed else seed, steps).file) for seed in range(options.seeds)}
    return {seed: losses for seed, losses in found.items() if losses is not None}


def paired(own: dict[int, Array], others: dict[int, Array]) -> str:
    """Mean over documents of the mean over the seeds that both have, with the standard error over documents."""
    differences = np.mean([own[seed] - others[seed] for seed in own.keys() & others.keys()], axis=0)
    return f"{differences.mean():+.3f} ± {differences.std(ddof=1) / sqrt(len(differences)):.3f}"


def seeds(own: dict[int, Array], others: dict[int, Array]) -> str:
    """The mean difference of each seed, where seeds differ."""
    found = [f"{(own[seed] - others[seed]).mean():+.3f}" for seed in sorted(own.keys() & others.keys())]
    return ", ".join(found) if len(set(found)) > 1 else ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="a run with teacher and data")
    parser.add_argument("--place", type=Path, help="where students and measurements go; default: BASE_cuts")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES)[:8], choices=list(SHAPES))
    parser.add_argument("--arms", nargs="*", default=list(ARMS)[:4], choices=list(ARMS))
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences of 256 tokens")
    parser.add_argument("--documents", type=int, default=32, help="held-out documents of 256 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of distillation, of 512 tokens; 0: none")
    parser.add_argument("--measured", action="store_true", help="measure nothing more")
    return parser.parse_args()


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def main() -> None:
    options = parse()
    bench = Bench(options)
    if not options.measured:
        launch.join_job()
        launch.initialize(Layout(), 0)
        bench.measure("teacher.json", bench.teacher)
        for cell in cells(options):
            bench.run(cell)
        launch.shutdown()
    print(tables(bench, options))


if __name__ == "__main__":
    main()
