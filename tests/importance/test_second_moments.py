"""Second moments against hooks on Hugging Face's model in fp64, at every layout, and the maps against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.errors import UserError
from minitron_nemo.importance.places import Place, places
from minitron_nemo.importance.second_moments import Moments, fit, least_squares
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel.layout import Layout
from tests.importance.hugging_face import activations, load, rms_normed
from tests.importance.measuring import dealt_out, loaded
from tests.importance.test_collect import LAYOUTS, batch
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

LAYERS = 4


def a_plan(source: Architecture) -> Plan:
    """Every axis that can be repaired is cut, irregularly, and a layer goes."""
    generator = np.random.default_rng(3)

    def choose(count: int, total: int) -> tuple[int, ...]:
        return tuple(sorted(generator.permutation(total)[:count].tolist()))

    return Plan(
        source=source,
        target=source.resized({Axis.HIDDEN: 40, Axis.FFN: 56, Axis.LAYERS: LAYERS - 1}),
        kept_layers=(0, 2, 3),
        kept_hidden=choose(40, 64),
        kept_ffn=tuple(choose(56, 96) for _ in range(LAYERS - 1)),
    )


def neurons(plan: Plan, layer: int) -> list[int]:
    assert plan.kept_ffn is not None
    return list(plan.kept_ffn[layer])


def moments(directory: Path, layout: Layout, plan: Plan, fused_norms: bool = False) -> dict[str, np.ndarray]:
    """Totals of the places that this rank gets."""
    model = loaded(directory, layout, fused_norms=fused_norms)
    batches = dealt_out(*batch())
    here = {layer.layer_number - 1 for module in model.modules for layer in module.decoder.layers}
    if model.output_layer is not None:
        here.add(LAYERS)
    wanted = [place for place in places(plan, ffn=True, hidden=True) if place.layer in here]
    collector = Moments(
        model.chunks,
        plan.source,
        batches,
        wanted,
        sequence_parallel=layout.sequence_parallel,
        on_microbatch=lambda: None,
    )
    with collector:
        forward_only(model, batches, len(batches), batches[0]["tokens"].shape[1], 1, lambda output, batch: None)
    return {place.name: totals.numpy() for place, totals in collector.totals()}


def reads(directory: Path, plan: Plan, tokens: torch.Tensor, weights: torch.Tensor) -> dict[str, tuple]:
    """For each tensor of the student that has a map: what its teacher reads, x [t, n], what it will, y [t, k]; fp64.

    Readers of norms only where these are RMSNorms.
    """
    model = load(directory)
    seen = activations(model, tokens)
    mask = weights.numpy() != 0
    found = {}
    for new, old in enumerate(plan.kept_layers):
        x = seen["ffn"][old][mask]
        found[f"decoder.layers.{new}.mlp.linear_fc2.weight"] = x, x[:, neurons(plan, new)]
    epsilon = getattr(model.config, "rms_norm_eps", None)
    if epsilon is None:
        return found
    residuals = {"output_layer": seen["residuals"][-1]}
    for new, old in enumerate(plan.kept_layers):
        residuals[f"decoder.layers.{new}.self_attention.linear_qkv"] = seen["residuals"][2 * old]
        residuals[f"decoder.layers.{new}.mlp.linear_fc1"] = seen["residuals"][2 * old + 1]
    for name, states in residuals.items():
        x = states[mask]
        found[f"{name}.weight"] = rms_normed(x, epsilon), rms_normed(x[:, list(plan.kept_hidden)], epsilon)
    return found


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("hf"), num_layers=LAYERS)


@pytest.fixture(scope="module")
def teacher(hugging_face: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("megatron") / "teacher"
    convert(hugging_face, directory, "megatron", progress=False)
    return directory


@pytest.fixture(scope="module")
def expected(hugging_face: Path, teacher: Path) -> dict[str, np.ndarray]:
    """By name, y^T y on x^T y, or x^T y alone where y are entries of x."""
    totals = {}
    for name, (x, y) in reads(hugging_face, a_plan(Architecture.load(teacher)), *batch()).items():
        totals[name] = x.T @ y if "linear_fc2" in name else np.concatenate([y, x], axis=1).T @ y
    return totals


def assert_same(by_rank: list[dict[str, np.ndarray]], expected: dict[str, np.ndarray]) -> None:
    """Each total once, within 1e-5 of the largest of its entries."""
    assert sorted(name for rank in by_rank for name in rank) == sorted(expected)
    for name, values in ((name, values) for rank in by_rank for name, values in rank.items()):
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
@pytest.mark.fast_cases(2)
def test_moments_of_every_layout_are_those_of_hooks_on_hugging_faces_model(
    name: str, teacher: Path, expected: dict[str, np.ndarray]
) -> None:
    world_size, layout = LAYOUTS.get(name, (1, Layout()))
    plan = a_plan(Architecture.load(teacher))
    assert_same(run_distributed(world_size, moments, teacher, layout, plan), expected)


def test_moments_are_the_same_where_norms_are_fused(teacher: Path, expected: dict[str, np.ndarray]) -> None:
    plan = a_plan(Architecture.load(teacher))
    assert_same(run_distributed(1, moments, teacher, Layout(), plan, fused_norms=True), expected)


def test_a_tied_output_has_no_map() -> None:
    source = Architecture(4, 64, 96, 8, 4, 8, 259, 512, share_embeddings_and_output_weights=True)
    assert all(place.layer < LAYERS for place in places(a_plan(source), ffn=True, hidden=True))


@pytest.mark.parametrize("ridge", [1e-3, 1e-2, 1.0])
def test_maps_solve_the_least_squares_problem_that_is_pulled_to_the_plain_cut(ridge: float) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((200, 12)) @ generator.standard_normal((12, 12))
    kept = np.array([1, 4, 5, 10])
    y = x[:, kept] * generator.uniform(0.5, 2.0, (200, 1))  # another scale for every token, as behind a norm
    fitted = least_squares(torch.from_numpy(x.T @ y), torch.from_numpy(y.T @ y), kept, ridge)
    assert_solves(x, y, kept, ridge, fitted.numpy())


def assert_solves(x: np.ndarray, y: np.ndarray, kept: np.ndarray, ridge: float, fitted: np.ndarray) -> None:
    """`fitted` minimises |x - y M^T|^2 + lam |M - c S|^2, which numpy solves as one system with lam's rows below."""
    scale = (x[:, kept] * y).sum() / (y**2).sum()
    lam = ridge * (y**2).sum() / len(kept)
    plain = np.zeros((x.shape[1], len(kept)))
    plain[kept, np.arange(len(kept))] = scale
    rows = np.concatenate([y, np.sqrt(lam) * np.eye(len(kept))])
    solution = np.linalg.lstsq(rows, np.concatenate([x, np.sqrt(lam) * plain.T]), rcond=None)[0].T
    np.testing.assert_allclose(fitted, solution, rtol=0, atol=1e-4 * np.abs(solution).max())


def test_a_large_ridge_is_the_plain_cut_and_silence_is_too() -> None:
    x = np.random.default_rng(0).standard_normal((50, 6))
    kept = np.array([0, 2, 3])
    y = x[:, kept]
    plain = np.eye(6)[:, kept]
    far = least_squares(torch.from_numpy(x.T @ y), torch.from_numpy(y.T @ y), kept, 1e9)
    np.testing.assert_allclose(far.numpy(), plain, atol=1e-6)
    silent = least_squares(torch.zeros(6, 3).double(), torch.zeros(3, 3).double(), kept, 0.01)
    np.testing.assert_array_equal(silent.numpy(), plain)


def test_activations_that_are_not_finite_are_refused_by_the_name_of_the_tensor() -> None:
    place = Place("decoder.layers.0.mlp.linear_fc2.weight", 0, None, np.array([0, 2]), Axis.FFN)
    with pytest.raises(UserError, match="repair: what decoder.layers.0.mlp.linear_fc2.weight reads is not finite"):
        fit(place, torch.full((3, 2), float("nan"), dtype=torch.float64), 0.01)
