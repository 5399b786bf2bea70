"""The shipped recipes as NeMo-Run tasks and factories; their figures are read from recipes/*.yaml, never repeated.

nemo minitron run --factory minitron_llama31_4b_width recipe.train.lr=5e-5
nemo minitron run recipe=minitron_llama31_4b_width recipe.train.lr=5e-5      the same
nemo minitron run recipe=my_recipe.yaml recipe.train.lr=5e-5                 any recipe's file
"""

from pathlib import Path
from typing import Any, Optional

import nemo_run as run
from fiddle._src.experimental.dataclasses import convert_dataclasses_to_configs
from nemo.collections import llm
from nemo_run.cli.cli_parser import type_parser

from minitron_nemo.config import Recipe, load_recipe, shipped_recipe
from minitron_nemo.nemo.cli import VERBS
from minitron_nemo.nemo.distill import llm_distill
from minitron_nemo.nemo.trainer_recipes import distill_task, prune_task

SHIPPED = {
    "llama31_4b_width": "llama31_8b_to_4b_width",
    "llama31_4b_depth": "llama31_8b_to_4b_depth",
    "mistral_nemo_8b": "mistral_nemo_12b_to_8b",
}


def llama31_4b_width(verb: str = "run") -> run.Partial:
    """Llama 3.1 8B to 4B by width: `minitron VERB` as a task for `run.run`, with a `recipe` to change."""
    return task(shipped_recipe(SHIPPED["llama31_4b_width"]), verb)


def llama31_4b_depth(verb: str = "run") -> run.Partial:
    """Llama 3.1 8B to 4B by depth: `minitron VERB` as a task for `run.run`, with a `recipe` to change."""
    return task(shipped_recipe(SHIPPED["llama31_4b_depth"]), verb)


def mistral_nemo_8b(verb: str = "run") -> run.Partial:
    """Mistral-NeMo 12B to 8B by width: `minitron VERB` as a task for `run.run`, with a `recipe` to change."""
    return task(shipped_recipe(SHIPPED["mistral_nemo_8b"]), verb)


def task(path: Path, verb: str = "run") -> run.Partial:
    """`minitron VERB` on the recipe in `path`. Raises UserError for its mistakes, KeyError for a verb that is none."""
    return run.Partial(VERBS[verb], recipe=recipe_config(path))


def recipe_config(path: Path) -> Any:
    """The recipe in `path` as a run.Config[Recipe], field by field."""
    recipe = load_recipe(path)
    if recipe.run_dir == f"runs/{recipe.name}":
        recipe.run_dir = Recipe.run_dir  # which follows `name`, should that be changed
    return convert_dataclasses_to_configs(recipe, allow_post_init=True)


@type_parser.register_parser(Recipe)
def _from_command_line(value: str, annotation: type) -> Any:
    """What `recipe=PATH` stands for."""
    return recipe_config(Path(value))


def _register(name: str) -> None:
    """Make a shipped recipe known to `nemo minitron VERB`, `nemo minitron llm_distill` and `nemo llm prune|distill`."""
    path, factory = shipped_recipe(SHIPPED[name]), f"minitron_{name}"

    def as_recipe() -> Any:
        return recipe_config(path)

    def as_pruning(paths: Optional[str] = None) -> run.Partial:  # noqa: UP045 - NeMo-Run knows no other spelling
        return prune_task(load_recipe(path), paths)

    run.cli.factory(as_recipe, target=Recipe, name=factory)
    run.cli.factory(as_pruning, target=llm.prune, name=factory)
    for target in (llm.distill, llm_distill):
        _register_distillation(target, factory, path)
    for verb in VERBS:
        _register_verb(verb, factory, path)


def _register_distillation(target: Any, factory: str, path: Path) -> None:
    def as_distillation(paths: Optional[str] = None) -> run.Partial:  # noqa: UP045 - NeMo-Run knows no other spelling
        return distill_task(load_recipe(path), target, paths)

    run.cli.factory(as_distillation, target=target, name=factory)


def _register_verb(verb: str, factory: str, path: Path) -> None:
    def as_task() -> run.Partial:
        return task(path, verb)

    run.cli.factory(as_task, target=VERBS[verb], name=factory)


for _name in SHIPPED:
    _register(_name)
