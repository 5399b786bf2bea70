"""A cut that was not made yet is shown as Scores and depth scores decide it, wherever the recipe has these from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minitron_nemo.models.branches import Branch
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.report.page import write_report
from tests.report.reading import charts, html, rows, sentences
from tests.report.runs import RECIPE, part_of_a_run, write_run

UNDECIDED = "The teacher has been scored; which layers go is not decided before minitron score-depth has measured."


def test_scores_without_a_cut_show_the_one_that_the_recipe_asks_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "pruned")
    (run / "recipe.yaml").write_text(RECIPE + "prune: {num_layers: 10}\n")
    page = html(write_report(run))
    assert "The cut has not been made yet; this is what the recipe asks for." in sentences(page, "shape")
    assert rows(page, "shape")["layers"] == ["12", "10", "83.3%"]
    assert "All 96 stay." in page


def test_a_cut_that_waits_for_score_depth_says_so(tmp_path: Path) -> None:
    """Where nothing was measured, too little, or what does not decide: of another metric, or another model."""
    run = part_of_a_run(tmp_path / "run", "scores.npz", "depth.npz")
    measured = DepthScores.load(run / "depth.npz")

    def undecided(prune: str) -> bool:
        (run / "recipe.yaml").write_text(f"{RECIPE}prune: {{num_layers: 9, {prune}}}\n")
        page = html(write_report(run))
        return UNDECIDED in sentences(page, "shape") and UNDECIDED in sentences(page, "importance")

    assert undecided("depth_method: greedy")  # which has to measure again behind each layer
    assert undecided("depth_method: leave_one_out, depth: {metric: task, task: t.jsonl}")
    (run / "depth.npz").unlink()
    assert undecided("depth_method: leave_one_out")
    (run / "search").mkdir()
    of_another = replace(measured, identity={**measured.identity, "model_fingerprint": "9" * 64})
    of_another.save(run / "search" / "depth.npz")
    assert undecided("depth_method: leave_one_out")
    (run / "recipe.yaml").unlink()
    words = "The teacher has been scored; what is cut is not known without the recipe."
    assert words in sentences(html(write_report(run)), "shape")


@pytest.mark.parametrize("place", ["depth.npz", "search/depth.npz"])
def test_a_cut_that_was_measured_is_shown_before_it_is_made(tmp_path: Path, place: str) -> None:
    """After `score-depth`, and after a search, from which that takes what it needs."""
    run = part_of_a_run(tmp_path / "run", "scores.npz", "depth.npz")
    found = DepthScores.load(run / "depth.npz")
    losses = [found.sums[Branch({layer})].sum() for layer in range(12)]
    (run / "search").mkdir()
    (run / "depth.npz").rename(run / place)
    (run / "recipe.yaml").write_text(f"{RECIPE}prune: {{num_layers: 9, depth_method: leave_one_out}}\n")
    page = html(write_report(run))
    assert rows(page, "shape")["layers"] == ["12", "9", "75.0%"]
    dropped = ", ".join(map(str, sorted(np.argsort(losses)[:3].tolist())))
    assert f"Layers dropped, counted from 0: {dropped}." in page
    assert len(charts(page, "importance")["Loss without one layer"]) == 12


@pytest.mark.parametrize("own", [("pruned",), ("pruned", "depth.npz")])
def test_scores_may_be_those_of_another_run(tmp_path: Path, page: str, own: tuple[str, ...]) -> None:
    """With what it has measured of depth, where this one has not; `page` is of a run that has all files itself."""
    lender = part_of_a_run(tmp_path / "lender", "scores.npz", "depth.npz")
    run = part_of_a_run(tmp_path / "run", *own)
    if "depth.npz" in own:
        (lender / "depth.npz").write_text("not looked at")
    (run / "recipe.yaml").write_text(f"{RECIPE}from_run: {lender}\n")
    assert charts(html(write_report(run)), "importance") == charts(page, "importance")
