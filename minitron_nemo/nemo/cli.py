"""`nemo minitron VERB`: the steps of `minitron`, with the keys of a recipe as typed options of NeMo-Run.

    nemo minitron prune recipe=RECIPE.yaml recipe.prune.hidden_size=3072
    nemo minitron run --factory minitron_llama31_4b_width recipe.run_dir=/scratch/me/4b

A verb writes the recipe that NeMo-Run has put together into the run directory and becomes `minitron VERB` on it: the
same process, under whatever launched it, without NeMo's modules and what they change in others.
"""

import os
import sys
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import nemo_run as run

from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.config import RECIPE_FILE, Recipe, recipe_yaml, run_directory

NAMESPACE = "minitron"


def _spell_out(section: Any) -> None:
    """Say the types of a recipe's keys as NeMo-Run reads them, off constructors: no strings, no `X | None`."""
    hints = get_type_hints(section)
    section.__init__.__annotations__ = {
        name: Union[get_args(hint)] if get_origin(hint) is UnionType else hint  # noqa: UP007
        for name, hint in hints.items()
    }
    for hint in hints.values():
        for part in (hint, *get_args(hint)):
            if is_dataclass(part):
                _spell_out(part)


_spell_out(Recipe)


@run.cli.entrypoint(namespace=NAMESPACE)
def plan(recipe: Recipe) -> None:
    """Check every key of a recipe and print parameters, tokens, steps and FLOPs."""
    _become("plan", recipe)


@run.cli.entrypoint(namespace=NAMESPACE)
def calibrate(recipe: Recipe) -> None:
    """Score every axis in one forward-only pass over the training text."""
    _become("calibrate", recipe)


@run.cli.entrypoint(namespace=NAMESPACE, name="score-depth")
def score_depth(recipe: Recipe) -> None:
    """Measure the teacher without some of its layers, to choose the ones that go."""
    _become("score-depth", recipe)


@run.cli.entrypoint(namespace=NAMESPACE)
def repair(recipe: Recipe) -> None:
    """Fit what the student's weights do about what is cut, on the teacher's activations."""
    _become("repair", recipe)


@run.cli.entrypoint(namespace=NAMESPACE)
def prune(recipe: Recipe) -> None:
    """Cut the teacher to the target shape, checkpoint to checkpoint."""
    _become("prune", recipe)


@run.cli.entrypoint(namespace=NAMESPACE)
def distill(recipe: Recipe) -> None:
    """Train the pruned student against the teacher."""
    _become("distill", recipe)


@run.cli.entrypoint(namespace=NAMESPACE)
def export(recipe: Recipe) -> None:
    """Write the distilled student in the formats of export.formats."""
    _become("export", recipe)


@run.cli.entrypoint(namespace=NAMESPACE, name="run")
def chain(recipe: Recipe) -> None:
    """Run the whole chain; unchanged steps are not run again, interrupted ones resume."""
    _become("run", recipe)


VERBS = {
    "plan": plan,
    "calibrate": calibrate,
    "score-depth": score_depth,
    "repair": repair,
    "prune": prune,
    "distill": distill,
    "export": export,
    "run": chain,
}


def _become(verb: str, recipe: Recipe) -> NoReturn:
    """Replace this process by `minitron VERB` on `recipe`; its exit code is then this one's."""
    path = run_directory(recipe) / RECIPE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, recipe_yaml(recipe))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "minitron_nemo.cli", verb, str(path)])
