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
from minitron_nemo.importance.scores import Scores
from minitron_nemo.models.branches import Branch
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.report.page import write_report
from tests.report.reading import charts, html, rows, sentences
from tests.report.runs import RECIPE, candidates, record, write_json, write_metrics, write_run, write_status


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return html(write_report(run))


def part_of_a_run(directory: Path, *kept: str) -> Path:
    """Of the run of `write_run` only these, so that few charts are drawn."""
    run = write_run(directory)
    for path in run.iterdir():
        if path.name not in ("status.json", "recipe.yaml", *kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run


def records(run: Path, name: str) -> list[dict]:
    [path] = run.glob(f"training/{name}-*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_verdict_and_the_table_are_those_of_the_evaluation(page: str) -> None:
    words = re.sub(r"\s+", " ", re.findall(r'<p class="verdict">(.*?)</p>', page)[0])
    assert "Pruning cost 0.8159 ± 0.0198 nats per token" in words
    assert "regained 0.4228 ± 0.0131 nats per token, 52% of it" in words
    assert "ends 0.3931 ± 0.0152 nats per token above the teacher" in words
    found = rows(page, "result")
    assert found["held-out loss, nats per token"] == [
        f"{loss}± 0.0312" for loss in ("3.3511", "3.1712", "3.9871", "3.5643")
    ]
    assert found["loss minus teacher&#39;s, paired"][2:] == ["+0.8159± 0.0198", "+0.3931± 0.0152"]
    assert found["top-1 agreement with teacher, %"][3] == "80.3± 0.6"
    assert charts(page, "result")["Held-out loss"][1] == "teacher: 3.1712 ± 0.0312 nats per token"


def test_the_shape_is_that_of_the_plan(page: str) -> None:
    found = rows(page, "shape")
    assert found["layers"] == ["12", "9", "75.0%"]
    assert found["hidden size"] == ["96", "72", "75.0%"]
    assert found["FFN size"] == ["256", "160", "62.5%"]
    assert found["attention heads"] == ["8", "4", "50.0%"]


def test_the_curves_are_those_of_the_metrics(run: Path, page: str) -> None:
    found = charts(page, "training")
    reports = [each for each in records(run, "distilled") if "train/loss" in each]
    for chart, label, key in (
        ("What is minimised", "total", "train/loss"),
        ("What is minimised", "logits", "train/logits"),
        ("Cross-entropy", "training", "train/ce"),
        ("Learning rate", "learning rate", "train/lr"),
        ("Gradient norm", "gradient norm", "train/grad_norm"),
        ("Throughput", "throughput", "speed/tokens_per_second"),
    ):
        expected = [f"{label} after {each['data/tokens']:,.0f} tokens: {each[key]:.6g}" for each in reports]
        assert [said for said in found[chart] if said.startswith(f"{label} after")] == expected
    weighted = [f"{each['train/alpha'] * each['train/hidden']:.6g}" for each in reports]
    terms = [said for said in found["What is minimised"] if said.startswith("hidden")]
    assert [said.rpartition(" ")[2] for said in terms] == weighted
    validations = [each for each in records(run, "distilled") if "validation/loss" in each]
    held_out = [said for said in found["Cross-entropy"] if said.startswith("held out")]
    assert held_out == [
        f"held out after {16384 * each['iteration']:,} tokens: {each['validation/loss']:.6g} ± 0.04"
        for each in validations
    ]
    assert {"teacher: 3.1712", "pruned: 3.9871"} <= set(found["Cross-entropy"])


def test_many_reports_are_averaged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates=1000)
    page = html(write_report(run))
    said = charts(page, "training")["Throughput"]
    values = [each["speed/tokens_per_second"] for each in records(run, "distilled") if "train/loss" in each]
    assert [float(each.rpartition(" ")[2]) for each in said] == pytest.approx(
        [np.mean(values[start : start + 9]) for start in range(0, 1000, 9)], rel=1e-5
    )
    assert "Every point is the mean of several reports." in page


def test_layers_and_heads_are_shown_as_the_plan_keeps_them(run: Path, page: str) -> None:
    plan, scores = Plan.load(run / "pruned" / "plan.json"), Scores.load(run / "scores.npz")
    found = charts(page, "importance")
    assert found["Block Influence by layer"] == [
        f"layer {layer} {'kept' if layer in plan.kept_layers else 'dropped'}: Block Influence {influence:.6g}"
        for layer, influence in enumerate(scores.block_influence)
    ]
    measured = DepthScores.load(run / "depth.npz")
    whole, tokens = measured.sums[Branch()], measured.weights.sum()
    for layer, said in enumerate(found["Loss without one layer"]):
        sums = measured.sums[Branch({layer})]
        lost = (sums - whole).sum() / tokens
        error = np.sqrt(16 / 15 * np.square(sums - whole - lost * measured.weights).sum()) / tokens
        assert said.rpartition(": ")[2] == f"{sums.sum() / tokens:.6g} ± {error:.3g}"
    # 2407.14679 section 2.2 by hand: the mean over tokens, then the L2 norm over sequences.
    heads = np.sqrt(scores.heads[1, 0])
    kept = {(layer, head) for layer, entries in zip(plan.kept_layers, plan.kept_heads, strict=True) for head in entries}
    assert found["Attention heads by layer"] == [
        f"layer {layer}, head {head}, {'kept' if (layer, head) in kept else 'dropped'}: "
        f"{heads[layer, head] / heads[layer].mean():.4g} of the mean"
        for layer in range(12)
        for head in range(8)
    ]


def test_channels_and_neurons_are_ranked_by_what_ranked_them(run: Path, page: str) -> None:
    plan, scores = Plan.load(run / "pruned" / "plan.json"), Scores.load(run / "scores.npz")
    found = charts(page, "importance")
    by_layer = scores.hidden[0, 0].reshape(12, 2, 96).sum(axis=1) / 16  # the mean over tokens, and over sequences
    channels = by_layer.sum(axis=0)
    order = np.argsort(-channels)
    assert found["Hidden channels by rank"] == [
        f"channel {entry}, rank {rank + 1}, {'kept' if entry in plan.kept_hidden else 'dropped'}: "
        f"{channels[entry] / channels.mean():.4g} of the mean"
        for rank, entry in enumerate(order)
    ]
    relative = (by_layer / by_layer.mean(axis=1, keepdims=True))[:, order].reshape(12, 32, 3).mean(axis=2)
    assert [said.split(": ")[1] for said in found["Hidden channels by layer"]] == [
        f"{value:.4g} of the mean" for value in relative.ravel()
    ]
    neurons = np.sqrt(scores.ffn[1, 1] / scores.tokens) * scores.ffn_column_norms
    ranked = -np.sort(-neurons, axis=1) / neurons.mean(axis=1, keepdims=True)
    assert found["FFN neurons by rank"] == [
        f"layer {layer}, rank 160 of 256, the last kept: {ranked[layer, 159]:.4g} of the mean"
        for layer in plan.kept_layers
    ]
    bins = ranked.reshape(12, 32, 8).mean(axis=2)
    assert [said.split(": ")[1] for said in found["FFN neurons by layer"]] == [
        f"{value:.4g} of the mean" for value in bins.ravel()
    ]
    stays = [
        f"layer {layer}, ranks {start + 1} to {start + 8}, kept"
        for layer in plan.kept_layers
        for start in range(0, 160, 8)
    ]
    assert [said.split(": ")[0] for said in found["FFN neurons by layer"] if "kept" in said] == stays
    text = " ".join(sentences(page, "importance"))
    assert "32,768 tokens in 16 sequences" in text


def test_candidates_and_their_front(page: str) -> None:
    found = charts(page, "candidates")
    assert set(found) == {"Candidates: size and loss", "Candidates: speed and loss"}
    for said in found.values():
        assert len(said) == 5
        for candidate, words in zip(candidates(), said, strict=True):
            size = f"{candidate['parameters']:,} parameters"
            assert words.startswith(f"{candidate['name']}: {size}, loss {candidate['loss']} ± {candidate['loss_se']}")
            assert words.endswith("on the Pareto front") == candidate["pareto"]
            assert f"{candidate['latency_seconds']} s" in words


def test_training_from_scratch_is_compared_by_tokens(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")

    def losses(name: str, values: dict[int, float]) -> None:
        directory = run / "training" / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        lines = [
            {"iteration": iteration, **values}
            for iteration, loss in values.items()
            for values in ({"train/ce": loss, "data/tokens": 100 * iteration}, {"validation/loss": loss})
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    losses("distilled-01234567", {10: 3.0, 20: 2.5, 30: 2.4, 40: 2.4})
    losses("scratch-any", {30: 3.0, 60: 2.6, 90: 2.4, 120: 2.3})
    said = sentences(html(write_report(run)), "training")
    words = "2.4000 nats per token after 3,000 tokens; training from scratch needed 9,000, 3 times as many"
    assert any(words in each for each in said)
    losses("scratch-any", {30: 3.0, 60: 2.6})  # distillation was below that after its second validation
    said = sentences(html(write_report(run)), "training")
    words = "2.6000 nats per token after 2,000 tokens; training from scratch needed 6,000, 3 times as many."
    assert any(f"{words} The 2.4000 that distillation ended with" in each for each in said)


def test_the_training_of_another_run_is_drawn_beside_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = (part_of_a_run(tmp_path / name, "training") for name in ("run", "other"))
    shutil.rmtree(run / "training" / "scratch-any")
    assert "needed" not in " ".join(sentences(html(write_report(run)), "training"))
    assert main(["report", str(run), "--baseline", str(other)]) == 0
    page = html(run / "report.html")
    marks = charts(page, "training")["Held-out loss, distilled and baseline"]
    for label, directory in (("distilled", run), ("baseline", other)):
        expected = [
            f"{label} after {16384 * each['iteration']:,} tokens: {each['validation/loss']:.6g} ± 0.04"
            for each in records(directory, "distilled")
            if "validation/loss" in each
        ]
        assert [said for said in marks if said.startswith(label)] == expected
    assert "; the baseline needed 983,040, 1 times as many." in " ".join(sentences(page, "training"))
    for path in other.glob("training/*/metrics.jsonl"):
        path.write_text(json.dumps({"iteration": 1, "train/loss": 3.0, "data/tokens": 10}) + "\n")
    capsys.readouterr()
    assert main(["report", str(run), "--baseline", str(other)]) == 2
    assert f"--baseline {other}: no training in it has held-out losses" in capsys.readouterr().err


def test_tasks_positions_and_generation_are_those_of_the_evaluation(run: Path, page: str) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    marks = charts(page, "behaviour")
    assert marks["Divergence by position"] == [
        f"{name}, tokens {64 * part} to {64 * part + 63}: {evaluation[name]['kl_by_position'][part]['kl']:.6g} ± 0.01"
        for name in ("source", "pruned", "distilled")  # the teacher's from itself is nothing
        for part in range(4)
    ]
    assert marks["Tasks"][:2] == ["source, hellaswag, acc: 0.46489 ± 0.0123", "source, lambada_openai, acc: 0.6 ± 0.02"]
    assert marks["Speed of generation"][-1] == "distilled, batch of 16: 381.4 tokens/s"
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
    write_json(run / "tasks.json", {})
    with pytest.raises(UserError, match="not a file of measured tasks"):
        write_report(run)


def test_the_facts_of_the_trainings_are_those_of_the_metrics(run: Path, page: str) -> None:
    found = rows(page, "training")
    reports = [each for each in records(run, "distilled") if "train/loss" in each]
    assert found["tokens"] == ["197\xa0k", "983\xa0k", "1.97\xa0M"]
    assert found["loss, last report"][1] == f"{reports[-1]['train/loss']:.4f}"
    speeds = [each["speed/tokens_per_second"] for each in reports]
    assert found["tokens/s, median"][1] == f"{np.median(speeds):,.0f}"
    lowest = min(each["validation/loss"] for each in records(run, "distilled") if "validation/loss" in each)
    assert found["held-out loss, lowest"][1] == f"{lowest:.4f}"
    assert found["peak memory of a GPU"] == ["32.1\xa0GB"] * 3


def measure_depth(run: Path, branches: list[set[int]], choices: Choices | None = None) -> None:
    """Other measurements than those of `write_run`: loss 3 + 0.1 for each layer number that is left out."""
    scores = DepthScores.load(run / "depth.npz")
    weights = np.full(len(scores.weights), 100.0)
    sums = {Branch(each): weights * (3 + 0.1 * sum(each)) for each in branches}
    DepthScores(scores.architecture, scores.identity, weights, choices, sums).save(run / "depth.npz")


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


def test_the_headlines_are_those_of_the_evaluation(page: str) -> None:
    found = re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page.partition("</header>")[0])
    assert [figure for _, figure in found] == ["36%", "52%", "80%", "1.0\xa0×"]


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
    assert len(charts(page, "training")["Throughput"]) == 7
    assert "The loss without single layers was not measured." in sentences(page, "importance")
    write_status(run, "done", "distill")
    assert len(charts(html(write_report(run)), "training")["Throughput"]) == 60


def test_scores_without_a_cut_show_the_one_that_the_recipe_asks_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "pruned")
    (run / "recipe.yaml").write_text(RECIPE + "prune: {num_layers: 10}\n")
    page = html(write_report(run))
    assert "The cut has not been made yet; this is what the recipe asks for." in sentences(page, "shape")
    assert rows(page, "shape")["layers"] == ["12", "10", "83.3%"]
    assert "All 96 stay." in page


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


def test_the_same_run_gives_the_same_bytes(run: Path, page: str) -> None:
    assert html(write_report(run)) == page
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
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    write_status(tmp_path, "done", "export")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(words)):
        write_report(tmp_path)


def test_the_verb_takes_a_run_or_its_recipe(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main(["report", str(run / "recipe.yaml"), f"run_dir={run}"]) == 0
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: not a run directory" in capsys.readouterr().err
    assert main(["report", str(run), "train.lr=1"]) == 2
    assert "train.lr=1 changes a recipe" in capsys.readouterr().err
