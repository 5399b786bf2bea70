"""Every mark of every chart, against the files of the run: with numpy and arithmetic, not with the report's code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_nemo.arch import Plan
from minitron_nemo.importance.scores import Scores
from minitron_nemo.models.branches import Branch
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.report.page import write_report
from tests.report.reading import charts, drawn, html, lines, rows, sentences
from tests.report.runs import (
    EDGES,
    KEEPS,
    MIXTURE,
    PRUNE_MIXTURE,
    ROTATE,
    candidates,
    part_of_a_run,
    records,
    write_json,
)

Figures = dict[str, list[str]]


def of_result(run: Path) -> Figures:
    evaluation = json.loads((run / "evaluation.json").read_text())
    found = {name: evaluation[name]["loss"] for name in ("source", "teacher", "pruned", "distilled")}
    return {"Held-out loss": [f"{name}: {loss:.6g} ± 0.0312 nats per token" for name, loss in found.items()]}


def of_behaviour(run: Path) -> Figures:
    evaluation = json.loads((run / "evaluation.json").read_text())
    on_tasks = json.loads((run / "tasks.json").read_text())["models"]
    names = ("source", "teacher", "pruned", "distilled")
    buckets = ["from 1 token", "from 2 tokens", "from 3 to 4 tokens", "from 5 to 8 tokens"]
    buckets += [f"from {start + 1:,} to {2 * start:,} tokens" for start in EDGES[4:-1]]
    accuracies = [
        (name, task, on_tasks[name]["tasks"][task]["metrics"]["acc"])
        for name in names
        for task in ("hellaswag", "lambada_openai")  # whose first metric is no share
    ]
    return {
        "Divergence by position": [
            f"{name}, {bucket}: {part['kl']:.6g} ± 0.01"
            for name in ("source", "pruned", "distilled")  # the teacher's from itself is nothing
            for bucket, part in zip(buckets, evaluation[name]["kl_by_position"], strict=True)
        ],
        "Tasks": [f"{name}, {task}, acc: {acc['value']:.6g} ± {acc['se']:.3g}" for name, task, acc in accuracies],
        "Speed of generation": [
            f"{name}, batch of {size}: {41.5 * size**0.8:,.1f} tokens/s" for name in names for size in (1, 4, 16)
        ],
    }


def curve(label: str, found: list[dict[str, Any]], tag: str, error: str = "") -> list[str]:
    """Of the records that have the tag; `error` is that of a validation."""
    return [
        f"{label} after {16384 * each['iteration']:,} tokens: {each[tag]:.6g}{error}" for each in found if tag in each
    ]


def progress(found: list[dict[str, Any]]) -> Figures:
    return {
        "Learning rate": curve("learning rate", found, "train/lr"),
        "Gradient norm": curve("gradient norm", found, "train/grad_norm"),
        "Throughput": curve("throughput", found, "speed/tokens_per_second"),
    }


def cross_entropy(found: list[dict[str, Any]]) -> list[str]:
    return curve("training", found, "train/ce") + curve("held out", found, "validation/loss", " ± 0.04")


def of_distillation(run: Path) -> Figures:
    found = records(run, "distilled")
    hidden = [each | {"weighted": 0.25 * each["train/hidden"]} for each in found if "train/hidden" in each]
    return {
        "What is minimised": [
            *curve("total", found, "train/loss"),
            *curve("logits", found, "train/logits"),
            *curve("hidden × alpha", hidden, "weighted"),
        ],
        "Cross-entropy": [*cross_entropy(found), "teacher: 3.1712", "pruned: 3.9871"],
        "Divergence from the teacher": curve("held out", found, "validation/kl_to_teacher"),
        **progress(found),
    }


def of_both(run: Path, baseline: Path) -> Figures:
    curves = {"distilled": records(run, "distilled"), "baseline": records(baseline, "distilled")}
    marks = [mark for label, found in curves.items() for mark in curve(label, found, "validation/loss", " ± 0.04")]
    return {"Held-out loss, distilled and baseline": marks}


def of_correction(run: Path) -> Figures:
    found = records(run, "corrected")
    return {"Cross-entropy": cross_entropy(found), **progress(found)}


def of_depth(run: Path) -> Figures:
    plan, scores = Plan.load(run / "pruned" / "plan.json"), Scores.load(run / "scores.npz")
    measured = DepthScores.load(run / "depth.npz")
    whole, tokens = measured.sums[Branch()], measured.weights.sum()

    def lost(*layers: int) -> tuple[float, float]:
        """Nats per token, with the standard error of a ratio of sums over sequences."""
        differences = measured.sums[Branch(layers)] - whole
        mean = differences.sum() / tokens
        return mean, np.sqrt(16 / 15 * np.square(differences - mean * measured.weights).sum()) / tokens

    def loss(*layers: int) -> str:
        return f"{measured.sums[Branch(layers)].sum() / tokens:.6g} ± {lost(*layers)[1]:.3g}"

    layers = range(plan.source.num_layers)
    states = {layer: "kept" if layer in plan.kept_layers else "dropped" for layer in layers}
    gone = [layer for layer in layers if states[layer] == "dropped"]
    influence = scores.block_influence
    return {
        "Block Influence by layer": [
            f"layer {layer} {states[layer]}: Block Influence {influence[layer]:.6g}" for layer in layers
        ],
        "Loss without one layer": [f"without layer {layer} ({states[layer]}): {loss(layer)}" for layer in layers],
        "Block Influence and loss": [
            f"layer {layer} ({states[layer]}): Block Influence {influence[layer]:.6g}, {cost:.6g} ± {error:.3g}"
            for layer in layers
            for cost, error in [lost(layer)]
        ],
        "Loss as layers go": [
            f"without 0 layers, no layer the last: {whole.sum() / tokens:.6g}",
            *(f"without {n} layers, {gone[n - 1]} the last: {loss(*gone[:n])}" for n in range(1, len(gone) + 1)),
        ],
    }


def binned(ranked: np.ndarray, kept: Mapping[int, int], size: int) -> list[str]:
    """Of a map of `ranked` [layers, n] whose bins have `size` entries; so many of a layer stay as `kept` says."""
    return [
        f"layer {layer}, ranks {start + 1} to {start + size}, {'kept' if start < kept.get(layer, 0) else 'dropped'}: "
        f"{values[start : start + size].mean():.4g} of the mean"
        for layer, values in enumerate(ranked)
        for start in range(0, len(values), size)
    ]


def head_shares(scores: Scores) -> np.ndarray:
    """2407.14679 section 2.2 by hand: the mean over tokens, then the L2 norm over sequences; over the layer's mean."""
    heads = np.sqrt(scores.heads[1, 0])
    return heads / heads.mean(axis=1, keepdims=True)


