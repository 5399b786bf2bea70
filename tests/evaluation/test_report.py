"""Averages, standard errors and paired differences against numpy by hand; the table; the keys of evaluation.json."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_nemo.checkpoint.files import to_json
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.evaluate import Measured
from minitron_nemo.evaluation.generation import Speed
from minitron_nemo.evaluation.report import read_evaluation, summarise, table
from tests.models.support import architecture

KEYS = {
    "loss",
    "loss_se",
    "losses_per_document",
    "perplexity",
    "kl_to_teacher",
    "top1_agreement",
    "kl_to_teacher_se",
    "top1_agreement_se",
    "parameters",
    "non_embedding_parameters",
    "generation",
    "generation_tokens_per_second",
    "kl_by_position",
}


def _measured(documents: int = 7) -> dict[str, Measured]:
    generator = np.random.default_rng(0)
    weight = generator.integers(3, 40, documents).astype(float)
    difficulty = generator.normal(3.0, 1.0, documents)
    result = {}
    for index, name in enumerate(("teacher", "source", "pruned", "distilled")):
        loss = difficulty + 0.3 * index + generator.normal(0.0, 0.05, documents)
        result[name] = Measured(
            architecture=architecture(),
            ce=loss * weight,
            kl_to_teacher=weight * 0.1 * index,
            agreement=weight * generator.uniform(0.5, 1.0, documents),
            weight=weight,
            edges=(0, 1, 2),
            kl_by_position=np.stack([0.3 * index * (weight > 20), 0.1 * index * weight]),
            weight_by_position=np.stack([1.0 * (weight > 20), weight]),
            speeds=(Speed(2, 10.0 * (index + 1), 1000), Speed(4, 30.0, 2000)),
        )
    return result


def test_every_model_has_exactly_its_keys() -> None:
    evaluation = summarise(_measured())
    to_teacher = {"delta_vs_teacher", "delta_vs_teacher_se"}
    assert evaluation["teacher"].keys() == evaluation["source"].keys() == KEYS
    assert evaluation["pruned"].keys() == KEYS | to_teacher
    assert evaluation["distilled"].keys() == KEYS | to_teacher | {"delta_vs_pruned", "delta_vs_pruned_se"}
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation


def test_losses_are_means_over_documents_with_their_standard_errors() -> None:
    measured = _measured()
    for name, record in summarise(measured).items():
        losses = [ce / weight for ce, weight in zip(measured[name].ce, measured[name].weight, strict=True)]
        mean = sum(losses) / len(losses)
        variance = sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
        assert record["loss"] == pytest.approx(mean)
        assert record["losses_per_document"] == pytest.approx(losses)
        assert record["loss_se"] == pytest.approx((variance / len(losses)) ** 0.5)
        assert record["perplexity"] == pytest.approx(np.exp(mean))
        shares = measured[name].agreement / measured[name].weight
        assert record["top1_agreement"] == pytest.approx(np.mean(shares))
        assert record["top1_agreement_se"] == pytest.approx(np.std(shares, ddof=1) / len(shares) ** 0.5)


def test_differences_are_paired_by_document() -> None:
    measured = _measured()
    record: dict[str, Any] = summarise(measured)["distilled"]
    for other in ("teacher", "pruned"):
        differences = (measured["distilled"].ce - measured[other].ce) / measured[other].weight
        assert record[f"delta_vs_{other}"] == pytest.approx(differences.mean())
        assert record[f"delta_vs_{other}_se"] == pytest.approx(differences.std(ddof=1) / len(differences) ** 0.5)
        assert record[f"delta_vs_{other}_se"] < record["loss_se"] / 5  # documents differ more than models do


def test_documents_without_weight_are_left_out() -> None:
    measured = _measured()
    padded = {}
    for name, model in measured.items():
        sums = {key: np.append(getattr(model, key), 0.0) for key in ("ce", "kl_to_teacher", "agreement", "weight")}
        positions = ("kl_by_position", "weight_by_position")
        sums |= {key: np.pad(getattr(model, key), ((0, 0), (0, 1))) for key in positions}
        padded[name] = replace(model, **sums)
    assert summarise(padded) == summarise(measured)
    empty = {name: replace(model, weight=np.zeros_like(model.weight)) for name, model in measured.items()}
    with pytest.raises(UserError, match=r"evaluate\.documents"):
        summarise(empty)


def test_divergence_by_position_is_averaged_over_the_documents_that_reach_there() -> None:
    measured = _measured()
    record = summarise(measured)["pruned"]
    first, second = record["kl_by_position"]
    assert (first["from"], first["to"], second["from"], second["to"]) == (0, 1, 1, 2)
    assert first["kl"] == pytest.approx(0.6) and first["se"] == pytest.approx(0.0, abs=1e-12)
    assert second["kl"] == pytest.approx(0.2)
    longest = replace(measured["pruned"], weight_by_position=np.stack([np.zeros(7), np.ones(7)]))
    assert [bucket["from"] for bucket in summarise({"pruned": longest})["pruned"]["kl_by_position"]] == [1]


def test_the_first_batch_size_is_the_speed() -> None:
    record = summarise(_measured())["pruned"]
    assert record["generation"][0] == {"batch_size": 2, "tokens_per_second": 30.0, "peak_memory_bytes": 1000}
    assert record["generation_tokens_per_second"] == 30.0


def test_one_document_has_no_standard_error() -> None:
    record = summarise(_measured(documents=1))["pruned"]
    assert record["loss_se"] is None and record["delta_vs_teacher_se"] is None
    assert "±" not in table(summarise(_measured(documents=1)))


@pytest.mark.parametrize("loss", [800.0, math.inf, math.nan])
def test_a_loss_beyond_all_perplexities_is_shown_and_kept(tmp_path: Path, loss: float) -> None:
    """e^800 is no float; neither is what a model loses that gives no finite logits, and neither is JSON."""
    measured = _measured()
    measured["pruned"] = replace(measured["pruned"], ce=loss * measured["pruned"].weight)
    evaluation = summarise(measured)
    line = next(line for line in table(evaluation).splitlines() if "pruned" in line.split("|")[1])
    assert line.split("|")[4].strip() == ("nan" if math.isnan(loss) else "inf")
    file = tmp_path / "evaluation.json"
    file.write_text(to_json(evaluation))
    held = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert held["pruned"]["perplexity"] is None and held["source"] == evaluation["source"]
    record, found = evaluation["pruned"], read_evaluation(file)["pruned"]
    for key in ("loss", "losses_per_document", "delta_vs_teacher", "top1_agreement"):
        exact = math.isfinite(loss) or key == "top1_agreement"
        np.testing.assert_equal(found[key], record[key] if exact else np.full_like(record[key], np.nan))
    np.testing.assert_equal(found["perplexity"], math.inf if math.isfinite(loss) else math.nan)


def test_the_table_shows_every_model_and_its_numbers() -> None:
    evaluation = summarise(_measured())
    lines = table(evaluation).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["source", "teacher", "pruned", "distilled"]
    assert len({line.count("|") for line in lines}) == 1 and len({len(line) for line in lines}) == 1
    assert f"{evaluation['distilled']['loss']:.4f} ± {evaluation['distilled']['loss_se']:.4f}" in lines[-1]
    assert f"{evaluation['distilled']['delta_vs_pruned']:+.4f}" in lines[-1]
