"""A search goes on past a candidate whose training diverges, on all ranks of its job; and leaves no other's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from minitron_nemo.config import Recipe, load_recipe
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.errors import Failed, SaidByRankZero, UserError
from minitron_nemo.preflight import preflight
from minitron_nemo.run import run_chain
from minitron_nemo.search import driver
from minitron_nemo.search.plan import plan_search
from tests.pool import run_distributed
from tests.search.test_results import standing
from tests.search.test_search import table, write_search

pytestmark = pytest.mark.e2e

DIVERGES, GOES_ON = "l4-h64-f64-a8-g4", "l4-h64-f48-a8-g4"


def _searched(path: Path) -> tuple[str, type[Exception], list[str]]:
    """On a rank: what the search raises, and the recipes that it ran; losses of the one that diverges are NaN."""
    ran = []
    loss = DistillationObjective.loss

    def poisoned_loss(self_: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return loss(self_, hidden * float("nan"), *args, **kwargs)

    def run(recipe: Recipe, *args: Any, **kwargs: Any) -> None:
        ran.append(recipe.name)
        with patch.object(DistillationObjective, "loss", poisoned_loss if DIVERGES in recipe.name else loss):
            run_chain(recipe, *args, **kwargs)

    with patch.object(driver, "run_chain", run):
        try:
            driver.search(load_recipe(path), path, ())
        except (Failed, SaidByRankZero) as error:
            return str(error), type(error), ran
    raise AssertionError("it found nothing to complain about")


def test_a_candidate_that_diverges_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    cut = {"ffn_hidden_size": None, "num_layers": None, "calibration": {"samples": 4}, "repair": {"ffn": False}}
    recipe = write_search(
        tmp_path,
        prune=cut,
        search={"ffn_hidden_size": [48, 64], "rungs": [1, 2], "keep": 1.0},
        evaluate={"documents": 2, "generate_tokens": 0},
    )
    found = run_distributed(2, _searched, recipe)
    said, _, ran = found[0]
    assert [error for _, error, _ in found] == [Failed, SaidByRankZero]
    assert said.startswith(f"{DIVERGES}: no update of the run was finite") and GOES_ON not in said
    assert sorted(ran) == sorted(
        ["tiny", *(f"tiny-{name}-{steps}" for name in (DIVERGES, GOES_ON) for steps in (0, 1)), f"tiny-{GOES_ON}-2"]
    )
    [best], [last] = table(tmp_path), table(tmp_path, "failed")
    assert (best["name"], best["steps"], best["failure"], best["pareto"]) == (GOES_ON, 2, None, True)
    assert (last["name"], last["steps"], last["loss"], last["pareto"]) == (DIVERGES, 1, None, False)
    assert last["losses"]["0"] > 0 and last["losses"]["1"] is None and last["failure"] in said
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", "search") and last["failure"] in status["reason"]
    again, _, ran = run_distributed(2, _searched, recipe)[0]
    assert (again, ran) == (said, ["tiny"])  # as recorded; only what all candidates share is looked at


def _slow(path: Path) -> tuple[type[Exception], str]:
    """What a rank says of a candidate that makes 9 tokens a second, where 20 are asked for."""
    candidate = standing(0, (1, 1, 1, 1.0), {0: 2.0}, speed=9.0)
    try:
        driver._admitted([candidate], plan_search(preflight(load_recipe(path), 1)))
    except UserError as error:
        return type(error), str(error)
    raise AssertionError("it goes on")


def test_a_speed_that_no_candidate_reaches_is_said_once(tmp_path: Path) -> None:
    (first, said), (second, _) = run_distributed(
        2,
        _slow,
        write_search(tmp_path, search={"num_layers": [2], "budget": {"min_tokens_per_second": 20.0}}, evaluate={}),
    )
    assert (first, second) == (UserError, SaidByRankZero)
    assert said.startswith("search.budget.min_tokens_per_second: 20, and the fastest candidate makes 9.0; lower it")


def _begun(path: Path, *overrides: str) -> str:
    """What a search says whose first step fails."""
    broken = Mock(side_effect=Failed("calibrate: no room"))
    with patch.multiple(driver, run_chain=broken, _first_outside=broken):
        try:
            driver.search(load_recipe(path, overrides), path, ())
        except (UserError, Failed) as error:
            return str(error)
    raise AssertionError("it went on")


@pytest.mark.parametrize("launcher", ["none", "local"])
def test_an_earlier_search_s_results_are_gone_when_another_one_begins(tmp_path: Path, launcher: str) -> None:
    """Whatever ends it before it has some of its own. One that is refused has not begun."""
    recipe = write_search(tmp_path)
    search = tmp_path / "run" / "search"
    search.mkdir(parents=True)
    names = {"table.json", "table.tsv", "table.md", "best.yaml"}
    for name in (*names, "depth.npz"):
        (search / name).write_text("of the earlier one")
    override = f"search.launcher={launcher}"
    [said] = run_distributed(1, _begun, recipe, override, "search.max_candidates=1")
    assert "max_candidates" in said
    assert {path.name for path in search.glob("*.*")} == names | {"depth.npz"}
    assert run_distributed(1, _begun, recipe, override) == ["calibrate: no room"]
    assert {path.name for path in search.glob("*.*")} == {"depth.npz"}