def of_width(run: Path) -> Figures:
    plan, scores = Plan.load(run / "pruned" / "plan.json"), Scores.load(run / "scores.npz")
    norms = (
        scores.hidden[0, 0] / 16
    )  # of hidden channels the mean over tokens and over sequences, which the recipe asks for
    channels = norms.sum(axis=0)
    order = np.argsort(-channels)
    by_layer = norms.reshape(12, 2, 96).sum(axis=1)[:, order]
    neurons = np.sqrt(scores.ffn[1, 1] / scores.tokens) * scores.ffn_column_norms
    ranked = -np.sort(-neurons, axis=1) / neurons.mean(axis=1, keepdims=True)
    heads = head_shares(scores)
    kept = {(layer, head) for layer, entries in zip(plan.kept_layers, plan.kept_heads, strict=True) for head in entries}
    return {
        "Hidden channels by rank": [
            f"channel {entry}, rank {rank + 1}, {'kept' if entry in plan.kept_hidden else 'dropped'}: "
            f"{channels[entry] / channels.mean():.4g} of the mean"
            for rank, entry in enumerate(order)
        ],
        "Hidden channels by layer": binned(
            by_layer / by_layer.mean(axis=1, keepdims=True), dict.fromkeys(range(12), 72), 3
        ),
        "FFN neurons by rank": [
            f"layer {layer}, rank 160 of 256, the last kept: {ranked[layer, 159]:.4g} of the mean"
            for layer in plan.kept_layers
        ],
        "FFN neurons by layer": binned(ranked, dict.fromkeys(plan.kept_layers, 160), 8),
        "Attention heads by layer": [
            f"layer {layer}, head {head}, {'kept' if (layer, head) in kept else 'dropped'}: "
            f"{heads[layer, head]:.4g} of the mean"
            for layer in range(12)
            for head in range(8)
        ],
    }


