"""Pages of a run with stages: each stage's says what its own pruning cost, and the run's leads to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_nemo.cli import main
from minitron_nemo.report.page import write_report
from minitron_nemo.report.read import read_run
from tests.report.reading import headlines, html, rows, sentences, verdict
from tests.report.runs import (
    KEY,
    RECIPE,
    TEACHER,
    evaluation,
    part_of_a_run,
    record,
    write_json,
    write_metrics,
    write_status,
)

STAGES = RECIPE + "stages: {larger: {prune: {num_layers: 9}}, smaller: {prune: {num_layers: 6}}, last: {}}\n"
# Held-out losses of two documents.
LOSSES = {"teacher": [1.9, 2.1], "intermediate": [2.2, 2.4], "pruned": [2.3, 2.7], "distilled": [2.25, 2.45]}


def evaluation_of_second_stage() -> dict[str, dict[str, Any]]:
    """With the differences, paired by document, that `evaluate` writes."""
    like = evaluation(TEACHER, TEACHER)["distilled"]
    found = {name: {**like, "loss": sum(of) / 2, "losses_per_document": of} for name, of in LOSSES.items()}
    found["pruned"] |= {"delta_vs_teacher": 0.5, "delta_vs_teacher_se": 0.1}
    found["distilled"] |= {"delta_vs_teacher": 0.35, "delta_vs_teacher_se": 0.0}
    found["distilled"] |= {"delta_vs_pruned": -0.15, "delta_vs_pruned_se": 0.1}
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of three stages the first has been cut, the second has been measured, and the third has not begun."""
    run = tmp_path / "run"
    write_status(part_of_a_run(run), "stopped", "smaller/report")
    (run / "recipe.yaml").write_text(STAGES)
    part_of_a_run(run / "stages" / "larger", "pruned")
    smaller = part_of_a_run(run / "stages" / "smaller", "pruned")
    write_json(smaller / "evaluation.json", evaluation_of_second_stage())
    return run


def test_pruning_cost_what_the_model_that_was_cut_loses(run: Path) -> None:
    """And not what is between the teacher and the pruned model, most of which was lost before."""
    page = html(write_report(run / "stages" / "smaller"))
    words = verdict(page)
    assert "Pruning the intermediate model cost 0.2000 ± 0.1000 nats per token of held-out loss" in words
    assert "distillation regained 0.1500 ± 0.1000 nats per token, 75% of it" in words
    assert "the student ends 0.3500 ± 0.0000 nats per token above the teacher" in words
    assert ("75%", "of the loss that pruning cost is regained by distillation") in headlines(page)
    assert rows(page, "result")["held-out loss, nats per token"] == [
        f"{loss}± 0.0312" for loss in ("2.0000", "2.3000", "2.5000", "2.3500")
    ]
    assert "intermediate (the student of the stage before, which is cut)" in " ".join(sentences(page, "result"))
    assert re.findall(r'<th scope="col">(.*?)</th>', page.partition('id="shape"')[2])[0] == "cut from"


def test_the_run_leads_to_a_page_of_every_stage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = html(run / "report.html")
    links = re.findall(r'<a href="([^#"]+)">(\w+)</a>', page)
    assert links == [(f"stages/{name}/report.html", name) for name in ("larger", "smaller")]
    for link, name in links:
        assert f"<h1>synthetic, stage {name}</h1>" in html(run / link)
        assert rows(html(run / link), "shape")["layers"] == ["12", "9", "75.0%"]
    assert "last, which has not begun" in page
    assert "not been measured" not in page and "nothing is cut" not in page
    anchors = re.findall(r'href="#(\w+)"', page)
    assert anchors == ["stages", "provenance"] == re.findall(r'<section id="(\w+)"', page)


def test_a_stage_that_waits_for_score_depth_keeps_no_page_back(run: Path) -> None:
    part_of_a_run(run / "stages" / "last", "scores.npz")
    (run / "recipe.yaml").write_text(STAGES.replace("last: {}", "last: {prune: {depth_method: greedy, num_layers: 5}}"))
    assert main(["report", str(run)]) == 0
    assert 'href="stages/last/report.html"' in html(run / "report.html")
    said = sentences(html(run / "stages" / "last" / "report.html"), "shape")
    assert said == [
        "The teacher has been scored; which layers go is not decided before minitron score-depth has measured."
    ]


def test_the_correction_is_on_the_page_of_every_stage(run: Path) -> None:
    smaller = run / "stages" / "smaller"
    assert "The teacher was not corrected" in " ".join(sentences(html(write_report(smaller)), "training"))
    write_metrics(run / "training" / "corrected-01234567", 3, np.random.default_rng(0))
    page = html(write_report(smaller))
    assert "The teacher was not corrected" not in " ".join(sentences(page, "training"))
    assert rows(page, "training")["tokens"] == ["49.2\xa0k"]


@pytest.mark.parametrize(
    ("teacher", "changed", "underway", "outdated"),
    [
        ("source", None, None, {}),
        ("source", "larger/distill", None, {"intermediate": "larger/distill"}),
        ("source", "correct", None, {"teacher": "correct"}),
        ("source", "smaller/prune", "larger/distill", {"intermediate": "larger/distill", "pruned": "smaller/prune"}),
        ("previous", "larger/distill", None, {"teacher": "larger/distill"}),
        ("previous", "correct", None, {"corrected": "correct"}),
    ],
)
@pytest.mark.fast_cases(4)
def test_what_another_stage_has_made_anew_is_known(
    run: Path, teacher: str, changed: str | None, underway: str | None, outdated: dict[str, str]
) -> None:
    steps = ("convert", "correct", "larger/prune", "larger/distill", "smaller/prune", "smaller/distill")
    made = {step: str(number) * 64 for number, step in enumerate(steps)}
    makers = {"source": "convert", "pruned": "smaller/prune", "distilled": "smaller/distill"}
    makers |= {"teacher": "correct", "intermediate": "larger/distill"}
    if teacher == "previous":
        makers |= {"corrected": "correct", "teacher": makers.pop("intermediate")}
    recorded = {step: record("9" * 64 if step == changed else made[step]) for step in steps}
    measured = {**record(), "inputs": {model: made[step] for model, step in makers.items()} | {"data": KEY}}
    write_json(run / "manifest.json", {"schema_version": 1, "steps": recorded | {"smaller/evaluate": measured}})
    write_json(run / "stages" / "smaller" / "evaluation.json", {model: {} for model in makers})
    (run / "recipe.yaml").write_text(f"{STAGES}teacher: {{model: {teacher}}}\n")
    write_status(run, "stopped" if underway else "done", underway)
    assert read_run(run / "stages" / "smaller").outdated == outdated


def test_the_page_says_of_which_stage_a_model_was_made_anew(run: Path) -> None:
    write_status(run, "running", "larger/distill")
    page = html(write_report(run / "stages" / "smaller"))
    words = "Measured before the last distillation of larger: run minitron evaluate again when that is done."
    assert words in sentences(page, "result")
    assert headlines(page) == []
