"""Ways to choose the layers that go, on the same documents and questions, before any training: a markdown table.

    minitron convert recipes/quickstart.yaml && minitron prepare recipes/quickstart.yaml
    python benchmarks/depth.py --base runs/quickstart [--drop 10] [--samples 8] [--documents 24] [--methods ...]

The teacher is the quickstart's source, not corrected. What is chosen by the first calibration sequences, or by the
questions of `minitron make-task` that are made to choose by, is judged by the beginnings of held-out documents, and by
the questions that are made to judge by. Started again it goes on where it was stopped, unless --samples, --precision,
--documents or a number of questions changes: then another --place is needed. Differences are paired over documents or
questions, with one standard error; one model and one calibration sample, so they say nothing about others.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np
import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.config import PruneConfig, Recipe, load_recipe
from minitron_nemo.data.choices import Choices, choice_samples, read_questions
from minitron_nemo.data.dataset import Sample, open_heldout
from minitron_nemo.data.sampler import Sampler
from minitron_nemo.data.task import make_task
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.importance.scores import Array, Scores
from minitron_nemo.models.branches import Branch
from minitron_nemo.models.build import Model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import measure, open_calibration
from minitron_nemo.pruning.depth import METHODS, planned, summary, wanted
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.score_depth import measure_branches
from minitron_nemo.pruning.target import BY_INFLUENCE

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
BY_TASK = " by task"
ARMS = (*BY_INFLUENCE, *METHODS, *(method + BY_TASK for method in METHODS))


def main() -> None:
    options = parse()
    launch.join_job()
    place = options.place or options.base.with_name(options.base.name + "_depth")
    place.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(options)
    teacher, data = options.base / "teacher", options.base / "data"
    model, batches, blend = open_calibration(teacher, data, recipe, Layout(), options.samples)
    if not (place / "scores.npz").exists():
        measure(model, batches, model_fingerprint="", data_fingerprint="", settings={}).save(place / "scores.npz")
    text = [blend.sample(index) for index in Sampler(blend, recipe.data.seed).global_batch(0, options.samples)]
    counts = {"choose": options.questions, "judge": options.judge_questions}
    make_task(data, teacher / "tokenizer", place / "task", questions=max(counts.values()), seed=recipe.data.seed)
    questions = {part: choices_of(place / "task" / f"{part}.jsonl", count, teacher) for part, count in counts.items()}
    measured = {
        "": (text, resumed(place / "depth.npz", model.architecture, text)),
        BY_TASK: (questions["choose"][0], resumed(place / "task.npz", model.architecture, *questions["choose"])),
    }
    scores, arms = Scores.load(place / "scores.npz"), {}
    for arm in options.methods:
        by = BY_TASK if arm.endswith(BY_TASK) else ""
        method, (samples, found) = arm.removesuffix(by), measured[by]
        if method in METHODS:
            search(model, samples, found, recipe, method, options.drop, place / ("task.npz" if by else "depth.npz"))
        arms[arm] = dropped(scores, found, recipe.prune, method)
    documents = open_heldout(data, recipe.data.sequence_length, options.documents, recipe.data.separator_weight)
    heldout = resumed(place / "heldout.npz", model.architecture, documents)
    judged = resumed(place / "judged.npz", model.architecture, *questions["judge"])
    for samples, found, name in ((documents, heldout, "heldout.npz"), (questions["judge"][0], judged, "judged.npz")):
        sets = [branch for branch in (Branch(), *arms.values()) if found.missing(branch).any()]
        if sets:
            save = partial(found.save, place / name)
            measure_branches(model, samples, list(dict.fromkeys(sets)), found, recipe, save)
    launch.shutdown()
    whole = answered(judged, Branch())
    print(
        f"loss of the whole model {heldout.loss(Branch()):.3f}, accuracy {whole.mean():.1%} of {len(whole)} questions"
    )
    print("| method | layers that go | held-out loss minus the teacher's | accuracy | minus the teacher's |")
    print("|---|---|---|---|---|")
    for arm, branch in arms.items():
        mean, error = heldout.increase(branch)
        right = answered(judged, branch)
        lost = right - whole
        accuracy = f"{right.mean():.1%} | {lost.mean():+.1%} ± {lost.std(ddof=1) / sqrt(len(lost)):.1%}"
        print(f"| {arm} | {', '.join(map(str, sorted(branch)))} | {mean:+.3f} ± {error:.3f} | {accuracy} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="a run with teacher and data")
    parser.add_argument("--place", type=Path, help="where measurements go; default: BASE_depth")
    parser.add_argument("--methods", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--drop", type=int, default=10, help="layers of the 30")
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences of 256 tokens")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--documents", type=int, default=24, help="held-out documents of 256 tokens")
    parser.add_argument("--questions", type=int, default=32, help="to choose by, four together")
    parser.add_argument("--judge-questions", type=int, default=64, help="to judge by")
    return parser.parse_args()


def recipe_of(options: argparse.Namespace) -> Recipe:
    return load_recipe(
        RECIPE,
        (
            f"prune.num_layers={30 - options.drop}",
            "prune.ffn_hidden_size=null",
            f"prune.calibration.samples={options.samples}",
            "prune.calibration.micro_batch_size=1",
            f"prune.calibration.precision={options.precision}",
        ),
    )


def choices_of(file: Path, count: int, teacher: Path) -> tuple[list[Sample], Choices]:
    """Samples of the first `count` questions of a file, and what scores them."""
    questions, most = read_questions(file)[:count], Architecture.load(teacher).max_position_embeddings
    return choice_samples(questions, load_tokenizer(teacher / "tokenizer"), most), Choices.of(questions)


def resumed(
    file: Path, architecture: Architecture, samples: list[Sample], choices: Choices | None = None
) -> DepthScores:
    if file.exists():
        return DepthScores.load(file)
    weights = np.array([float(sample["token_weights"].sum(dtype=torch.float64)) for sample in samples])
    return DepthScores(architecture, {}, weights, choices)


def answered(scores: DepthScores, branch: Branch) -> Array:
    """1 for each question that is answered right, 0 for the others, [questions]."""
    assert scores.choices is not None, "the scores are of a task"
    return scores.choices.right(-scores.sums[branch], normalize=False).astype(np.float64)


def search(
    model: Model, text: list[Sample], scores: DepthScores, recipe: Recipe, method: str, drop: int, file: Path
) -> None:
    """Measure what the method asks for, and say what that took beside one pass of the whole model."""
    save = partial(scores.save, file)
    if Branch() not in scores.sums:
        start = time.process_time()
        measure_branches(model, text, [Branch()], scores, recipe, save)
        print(f"the whole model: {time.process_time() - start:.1f} CPU s", flush=True)
    start, found = time.process_time(), 0
    while branches := wanted(scores, method, drop, normalize=False):
        found += len(branches)
        measure_branches(model, text, branches, scores, recipe, save)
    models, evaluations = planned(model.architecture, method, [drop], most=1000)
    print(f"{summary(scores, method, drop, normalize=False)}", flush=True)
    print(
        f"{method}: {found} of {models} models measured now in {time.process_time() - start:.1f} CPU s; all of them "
        f"take {evaluations} evaluations of a layer, {evaluations / model.architecture.num_layers:.1f} passes",
        flush=True,
    )


def dropped(scores: Scores, measured: DepthScores, config: PruneConfig, method: str) -> Branch:
    """The layers that the method's Plan drops."""
    plan = make_plan(scores, scores.architecture, replace(config, depth_method=method), measured)
    return Branch(range(scores.architecture.num_layers)) - set(plan.kept_layers)


if __name__ == "__main__":
    main()
