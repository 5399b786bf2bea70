"""Ways to cut the same model to the same size, before any training, on the same documents. Prints a markdown table.

    minitron convert recipes/quickstart.yaml && minitron prepare recipes/quickstart.yaml
    python benchmarks/cuts.py --base runs/quickstart [--arms ...] [--samples 128] [--documents 48]

The teacher is the quickstart's source, not corrected; every arm is its recipe with another `prune` section. What is
there already is not made or measured again, unless --samples or --documents change: then another --place is needed.
Differences are paired over documents, with one standard error; one calibration sample and one model, so they say
nothing about others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import numpy as np
import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import parameters
from minitron_nemo.arch.plan import FILE_NAME, Plan
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.config import Recipe, load_recipe
from minitron_nemo.data.dataset import open_heldout
from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.evaluation.evaluate import document_sums, share
from minitron_nemo.importance.scores import Scores
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import measure, open_calibration
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.repair import fits, repair_plan

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PLAIN = ("prune.repair.norm_scale=false", "prune.repair.ffn=false", "prune.repair.hidden=false")
SCALED = ("prune.repair.norm_scale=true", "prune.repair.ffn=false", "prune.repair.hidden=false")
FITTED = ("prune.repair.norm_scale=true", "prune.repair.ffn=true", "prune.repair.hidden=true")
FFN = ("prune.ffn_hidden_size=960", "prune.hidden_size=null")
HIDDEN = ("prune.ffn_hidden_size=null", "prune.hidden_size=432")
ARMS: dict[str, tuple[str, ...]] = {
    "ffn, activation (l2, mean)": (*FFN, *PLAIN, "prune.ffn_score=activation"),
    "ffn, output, least squares": (*FFN, *FITTED, "prune.ffn_score=output"),
    "hidden, activation (l2, mean)": (*HIDDEN, *PLAIN, "prune.hidden_score=activation"),
    "hidden, activation, least squares": (*HIDDEN, *FITTED, "prune.hidden_score=activation"),
    "hidden, activation, norm scale": (*HIDDEN, *SCALED, "prune.hidden_score=activation"),
    "ffn, output": (*FFN, *PLAIN, "prune.ffn_score=output"),
    "hidden, energy, least squares": (*HIDDEN, *FITTED, "prune.hidden_score=energy"),
    "ffn, activation, least squares": (*FFN, *FITTED, "prune.ffn_score=activation"),
    "hidden, energy, norm scale": (*HIDDEN, *SCALED, "prune.hidden_score=energy"),
}


def main() -> None:
    options = parse()
    launch.join_job()
    place = options.place or options.base.with_name(options.base.name + "_cuts")
    place.mkdir(parents=True, exist_ok=True)
    make_students(options, place)
    losses = measured_losses(options, place)
    launch.shutdown()
    print("| arm | parameters | loss minus the teacher's | minus the papers' way |\n|---|---|---|---|")
    for arm in options.arms:
        reference = next(name for name in ARMS if name.split(",", maxsplit=1)[0] == arm.split(",", maxsplit=1)[0])
        against = paired(losses[arm], losses[reference]) if arm != reference and reference in losses else ""
        size = parameters(Architecture.load(student(place, arm))) / 1e6
        print(f"| {arm} | {size:.1f} M | {paired(losses[arm], losses['teacher'])} | {against} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="a run with teacher and data")
    parser.add_argument("--place", type=Path, help="where the students go; default: BASE_cuts")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 256 tokens")
    parser.add_argument("--documents", type=int, default=48, help="held-out documents of 256 tokens")
    return parser.parse_args()


def recipe_of(samples: int, overrides: Sequence[str] = ()) -> Recipe:
    sizes = (f"prune.calibration.samples={samples}", f"prune.repair.samples={samples}")
    return load_recipe(RECIPE, ("prune.calibration.micro_batch_size=4", *sizes, *overrides))


def student(place: Path, arm: str) -> Path:
    return place / "".join(letter if letter.isalnum() else "_" for letter in arm)


def make_students(options: argparse.Namespace, place: Path) -> None:
    missing = [arm for arm in options.arms if not student(place, arm).exists()]
    if not missing:
        return
    recipe, teacher = recipe_of(options.samples), options.base / "teacher"
    model, batches, _ = open_calibration(teacher, options.base / "data", recipe, Layout(), options.samples)
    if not (place / "scores.npz").exists():
        start = time.process_time()
        scores = measure(model, batches, model_fingerprint="", data_fingerprint="", settings={})
        print(f"calibration: {time.process_time() - start:.0f} CPU s", flush=True)
        scores.save(place / "scores.npz")
    scores = Scores.load(place / "scores.npz")
    for arm in missing:
        config = recipe_of(options.samples, ARMS[arm]).prune
        plan = make_plan(scores, model.architecture, config)
        if fits(plan.source, plan.target, config.repair):
            start = time.process_time()
            repair_plan(model, batches, plan, config.repair, place / "plan")
            print(f"{arm}: repair {time.process_time() - start:.0f} CPU s", flush=True)
            plan = Plan.load(place / "plan" / FILE_NAME)
        prune(teacher, plan, student(place, arm), 0, 1, lambda: None)


def measured_losses(options: argparse.Namespace, place: Path) -> dict[str, np.ndarray]:
    """Loss of each document for the teacher and each arm; `losses.json` keeps what was measured."""
    file = place / "losses.json"
    losses: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}
    recipe = load_recipe(RECIPE)
    launch.initialize(Layout(), 0)
    documents = open_heldout(
        options.base / "data", recipe.data.sequence_length, options.documents, recipe.data.separator_weight
    )
    batches = share(documents, 4)
    for name in ("teacher", *options.arms):
        if name not in losses:
            directory = options.base / "teacher" if name == "teacher" else student(place, name)
            losses[name] = document_losses(load(directory), batches, len(documents)).tolist()
            write_atomic(file, json.dumps(losses))
            print(f"{name}: {np.mean(losses[name]):.3f}", flush=True)
    return {name: np.array(values) for name, values in losses.items()}


def load(directory: Path) -> Model:
    model = build_model(Architecture.load(directory), Layout(), dtype=torch.bfloat16)
    load_model(model, directory)
    return model


def document_losses(model: Model, batches: list[Microbatch], documents: int) -> np.ndarray:
    ce, _, _, weight = document_sums(model, None, batches, documents)
    return ce / weight


def paired(losses: np.ndarray, others: np.ndarray) -> str:
    differences = losses - others
    return f"{differences.mean():+.3f} ± {differences.std(ddof=1) / sqrt(len(differences)):.3f}"


if __name__ == "__main__":
    main()
