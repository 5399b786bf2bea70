"""What `minitron --help` and the help of each verb say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_nemo import __version__
from minitron_nemo.chain import Chain
from minitron_nemo.command_line import EPILOG, FILES, STEPS, command_line
from minitron_nemo.config import Recipe, load_recipe
from minitron_nemo.preflight import preflight
from minitron_nemo.steps import Step
from tests.e2e.chain import write_recipe
from tests.pool import run_distributed


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """Those of a recipe in which every step has something to do."""
    recipe = write_recipe(tmp_path_factory.mktemp("every_step"))
    more = ["teacher.placement=cached", "distill.intermediate.pairs=[]", "evaluate.tasks=[hellaswag]"]
    steps: list[Step] = run_distributed(1, chain_steps, load_recipe(recipe, more))[0]
    return steps


def chain_steps(recipe: Recipe) -> list[Step]:
    return [replace(step, work=print) for step in Chain(preflight(recipe, 2)).steps()]


def verbs() -> dict:
    (choices,) = (action.choices for action in command_line()._actions if isinstance(action.choices, dict))
    return choices


@pytest.mark.slow
def test_steps_are_listed_in_the_order_of_the_chain(steps: list[Step]) -> None:
    listed = re.search(r"in their order:\n  (.*)", EPILOG)
    assert listed is not None
    assert listed[1].split(", ") == [step.name for step in steps if step.name != "report"]


def test_the_help_of_a_step_says_what_it_writes(steps: list[Step]) -> None:
    run_dir = next(step.output for step in steps if step.name == "convert").parent
    written = {step.name: step.output.relative_to(run_dir).parts[0] for step in steps if step.name in STEPS}
    assert written.keys() | {"run", "search"} == STEPS.keys()
    for name, output in written.items():
        assert re.search(rf"writes .*RUN/{re.escape(output)}\b", FILES[name]), name


def test_every_verb_is_in_a_group() -> None:
    grouped = re.findall(r"[a-z-]+", " ".join(re.findall(r"^  (?!minitron)(.*)$", EPILOG, re.MULTILINE)))
    assert set(grouped) == verbs().keys()


def test_version_and_names_stand_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line().parse_args(["--version"])
    assert capsys.readouterr().out == f"minitron {__version__}\n"
    assert "submit it to Slurm by its" in verbs()["submit"].description
    assert "--shell" not in verbs()["plan"].format_help()
    assert command_line().parse_args(["plan", str(Path("any.yaml")), "--shell"]).shell
