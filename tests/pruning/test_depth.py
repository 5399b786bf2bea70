"""Choosing layers by what their absence costs: against Hugging Face's models without them, and brute force."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import CalibrationConfig, DepthConfig, PruneConfig, Recipe
from minitron_nemo.evaluation.evaluate import evaluate
from minitron_nemo.models.branches import Branch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import measure
from minitron_nemo.pruning.depth import choose, grouped, wanted
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.score_depth import measure_branches
from tests.importance.measuring import dealt_out, loaded
from tests.models.support import LAYOUTS, TinyModel
from tests.pool import run_distributed
from tests.pruning.layers_left_out import (
    Samples,
    hugging_face_sums,
    likeliest_labels,
    plant,
    random_samples,
    weights_of,
)
from tests.tiny import write_tiny_llama

LAYERS = 5
TP2_PP2_VPP2 = Layout(2, 2, 2, sequence_parallel=True)
BRANCHES = [
    Branch(),
    *(Branch({layer}) for layer in range(LAYERS)),
    *(Branch({start, start + 1, start + 2}) for start in range(LAYERS - 2)),
    Branch({0, 3}),
    Branch(range(LAYERS)),
]


def a_recipe(micro_batch_size: int = 1, states_bytes: int = 2**31) -> Recipe:
    calibration = CalibrationConfig(micro_batch_size=micro_batch_size)
    return Recipe(
        name="depth", prune=PruneConfig(calibration=calibration, depth=DepthConfig(states_bytes=states_bytes))
    )


def empty(directory: Path, samples: Samples) -> DepthScores:
    return DepthScores(Architecture.load(directory), {}, weights_of(samples))


def sums(directory: Path, layout: Layout, samples: Samples, branches: Sequence[Branch], **recipe: int) -> dict:
    """What `measure_branches` finds on this rank."""
    scores = empty(directory, samples)
    measure_branches(loaded(directory, layout), samples, branches, scores, a_recipe(**recipe), lambda: None)
    return scores.sums


def decided(directory: Path, layout: Layout, samples: Samples, method: str, drop: int) -> tuple[Branch, float]:
    """Measured and chosen as the step does it."""
    model, scores = loaded(directory, layout), empty(directory, samples)
    while branches := wanted(scores, method, drop, normalize=False):
        measure_branches(model, samples, branches, scores, a_recipe(), lambda: None)
    return choose(scores, method, drop, normalize=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("depth"), num_layers=LAYERS)


@pytest.fixture(scope="module")
def expected(model: TinyModel) -> dict[Branch, np.ndarray]:
    return {branch: hugging_face_sums(model.huggingface, branch, random_samples()) for branch in BRANCHES}


@pytest.mark.parametrize(
    "world_size, layout",
    [
        *(LAYOUTS[name] for name in ("tp1", "tp2-sp", "pp2", "pp2-vpp2", "pp3-uneven")),
        (2, Layout()),
        (4, LAYOUTS["pp2"][1]),
        pytest.param(4, TP2_PP2_VPP2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.fast_cases(1)
def test_losses_are_those_of_hugging_faces_models_without_the_layers_on_every_layout(
    world_size: int, layout: Layout, model: TinyModel, expected: dict[Branch, np.ndarray]
) -> None:
    for found in run_distributed(world_size, sums, model.megatron, layout, random_samples(), BRANCHES):
        assert list(found) == grouped(BRANCHES, len(BRANCHES), LAYERS)[0]
        for branch in BRANCHES:
            np.testing.assert_allclose(found[branch], expected[branch], rtol=1e-5, atol=1e-6, err_msg=str(branch))


ROW = 24 * 64 * 4  # bytes of the states of one sequence


@pytest.mark.parametrize("micro_batch_size, states_bytes", [(1, 1), (2, 2 * 3 * ROW), (3, 2**31)])
@pytest.mark.fast_cases(1)
def test_losses_depend_neither_on_the_budget_nor_on_the_micro_batch_size(
    micro_batch_size: int, states_bytes: int, model: TinyModel, expected: dict[Branch, np.ndarray]
) -> None:
    sizes = {"micro_batch_size": micro_batch_size, "states_bytes": states_bytes}
    [found] = run_distributed(1, sums, model.megatron, Layout(), random_samples(), BRANCHES, **sizes)
    for branch in BRANCHES:
        np.testing.assert_allclose(found[branch], expected[branch], rtol=1e-5, atol=1e-6, err_msg=str(branch))


@pytest.mark.slow
def test_leaving_out_a_layer_measures_what_the_pruned_checkpoint_does(model: TinyModel, tmp_path: Path) -> None:
    samples = [
        sample | {key: sample[key][:22] for key in ("tokens", "labels", "token_weights")} for sample in random_samples()
    ]
    branches = [Branch(), *(Branch({layer}) for layer in range(LAYERS))]
    [found] = run_distributed(1, sums, model.megatron, Layout(), samples, branches)
    students = {"teacher": model.megatron}
    source = Architecture.load(model.megatron)
    for layer in range(LAYERS):
        kept = tuple(other for other in range(LAYERS) if other != layer)
        plan = Plan(source=source, target=source.resized({Axis.LAYERS: LAYERS - 1}), kept_layers=kept)
        prune(model.megatron, plan, tmp_path / str(layer))
        students[str(layer)] = tmp_path / str(layer)
    [measured] = run_distributed(1, evaluate_fp32, students, samples)
    for branch, (name, losses) in zip(branches, measured.items(), strict=True):
        np.testing.assert_allclose(found[branch], losses, rtol=1e-5, err_msg=name)


def evaluate_fp32(students: dict[str, Path], samples: Samples) -> dict[str, np.ndarray]:
    return {name: one.ce for name, one in evaluate(students, samples, Layout(), dtype=torch.float32).items()}


PLANTED = (3, 4, 5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Samples]:
    """Hugging Face directory, the converted one, and samples whose labels the whole model holds likeliest."""
    directory = tmp_path_factory.mktemp("planted")
    hugging_face = plant(directory / "hf", PLANTED, num_layers=8)
    convert(hugging_face, directory / "megatron", "megatron", progress=False)
    return hugging_face, directory / "megatron", likeliest_labels(hugging_face, random_samples())


@pytest.mark.parametrize("world_size, layout", [LAYOUTS["tp1"], LAYOUTS["pp2"]])
def test_the_search_finds_the_block_whose_absence_costs_nothing(
    world_size: int, layout: Layout, planted: tuple[Path, Path, Samples]
) -> None:
    hugging_face, megatron, samples = planted
    losses = [hugging_face_sums(hugging_face, range(start, start + 3), samples).sum() for start in range(6)]
    assert int(np.argmin(losses)) == PLANTED[0]
    found = run_distributed(world_size, decided, megatron, layout, samples, "best_block", 3)
    assert len(set(found)) == 1, "the same on every rank"
    dropped, gap = found[0]
    assert dropped == set(PLANTED)
    best, second = sorted(losses)[:2]
    assert gap == pytest.approx((second - best) / second, rel=1e-4)


def test_block_influence_takes_the_planted_layers_for_the_most_important(planted: tuple[Path, Path, Samples]) -> None:
    _, megatron, samples = planted
    [influence] = run_distributed(1, block_influence, megatron, samples)
    assert set(np.argsort(influence)[-3:]) == set(PLANTED)


def block_influence(megatron: Path, samples: Samples) -> np.ndarray:
    alike = [sample for sample in samples if len(sample["tokens"]) == 24]
    tokens, weights = (torch.stack([sample[key] for sample in alike]) for key in ("tokens", "token_weights"))
    model = loaded(megatron, Layout())
    batches = dealt_out(tokens, weights)
    scores = measure(model, batches, model_fingerprint="", data_fingerprint="", settings={})
    return scores.block_influence


def test_leaving_one_out_and_greedy_find_the_planted_layers_as_well(planted: tuple[Path, Path, Samples]) -> None:
    for method in ("leave_one_out", "greedy"):
        [(dropped, _)] = run_distributed(1, decided, planted[1], Layout(), planted[2], method, 3)
        assert dropped == set(PLANTED), method


@pytest.mark.slow
def test_greedy_finds_the_best_of_all_pairs_where_the_layers_of_least_loss_are_another(tmp_path: Path) -> None:
    hugging_face = write_tiny_llama(tmp_path / "hf", num_layers=6, seed=22)
    convert(hugging_face, tmp_path / "megatron", "megatron", progress=False)
    samples = likeliest_labels(hugging_face, random_samples())
    losses = {pair: hugging_face_sums(hugging_face, pair, samples).sum() for pair in combinations(range(6), 2)}
    best = set(min(losses, key=losses.__getitem__))
    alone = [hugging_face_sums(hugging_face, {layer}, samples).sum() for layer in range(6)]
    least = set(np.argsort(alone)[:2].tolist())
    block = set(min(((start, start + 1) for start in range(5)), key=losses.__getitem__))
    assert best != least and best != block, "the model was chosen for that"
    for method, expected in (("greedy", best), ("leave_one_out", least), ("best_block", block)):
        [(dropped, _)] = run_distributed(1, decided, tmp_path / "megatron", Layout(), samples, method, 2)
        assert dropped == expected, method