def of_candidates(run: Path) -> Figures:
    marks = [
        f"{each['name']}: {each['parameters']:,} parameters, loss {each['loss']} ± {each['loss_se']} after "
        f"{each['steps']} updates, {each['latency_seconds']} s, "
        f"{'on the Pareto front' if each['pareto'] else 'not on it'}"
        for each in candidates()
    ]
    return {"Candidates: size and loss": marks, "Candidates: speed and loss": marks}


# Where the charts are: section, and heading within it.
EVERYWHERE = {
    ("result", ""): of_result,
    ("behaviour", ""): of_behaviour,
    ("training", "Distillation"): of_distillation,
    ("training", "Against the baseline"): of_both,
    ("training", "Teacher correction"): of_correction,
    ("importance", "Depth"): of_depth,
    ("importance", "Width"): of_width,
    ("candidates", ""): of_candidates,
}


@pytest.mark.parametrize("place", EVERYWHERE, ids=" ".join)
def test_every_mark_says_what_the_files_say(run: Path, baseline: Path, page: str, place: tuple[str, str]) -> None:
    figures = EVERYWHERE[place]
    found, wanted = charts(page, *place), figures(run, baseline) if figures is of_both else figures(run)
    assert list(found) == list(wanted)
    for title in wanted:
        assert found[title] == wanted[title], title


def test_there_are_no_other_charts(page: str) -> None:
    assert page.count("<svg") == sum(len(charts(page, *place)) for place in EVERYWHERE)


def test_shades_are_logarithmic_from_an_eighth_of_the_mean_to_eight_times(run: Path, page: str) -> None:
    heads = head_shares(Scores.load(run / "scores.npz")).ravel()
    marks = drawn(page, "importance", "Width")["Attention heads by layer"]
    wanted = 0.05 + 0.95 * np.clip((np.log2(heads) + 3) / 6, 0, 1)
    assert [float(how["fill-opacity"]) for _, how in marks] == pytest.approx(wanted, abs=0.0051)
    assert all(f", {how['fill'].removeprefix('var(--').removesuffix(')')}: " in said for said, how in marks)


