"""Ranking, halving and the Pareto front against brute force; differences against the paired formula by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from minitron_nemo.arch import Architecture
from minitron_nemo.config import EvaluateConfig, Recipe, SearchConfig, ServingConfig, load_recipe
from minitron_nemo.distillation.status import write_status
from minitron_nemo.errors import UserError
from minitron_nemo.search.candidates import candidate_recipe
from minitron_nemo.search.costs import Costs
from minitron_nemo.search.results import Result, Standing, load_result, pareto, ranked, save_result, survivors
from minitron_nemo.search.shapes import Candidate
from minitron_nemo.search.table import rows, write_table
from minitron_nemo.search.trials import reason
from tests.e2e.chain import write_recipe


def standing(
    number: int, costs: tuple[float, ...], losses: dict[int, float], documents: int = 6, speed: float | None = 10.0
) -> Standing:
    """Its speed is that of the cut; what later measurements say of it counts for nothing."""
    shape = Architecture(
        num_layers=number + 2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=259,
        max_position_embeddings=512,
    )
    noise = np.random.default_rng(number).normal(size=documents)
    noise -= noise.mean()
    results = tuple(
        Result(steps, loss, 0.1, 0.2, tuple((loss + noise).tolist()), None if steps else speed)
        for steps, loss in losses.items()
    )
    parameters, active, memory, latency = costs
    return Standing(Candidate(shape, Costs(int(parameters), int(active), 0, int(memory), latency)), results)


def names(standings: list[Standing]) -> list[int]:
    return [each.candidate.architecture.num_layers - 2 for each in standings]


def test_the_front_is_that_of_brute_force() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        standings = []
        for number in range(12):
            costs = generator.integers(1, 3, 4)
            losses = dict(zip((0, 10, 20), generator.integers(1, 6, 3) / 4, strict=True))
            reached = {steps: losses[steps] for steps in list(losses)[: 1 + number % 3]}
            speed = float(generator.integers(1, 3))
            standings.append(standing(number, tuple(costs.tolist()), reached, speed=speed))
        expected = set()
        for one in standings:
            steps = one.last.steps
            beaten = False
            for other in standings:
                theirs = {result.steps: result.loss for result in other.results}
                if steps not in theirs:
                    continue
                pairs = [
                    (other.costs.parameters, one.costs.parameters),
                    (other.costs.active_parameters, one.costs.active_parameters),
                    (other.costs.memory_bytes, one.costs.memory_bytes),
                    (other.costs.latency_seconds, one.costs.latency_seconds),
                    (1 / other.results[0].tokens_per_second, 1 / one.results[0].tokens_per_second),
                    (theirs[steps], one.last.loss),
                ]
                beaten |= all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
            if not beaten:
                expected.add(one.candidate.name)
        assert pareto(standings) == expected
        assert 0 < len(expected) < len(standings)


def test_those_that_went_further_rank_first_and_then_the_loss_counts() -> None:
    costs = (1, 1, 1, 1.0)
    standings = [
        standing(0, costs, {0: 1.0}),
        standing(1, costs, {0: 2.0, 10: 1.5}),
        standing(2, costs, {0: 3.0, 10: 1.2}),
        standing(3, costs, {0: 0.5}),
        standing(4, costs, {0: math.nan}),
    ]
    assert names(ranked(standings)) == [2, 1, 3, 0, 4]
    assert names(survivors(standings[:3], 0.5)) == [2, 1]  # half of three, rounded up
    assert names(survivors(standings[:3], 0.3)) == [2]


def test_differences_are_paired_with_the_best_after_the_same_updates() -> None:
    costs = (1, 1, 1, 1.0)
    standings = [standing(0, costs, {0: 2.0, 10: 1.0}), standing(1, costs, {0: 1.5}), standing(2, costs, {0: 1.75})]
    first, second, third = rows(standings, (0, 10))
    assert [row["rank"] for row in (first, second, third)] == [1, 2, 3]
    assert (first["delta"], first["delta_se"]) == (0, 0)
    assert (second["delta"], second["losses"]) == (0, {"0": 1.5})  # the best of those that got no further
    differences = np.array(standings[2].last.losses) - np.array(standings[1].last.losses)
    assert third["delta"] == pytest.approx(0.25)
    assert third["delta_se"] == pytest.approx(differences.std(ddof=1) / math.sqrt(6))
    alone = [standing(0, costs, {0: 2.0}, documents=1)]
    assert rows(alone, (0,))[0]["delta_se"] is None


def test_a_candidate_without_a_loss_is_last_and_in_nobodys_way(tmp_path: Path) -> None:
    """Cheaper than all others, and the first to be asked: with NaN every comparison would be False, or spoilt."""
    recipe = Recipe(name="tiny", run_dir=str(tmp_path / "run"))
    (tmp_path / "run" / "search").mkdir(parents=True)
    failed = Result.failed(10, "no update was finite")
    costs, dear = (1, 1, 1, 0.25), (9, 9, 9, 0.5)
    standings = [
        standing(0, costs, {0: math.nan}),
        replace(early := standing(1, costs, {0: 1.0}), results=(*early.results, failed)),
        standing(2, costs, {0: math.inf}),
        standing(3, dear, {0: 3.0, 10: 2.0}),
        standing(4, dear, {0: 2.5, 10: 2.5}),
        standing(5, dear, {0: 3.5}),
    ]
    assert names(survivors(standings, 1.0)) == names(ranked(standings))[:3] == [3, 4, 5]
    assert pareto(standings) == {standings[3].candidate.name}
    text = write_table(recipe, standings, (0, 10))

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    table = json.loads((tmp_path / "run/search/table.json").read_text(), parse_constant=refused)
    assert [row["delta"] for row in table["candidates"]] == pytest.approx([0, 0.5, 2.5])
    assert [row["loss"] for row in table["candidates"]] == [2.0, 2.5, 3.5]
    by_layers = {row["num_layers"] - 2: row for row in table["failed"]}
    assert by_layers.keys() == {0, 1, 2} and {row["loss"] for row in by_layers.values()} == {None}
    assert (by_layers[1]["failure"], by_layers[1]["losses"]) == ("no update was finite", {"0": 1.0, "10": None})
    assert by_layers[0]["losses"] == {"0": None} and by_layers[0]["delta"] is None
    assert text.count("failed") == 3 and "nan" not in text and "inf" not in text
    assert f"{standings[3].candidate.name}, loss 2.0000" in (tmp_path / "run/search/best.yaml").read_text()
    write_table(recipe, standings[:3], (0, 10))
    assert not (tmp_path / "run/search/best.yaml").exists()  # that of the rung before is nobody's best any more


@pytest.mark.slow
def test_the_best_generates_as_fast_as_the_budget_asks_for(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["search.budget.min_tokens_per_second=20"])
    (tmp_path / "run" / "search").mkdir(parents=True)
    costs = (1, 1, 1, 1.0)
    slow, fast, worse = (
        standing(number, costs, {0: loss}, speed=speed)
        for number, (loss, speed) in enumerate([(1.0, 19.0), (2.0, 20.0), (3.0, 30.0)])
    )
    write_table(recipe, [worse, slow, fast], (0,))
    assert f"{fast.candidate.name}, loss 2.0000" in (tmp_path / "run/search/best.yaml").read_text()
    write_table(recipe, [slow], (0,))
    assert not (tmp_path / "run/search/best.yaml").exists()


@pytest.mark.parametrize(
    ("loss", "perplexity", "failure"), [(800.0, math.inf, None), (math.nan, math.nan, "not finite")]
)
def test_a_result_that_is_not_finite_is_kept_as_json(
    tmp_path: Path, loss: float, perplexity: float, failure: str | None
) -> None:
    figures = {"loss": loss, "perplexity": perplexity, "kl_to_teacher": loss, "generation_tokens_per_second": 9.0}
    record = {**figures, "loss_se": None, "losses_per_document": [loss, loss]}
    saved = save_result(tmp_path / "result_0.json", "key", 0, {"pruned": record})
    held = json.loads((tmp_path / "result_0.json").read_text(), parse_constant=pytest.fail)
    assert held["evaluation"]["pruned"]["perplexity"] is None
    found = load_result(tmp_path / "result_0.json", "key")
    assert found is not None and repr(found) == repr(saved)  # nan is not equal to itself
    assert found.finite == (failure is None) and (failure or "") in (found.failure or "")


@pytest.mark.parametrize("content", ['{"schema_version": 1, "ke', "[]"])
def test_a_damaged_result_is_named_and_a_damaged_status_says_nothing(tmp_path: Path, content: str) -> None:
    for name in ("result_0.json", "status.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"result_0\.json: .*; remove it, and it is measured again$"):
        load_result(tmp_path / "result_0.json", "key")
    assert reason(tmp_path) == "it did not come to its end"
    write_status(tmp_path, "failed", reason="no room")
    assert reason(tmp_path) == "failed: no room"


@pytest.mark.slow
def test_the_tables_say_the_same_and_the_best_is_a_section_of_a_recipe(tmp_path: Path) -> None:
    recipe: Recipe = load_recipe(write_recipe(tmp_path))
    (tmp_path / "run" / "search").mkdir(parents=True)
    standings = [standing(0, (9, 9, 8, 0.5), {0: 2.0, 10: 1.0}), standing(1, (7, 7, 6, 0.25), {0: 1.5})]
    text = write_table(recipe, standings, (0, 10))
    directory = tmp_path / "run" / "search"
    assert (directory / "table.md").read_text() == text + "\n"
    table = json.loads((directory / "table.json").read_text())["candidates"]
    assert [row["num_layers"] for row in table] == [2, 3]
    header, *lines = [line.split("\t") for line in (directory / "table.tsv").read_text().splitlines()]
    assert [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")] == header
    assert [dict(zip(header, line, strict=True))["loss after 10"] for line in lines] == ["1.0000", ""]
    assert [dict(zip(header, line, strict=True))["latency, s"] for line in lines] == ["0.5", "0.25"]
    assert [dict(zip(header, line, strict=True))["tokens/s"] for line in lines] == ["10.0", "10.0"]
    best = yaml.safe_load((directory / "best.yaml").read_text())
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4}
    assert best == {"prune": sizes}
    [command] = [line for line in (directory / "best.yaml").read_text().splitlines() if "minitron run" in line]
    chosen = load_recipe(tmp_path / "tiny.yaml", command.split()[4:])
    assert {name: getattr(chosen.prune, name) for name in sizes} == sizes


def test_the_table_of_a_mixture_has_its_axes_and_what_a_token_meets(tmp_path: Path) -> None:
    recipe = Recipe(name="mixture", run_dir=str(tmp_path / "run"))
    (tmp_path / "run" / "search").mkdir(parents=True)
    dense = standing(0, (9, 5, 8, 0.5), {0: 2.0})
    experts = {"num_moe_experts": 4, "moe_ffn_hidden_size": 96, "moe_router_topk": 2, "family": "mixtral"}
    shape = replace(dense.candidate.architecture, **experts, model_type="mixtral")
    write_table(recipe, [replace(dense, candidate=Candidate(shape, dense.costs))], (0,))
    directory = tmp_path / "run" / "search"
    header, line = (line.split("\t") for line in (directory / "table.tsv").read_text().splitlines())
    cells = dict(zip(header, line, strict=True))
    assert header[1:9] == ["layers", "hidden", "experts", "expert ffn", "heads", "groups", "parameters", "active"]
    assert (cells["experts"], cells["expert ffn"], cells["parameters"], cells["active"]) == ("4", "96", "9", "5")
    sizes = {"num_layers": 2, "hidden_size": 64, "num_moe_experts": 4, "moe_ffn_hidden_size": 96}
    best = yaml.safe_load((directory / "best.yaml").read_text())
    assert best == {"prune": {**sizes, "num_attention_heads": 8, "num_query_groups": 4}}


def test_a_candidate_is_timed_once_as_it_is_to_serve(tmp_path: Path) -> None:
    serving = ServingConfig(batch_size=16, prompt_tokens=2048, new_tokens=256)
    evaluation = EvaluateConfig(documents=5, generate_tokens=8, generate_batch_sizes=[4, 2])
    recipe = Recipe(name="tiny", run_dir=str(tmp_path), search=SearchConfig(serving=serving), evaluate=evaluation)
    candidate = standing(0, (1, 1, 1, 1.0), {0: 1.0}).candidate
    cut, trained = (candidate_recipe(recipe, candidate, steps).evaluate for steps in (0, 100))
    asked = {"generate_batch_sizes": [16], "generate_prompt_tokens": 2048, "generate_tokens": 256}
    assert cut == replace(evaluation, **asked)
    assert trained == replace(evaluation, generate_batch_sizes=[4])
    silent = replace(recipe, evaluate=replace(evaluation, generate_tokens=0))
    assert candidate_recipe(silent, candidate, 0).evaluate.generate_tokens == 0
