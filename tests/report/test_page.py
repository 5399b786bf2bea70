"""Every figure on the page is one of the run directory's files; what is missing is said; text is never markup."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from minitron_nemo.arch import Plan
from minitron_nemo.cli import main
from minitron_nemo.data.choices import Choices
from minitron_nemo.errors import UserError
from minitron_nemo.models.branches import Branch
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.report.page import write_report
from minitron_nemo.report.read import read_run
from tests.report.reading import charts, headlines, html, rows, sentences, verdict
from tests.report.runs import (
    MADE,
    candidates,
    part_of_a_run,
    record,
    records,
    steps,
    tasks,
    write_json,
    write_metrics,
    write_run,
    write_status,
)


def test_the_verdict_and_the_table_are_those_of_the_evaluation(page: str) -> None:
    words = verdict(page)
    assert "Pruning cost 0.8159 ± 0.0198 nats per token" in words
    assert "regained 0.4228 ± 0.0131 nats per token, 52% of it" in words
    assert "ends 0.3931 ± 0.0152 nats per token above the teacher" in words
    found = rows(page, "result")
    assert found["held-out loss, nats per token"] == [
        f"{loss}± 0.0312" for loss in ("3.3511", "3.1712", "3.9871", "3.5643")
    ]
    assert found["loss minus teacher&#39;s, paired"][2:] == ["+0.8159± 0.0198", "+0.3931± 0.0152"]
    assert found["top-1 agreement with teacher, %"][3] == "80.3± 0.6"


def test_the_shape_is_that_of_the_plan(page: str) -> None:
    found = rows(page, "shape")
    assert found["layers"] == ["12", "9", "75.0%"]
    assert found["hidden size"] == ["96", "72", "75.0%"]
    assert found["FFN size"] == ["256", "160", "62.5%"]
    assert found["attention heads"] == ["8", "4", "50.0%"]
    assert "To make up for what goes: 19 norms rescaled." in page


def test_tasks_and_generation_are_those_of_the_files(page: str) -> None:
    tables = rows(page, "behaviour", "Tasks") | rows(page, "behaviour", "Generation")
    assert tables["hellaswag, acc"] == ["0.4649± 0.012", "0.4829± 0.012", "0.4013± 0.012", "0.4436± 0.012"]
    assert tables["lambada_openai, perplexity"][3] == "14.26± 0.5"
    assert tables["batch of 4, tokens/s"][0] == "125.8" and tables["batch of 16, peak memory"][0] == "32.0\xa0GB"


def test_what_was_not_measured_of_the_behaviour_is_left_out(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", "evaluation.json")
    evaluation = json.loads((run / "evaluation.json").read_text())
    for model in evaluation.values():
        for key in ("generation", "kl_by_position"):
            del model[key]
    write_json(run / "evaluation.json", evaluation)
    page = html(write_report(run))
    assert 'id="behaviour"' not in page and "#behaviour" not in page
    evaluation["pruned"]["generation"] = [{"batch_size": 2, "tokens_per_second": 9.0, "peak_memory_bytes": None}]
    write_json(run / "evaluation.json", evaluation)
    page = html(write_report(run))
    assert rows(page, "behaviour") == {"batch of 2, tokens/s": ["9.0"]}
    assert charts(page, "behaviour") == {}
    for damaged in ({}, {"schema_version": 1, "models": {"pruned": {"fingerprint": "7"}}}):
        write_json(run / "tasks.json", damaged)
        with pytest.raises(UserError, match="not a file of measured tasks"):
            write_report(run)


def test_a_task_without_a_finite_value_is_in_the_table_and_nowhere_else(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", "tasks.json")
    content = json.loads((run / "tasks.json").read_text())
    of_pruned = content["models"]["pruned"]["tasks"]
    of_pruned["hellaswag"]["metrics"]["acc"] = of_pruned["lambada_openai"]["metrics"]["perplexity"] = dict.fromkeys(
        ("value", "se")
    )
    write_json(run / "tasks.json", content)
    page = html(write_report(run))
    table = rows(page, "behaviour", "Tasks")
    assert table["hellaswag, acc"] == ["0.4649± 0.012", "0.4829± 0.012", "nan", "0.4436± 0.012"]
    assert table["lambada_openai, perplexity"][2] == "nan"
    shown = [said.split(":")[0] for said in charts(page, "behaviour")["Tasks"]]
    assert "pruned, lambada_openai, acc" in shown and "pruned, hellaswag, acc" not in shown and len(shown) == 7


def test_the_facts_of_the_trainings_are_those_of_the_metrics(run: Path, page: str) -> None:
    found = rows(page, "training")
    reports = [each for each in records(run, "distilled") if "train/loss" in each]
    assert found["tokens"] == ["197\xa0k", "983\xa0k"]
    assert found["loss, last report"][1] == f"{reports[-1]['train/loss']:.4f}"
    speeds = [each["speed/tokens_per_second"] for each in reports]
    assert found["tokens/s, median"][1] == f"{np.median(speeds):,.0f}"
    lowest = min(each["validation/loss"] for each in records(run, "distilled") if "validation/loss" in each)
    assert found["held-out loss, lowest"][1] == f"{lowest:.4f}"
    assert found["peak memory of a GPU"] == ["32.1\xa0GB"] * 2


def measure_depth(run: Path, branches: list[set[int]], choices: Choices | None = None) -> None:
    """Other measurements than those of `write_run`: loss 3 + 0.1 for each layer number that is left out."""
    scores = DepthScores.load(run / "depth.npz")
    weights = np.full(len(scores.weights), 100.0)
    sums = {Branch(each): weights * (3 + 0.1 * sum(each)) for each in branches}
    DepthScores(scores.architecture, scores.identity, weights, choices, sums).save(run / "depth.npz")


@pytest.mark.slow
def test_layers_that_go_together_are_shown_as_they_were_measured(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", "scores.npz", "pruned", "depth.npz")
    plan = Plan.load(run / "pruned" / "plan.json")
    gone = sorted(set(range(12)) - set(plan.kept_layers))
    first = charts(html(write_report(run)), "importance")
    assert [said.partition(":")[0] for said in first["Loss as layers go"]] == [
        "without 0 layers, no layer the last",
        *(f"without {count} layers, {gone[count - 1]} the last" for count in (1, 2, 3)),
    ]
    assert len(first["Block Influence and loss"]) == 12
    measure_depth(run, [set(), *({start, start + 1, start + 2} for start in range(10))])
    found = charts(html(write_report(run)), "importance")
    assert [said.partition(" ±")[0] for said in found["Loss without a block of 3 layers"]] == [
        f"without layers {start} to {start + 2}: {3 + 0.1 * (3 * start + 3):.6g}" for start in range(10)
    ]
    assert "Loss without one layer" not in found and "Loss as layers go" not in found
    # A task: eight questions of two choices each.
    choices = Choices(counts=np.array([2] * 8), answers=np.array([0] * 8), characters=np.ones(16, int))
    measure_depth(run, [set(), {0}, {5}], choices)
    found = charts(html(write_report(run)), "importance")
    assert [said.partition(":")[0] for said in found["Accuracy without one layer"]] == [
        f"without layer {layer} ({'kept' if layer in plan.kept_layers else 'dropped'})" for layer in (0, 5)
    ]
    assert "Block Influence and loss" not in found


def test_the_headlines_are_those_of_the_evaluation(run: Path, page: str, tmp_path: Path) -> None:
    assert headlines(page) == [
        ("36%", "of the teacher&#39;s parameters outside the embeddings"),
        ("52%", "of the loss that pruning cost is regained by distillation"),
        ("80%", "of positions where student and teacher agree on the likeliest next token"),
        ("1.0\xa0×", "the teacher&#39;s speed of generation, one text at a time"),
    ]
    other = part_of_a_run(tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    for model in evaluation.values():
        model["generation"] = model["generation"][1:]
    evaluation["distilled"]["generation"][0]["tokens_per_second"] *= 2.5
    write_json(other / "evaluation.json", evaluation)
    assert headlines(html(write_report(other)))[3] == (
        "2.5\xa0×",
        "the teacher&#39;s speed of generation, 4 texts at once",
    )


def test_a_model_without_a_finite_loss_is_in_the_table_and_nowhere_else(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", "evaluation.json", "training", updates=4)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["teacher"] |= {"loss": 800.0, "perplexity": None}  # the perplexity is infinite
    evaluation["pruned"] |= {"loss": None, "loss_se": None, "perplexity": None, "delta_vs_teacher": None}
    evaluation["pruned"]["kl_by_position"][3] |= {"kl": None, "se": None}
    write_json(run / "evaluation.json", evaluation)
    page = html(write_report(run))
    names = ("source", "teacher", "pruned", "distilled")
    shown = {label: dict(zip(names, cells, strict=True)) for label, cells in rows(page, "result").items()}
    assert shown["held-out loss, nats per token"]["pruned"] == "nan"
    assert (shown["perplexity"]["teacher"], shown["perplexity"]["pruned"]) == ("inf", "nan")
    assert headlines(page) == [] and 'class="verdict"' not in page
    drawn = charts(page, "result") | charts(page, "training", "Distillation")
    assert [said.split(":")[0] for said in drawn["Held-out loss"]] == ["source", "teacher", "distilled"]
    assert "teacher: 800" in drawn["Cross-entropy"] and not any("pruned" in said for said in drawn["Cross-entropy"])
    by_position = charts(page, "behaviour")["Divergence by position"]
    assert sum(said.startswith("pruned") for said in by_position) == len(evaluation["pruned"]["kl_by_position"]) - 1


def test_figures_of_an_earlier_student_are_no_verdict_on_this_one(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", "evaluation.json", "tasks.json", "training")
    write_metrics(run / "training" / "distilled-89abcdef", 7, np.random.default_rng(2), hidden=True)
    anew = record("9" * 64) | {"key": "89abcdef" * 8}
    write_json(run / "manifest.json", {"schema_version": 1, "steps": steps() | {"distill": anew}})
    write_status(run, "done", "distill")
    page = html(write_report(run))
    assert len(charts(page, "training", "Distillation")["Throughput"]) == 7
    assert 'class="headlines"' not in page and 'class="verdict"' not in page
    words = "Measured before the last distillation: run minitron {} again when that is done."
    for section in ("result", "behaviour", "samples"):
        assert sentences(page, section)[0] == words.format("evaluate"), section
    assert words.format("tasks") in sentences(page, "behaviour")
    assert {"teacher: 3.1712", "pruned: 3.9871"} <= set(charts(page, "training", "Distillation")["Cross-entropy"])
    assert rows(page, "result")["perplexity"]  # the figures themselves are still true of the models that they are of


@pytest.mark.parametrize(
    ("changed", "state", "step", "outdated"),
    [
        ((), "done", None, {}),
        ((), "running", "calibrate", {}),
        ((), "running", "distill", {"distilled": "distill"}),
        ((), "stopped", "distill", {"distilled": "distill"}),
        (("prune",), "done", "prune", {"pruned": "prune"}),
        (("prune", "distill"), "running", "evaluate", {"pruned": "prune", "distilled": "distill"}),
        (("correct",), "done", "correct", {"teacher": "correct"}),
    ],
)
def test_what_was_measured_before_a_model_was_made_anew_is_known(
    tmp_path: Path, changed: tuple[str, ...], state: str, step: str | None, outdated: dict[str, str]
) -> None:
    recorded = steps()
    evaluation = {name: {} for name in recorded["evaluate"]["inputs"] if name != "data"}
    for name in changed:
        recorded[name]["output"] = "9" * 64
    write_json(tmp_path / "manifest.json", {"schema_version": 1, "steps": recorded})
    write_json(tmp_path / "evaluation.json", evaluation)
    write_json(tmp_path / "tasks.json", tasks(dict.fromkeys(evaluation, {"loss": 3.0})))
    write_status(tmp_path, state, step)
    found = read_run(tmp_path)
    assert found.outdated == found.outdated_tasks == outdated
    for name in changed:  # measured again
        recorded["evaluate"]["inputs"] = {
            model: "9" * 64 if mark == MADE[name] else mark for model, mark in recorded["evaluate"]["inputs"].items()
        }
    write_json(tmp_path / "manifest.json", {"schema_version": 1, "steps": recorded})
    write_status(tmp_path, "done", None)
    assert read_run(tmp_path).outdated == {}


def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path: Path) -> None:
    write_status(tmp_path, "running", "convert")
    page = html(write_report(tmp_path))
    assert "<svg" not in page
    assert "This run is not done: running, step convert at 2026-01-02T03:04:05Z" in page
    for section, words in {
        "result": "The models have not been measured yet.",
        "shape": "The teacher has not been scored yet, so nothing is cut.",
        "training": "The distillation has not reported anything yet.",
        "importance": "The teacher has not been scored yet.",
        "candidates": "No search was made: the recipe gives the shape.",
        "samples": "Nothing was generated: the models have not been measured yet, or evaluate.generate_tokens is 0.",
        "provenance": "No step has ended yet.",
    }.items():
        assert words in sentences(page, section)


@pytest.mark.slow
def test_a_run_that_is_training_shows_what_it_has(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("evaluation.json", "training", "search", "depth.npz", "manifest.json"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    write_json(run / "manifest.json", {"schema_version": 1, "steps": {"distill": record()}})  # of earlier settings
    write_metrics(run / "training" / "distilled-01234567", 60, np.random.default_rng(1))
    write_metrics(run / "training" / "distilled-89abcdef", 7, np.random.default_rng(2), hidden=True)
    with (run / "training" / "distilled-89abcdef" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 8, "train/lo')  # half a line: it is being written
    write_status(run, "running", "distill", iteration=7)
    page = html(write_report(run))
    assert "running, step distill, update 7 of 60 at 2026-01-02T03:04:05Z" in page
    assert len(charts(page, "training", "Distillation")["Throughput"]) == 7
    assert "The loss without single layers was not measured." in sentences(page, "importance")
    write_status(run, "done", "distill")
    assert len(charts(html(write_report(run)), "training", "Distillation")["Throughput"]) == 60


def test_candidates_that_failed_are_counted(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", "search")
    words = "{} failed: search/table.json says why, under failed."
    table = {"schema_version": 1, "candidates": candidates(), "failed": [{"name": "f", "loss": None}]}
    write_json(run / "search" / "table.json", table)
    page = html(write_report(run))
    assert sentences(page, "candidates") == [words.format("1 candidate")]
    assert len(charts(page, "candidates")["Candidates: size and loss"]) == len(candidates())
    write_json(run / "search" / "table.json", {**table, "candidates": [], "failed": 2 * table["failed"]})
    page = html(write_report(run))
    assert sentences(page, "candidates") == [words.format("2 candidates")] and charts(page, "candidates") == {}


def test_what_models_generate_is_text(page: str) -> None:
    assert "<script" not in page and "<b>bold</b>" not in page
    assert "&lt;script&gt;document.title = &#39;taken&#39;&lt;/script&gt; \ufffd\ufffd &amp;" in page
    assert "\x00" not in page and "\x07" not in page
    assert "<em>nothing but white space</em>" in page


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    links = set(re.findall(r'(?:href|src)="([^"]*)"', page)) | set(re.findall(r"url\(([^)]*)\)", page))
    assert {link for link in links if not link.startswith("#")} == {"data:,"}
    assert {link[1:] for link in links if link.startswith("#")} <= set(re.findall(r'id="(\w+)"', page))
    assert "default-src 'none'" in page


def test_the_same_run_gives_the_same_bytes(run: Path, baseline: Path, page: str) -> None:
    assert html(write_report(run, baseline)) == page
    assert not list(run.glob(".*partial"))


def test_provenance_names_steps_versions_and_the_recipe(page: str) -> None:
    assert rows(page, "provenance")["export/hf"] == ["1.5 s", "8", "0123456789abcdef"]
    assert "Versions: minitron_nemo 0.1.0, torch 2.13.0." in " ".join(sentences(page, "provenance"))
    assert "global_batch_size: 8" in page and "jsd_beta: 0.5" in page  # defaults are filled in


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("evaluation.json", "{", "evaluation.json: not valid JSON"),
        ("search/table.json", '{"candidates": [{"parameters": 1}]}', "search/table.json: not a table of candidates"),
        ("scores.npz", "nothing", "scores.npz: not a scores file"),
        ("depth.npz", "nothing", "depth.npz: not depth scores"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    write_status(tmp_path, "done", "export")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(words)):
        write_report(tmp_path)


@pytest.mark.slow
def test_the_verb_takes_a_run_or_its_recipe(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main(["report", str(run / "recipe.yaml"), f"run_dir={run}"]) == 0
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: not a run directory" in capsys.readouterr().err
    assert main(["report", str(run), "train.lr=1"]) == 2
    assert "train.lr=1 changes a recipe" in capsys.readouterr().err