def test_many_reports_are_averaged(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", "training", updates=1000)
    page = html(write_report(run))
    said = charts(page, "training", "Distillation")["Throughput"]
    values = [each["speed/tokens_per_second"] for each in records(run, "distilled") if "train/loss" in each]
    assert [float(each.rpartition(" ")[2]) for each in said] == pytest.approx(
        [np.mean(values[start : start + 9]) for start in range(0, 1000, 9)], rel=1e-5
    )
    assert "Every point is the mean of several reports." in page


def test_positions_lie_on_a_logarithmic_axis(page: str) -> None:
    """Buckets that double are as far from each other everywhere, but for the first, which have one token."""
    found = lines(page, "behaviour", "Divergence by position")
    assert len(found) == 3
    for line in found:
        steps = np.diff([x for x, _ in line])
        assert steps[4:] == pytest.approx(steps[-1], rel=0.1)


def test_a_rotated_stream_has_no_channels_that_stay(tmp_path: Path) -> None:
    page = html(write_report(part_of_a_run(tmp_path / "run", "scores.npz", "pruned", prune=ROTATE)))
    words = f"Rotated: 72 combinations of 96 channels, which keep {KEEPS:.1%} of the squares behind the norms."
    assert words in sentences(page, "shape")[0]
    # Queries, keys and values, and gates, of 9 layers, and the output; the embedding's matrix is the rotation.
    assert "19 weight matrices fitted by least squares." in sentences(page, "shape")[0]
    assert words in page.partition("Hidden channels by rank</strong>")[2]
    marks = drawn(page, "importance", "Width")
    for title in ("Hidden channels by rank", "Hidden channels by layer"):
        assert not any("kept" in said or "dropped" in said for said, _ in marks[title])
        assert {how["fill"] for _, how in marks[title]} == {"var(--series-3)"}
    assert "of the score" not in page.partition("Hidden channels by rank</strong>")[2].partition("</figcaption>")[0]


def test_experts_are_shown_with_their_neurons(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", "scores.npz", "pruned", teacher=MIXTURE, prune=PRUNE_MIXTURE)
    plan, scores = Plan.load(run / "pruned" / "plan.json"), Scores.load(run / "scores.npz")
    page = html(write_report(run))
    sizes = rows(page, "shape")
    assert sizes["experts of a layer"] == ["6", "4", "66.7%"] and sizes["experts that see a token"][:2] == ["2", "2"]
    assert sizes["FFN size of an expert"] == ["64", "40", "62.5%"]
    assert sizes["FFN size of the shared expert"] == ["80", "48", "60.0%"] and "FFN size" not in sizes
    found = charts(page, "importance", "Width")
    experts = scores.experts / scores.experts.mean(axis=1, keepdims=True)
    stay = dict(zip(plan.kept_layers, plan.kept_experts, strict=True))
    assert found["Experts by layer"] == [
        f"layer {layer}, expert {expert}, {'kept' if expert in stay.get(layer, ()) else 'dropped'}: "
        f"{experts[layer, expert]:.4g} of the mean"
        for layer in range(6)
        for expert in range(6)
    ]
    neurons = np.sqrt(scores.ffn[1, 1] / scores.tokens) * scores.ffn_column_norms
    of_experts = -np.sort(-neurons, axis=2) / neurons.mean(axis=2, keepdims=True)
    ranked = np.stack([of_experts[layer, list(stay.get(layer, range(6)))].mean(axis=0) for layer in range(6)])
    assert found["Neurons of experts by layer"] == binned(ranked, dict.fromkeys(plan.kept_layers, 40), 2)
    assert found["Neurons of experts by rank"] == [
        f"layer {layer}, rank 40 of 64, the last kept: {ranked[layer, 39]:.4g} of the mean"
        for layer in plan.kept_layers
    ]
    shared = np.sqrt(scores.shared_expert[1, 1] / scores.tokens) * scores.shared_expert_column_norms
    ranked = -np.sort(-shared, axis=1) / shared.mean(axis=1, keepdims=True)
    assert found["Neurons of the shared expert by rank"] == [
        f"layer {layer}, rank 48 of 80, the last kept: {ranked[layer, 47]:.4g} of the mean"
        for layer in plan.kept_layers
    ]
    kept = [
        values[list(row)].sum()
        for values, row in zip(shared[list(plan.kept_layers)], plan.kept_shared_ffn, strict=True)
    ]
    share = sum(kept) / shared[list(plan.kept_layers)].sum()
    assert f"48 of 80 stay and hold {share:.1%} of the score." in page


def test_candidates_of_earlier_rungs_are_hollow_and_the_line_is_the_front_of_its_plane(
    page: str, tmp_path: Path
) -> None:
    for title, marks in drawn(page, "candidates").items():
        assert ["stroke" not in how for _, how in marks] == [each["steps"] == 300 for each in candidates()], title
    # Of a, c and d, all trained for 300 updates, d is better than c in speed and loss, and needs more parameters.
    for title, joined in (("Candidates: size and loss", "acd"), ("Candidates: speed and loss", "ad")):
        [line] = lines(page, "candidates", title)
        places = {said[0]: how["transform"] for said, how in drawn(page, "candidates")[title]}
        wanted = [[float(part) for part in places[name][10:-1].split(",")] for name in joined]
        assert np.array(line) == pytest.approx(np.array(wanted), abs=0.01)
    words = "Held-out loss after 300 updates, ± one standard error over documents where it is known. Hollow: stopped"
    assert words in page
    run = part_of_a_run(tmp_path / "run", "search")
    cut = [each | {"steps": 0} for each in candidates()]
    write_json(run / "search" / "table.json", {"schema_version": 1, "candidates": cut})
    page = html(write_report(run))
    assert "Held-out loss as cut, before any training," in page and "Hollow" not in page
    assert not any("stroke" in how for _, how in drawn(page, "candidates")["Candidates: size and loss"])
