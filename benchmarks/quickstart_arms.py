"""What the quickstart's default was compared with: other losses, teachers, learning rates; on the same documents.

    python benchmarks/quickstart_arms.py --base runs/quickstart

Every arm is the quickstart recipe with a few keys changed, in a run directory that starts as a copy of the finished
`--base` run: steps that an arm does not change are not run again. Arms that are finished are not run again either.
Differences are paired over documents; one seed each, so they say nothing about the noise of training.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from math import sqrt
from pathlib import Path

import numpy as np
import torch

from minitron_nemo.config import load_recipe
from minitron_nemo.data.dataset import open_heldout
from minitron_nemo.evaluation.evaluate import evaluate
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
CROSS_ENTROPY = ("distill.logits_weight=0", "distill.ce_weight=1")
UNCORRECTED = ("teacher.correction.steps=0",)
DEFAULT = "**forward KL, corrected teacher, 2e-4**"
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ce": ("cross-entropy, same sequences", CROSS_ENTROPY),
    "kl_lr1": ("forward KL, learning rate 1e-4", ("train.lr=1e-4", "train.min_lr=1e-5")),
    "kl_lr4": ("forward KL, learning rate 4e-4", ("train.lr=4e-4", "train.min_lr=4e-5")),
    "kl_uncorrected": ("forward KL, teacher not corrected", UNCORRECTED),
    "ce_all_text": ("cross-entropy, no teacher, 100 steps", (*CROSS_ENTROPY, *UNCORRECTED, "train.steps=100")),
}


def run_arm(base: Path, directory: Path, overrides: tuple[str, ...]) -> None:
    if not directory.exists():
        shutil.copytree(base, directory, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))
    for step in ("calibrate", "repair", "prune", "distill"):
        command = [sys.executable, "-m", "minitron_nemo.cli", step, str(RECIPE), f"run_dir={directory}", *overrides]
        subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="a finished quickstart run")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    place = options.base.with_name(options.base.name + "_arms")
    for arm in options.arms:
        run_arm(options.base, place / arm, ARMS[arm][1])

    recipe = load_recipe(RECIPE)
    documents = open_heldout(
        options.base / "data", recipe.data.sequence_length, recipe.evaluate.documents, recipe.data.separator_weight
    )
    models = {"teacher": options.base / "corrected", "default": options.base / "distilled"}
    models |= {arm: place / arm / "distilled" for arm in options.arms}
    launch.join_job()
    measured = evaluate(models, documents, Layout(), dtype=torch.bfloat16)
    launch.shutdown()

    loss = {name: model.ce / model.weight for name, model in measured.items()}
    divergence = {name: model.kl_to_teacher / model.weight for name, model in measured.items()}
    print("| arm | loss | minus default | KL to the corrected teacher | minus default |\n|---|---|---|---|---|")
    for name in models:
        label = ARMS[name][0] if name in ARMS else {"default": DEFAULT}.get(name, name)
        print(
            f"| {label} | {loss[name].mean():.3f} | {paired(loss[name] - loss['default'])} "
            f"| {divergence[name].mean():.3f} | {paired(divergence[name] - divergence['default'])} |"
        )


def paired(differences: np.ndarray) -> str:
    return f"{differences.mean():+.3f} ± {differences.std(ddof=1) / sqrt(len(differences)):.3f}"


if __name__ == "__main__":
    main()
