"""Scores of experts: the same in every layout, finite where no token is routed, and what pruning makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.arch import Axis
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import PruneConfig
from minitron_nemo.importance.scores import ARRAYS, Scores
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.plan import make_plan
from tests.families import MIXTURES, write_tiny
from tests.importance.hugging_face import reference_scores
from tests.importance.measuring import measured
from tests.importance.mixture import starve
from tests.importance.test_collect import (
    LAYOUTS,
    assert_equal_hugging_face,
    assert_same,
    assert_same_choices,
    axes_of,
    batch,
    cut_mlp,
)
from tests.pool import run_distributed

CUT = PruneConfig(hidden_size=40, num_moe_experts=3, moe_ffn_hidden_size=64, num_attention_heads=4, num_layers=3)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    for family in MIXTURES:
        convert(write_tiny(family, root / family), root / f"{family}-megatron", "megatron", progress=False)
    return {family: root / family for family in MIXTURES}


def scored(hugging_face: Path, name: str, micro_batch_size: int = 1) -> Scores:
    """In one of the layouts; all ranks must have the same."""
    world_size, layout = LAYOUTS.get(name, (1, Layout()))
    teacher = hugging_face.with_name(f"{hugging_face.name}-megatron")
    first, *others = run_distributed(world_size, measured, teacher, layout, *batch(), micro_batch_size)
    for other in others:
        for array in ARRAYS:
            np.testing.assert_array_equal(getattr(first, array), getattr(other, array))
    return first


@pytest.mark.parametrize(
    "layout",
    ["PP2", "DP2", *(pytest.param(name, marks=pytest.mark.soak) for name in ("TP2 SP DP2", "TP2 PP2 VPP2 SP"))],
)
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.fast_cases(1)
def test_scores_and_kept_sets_do_not_depend_on_the_layout(
    hugging_face: dict[str, Path], family: str, layout: str
) -> None:
    """And equal the formulas on one process; with tensor parallelism, see `test_collect`."""
    alone, spread = scored(hugging_face[family], "alone"), scored(hugging_face[family], layout)
    assert_same(spread, alone)
    assert_equal_hugging_face(spread, hugging_face[family])
    assert_same_choices(spread, alone, hidden_size=40, num_layers=3, **cut_mlp(alone.architecture))


def test_several_sequences_in_a_microbatch_score_the_same(hugging_face: dict[str, Path]) -> None:
    assert_same(scored(hugging_face["mixtral"], "alone", 2), scored(hugging_face["mixtral"], "alone"))


@pytest.mark.parametrize("layout", ["alone", "TP2 SP", "DP2"])
@pytest.mark.fast_cases(1)
def test_an_expert_to_which_no_token_is_routed_scores_zero_and_goes_first(tmp_path: Path, layout: str) -> None:
    hugging_face = write_tiny("mixtral", tmp_path / "mixtral")
    file = hugging_face / "model.safetensors"
    weights = load_file(file)
    starve(weights, expert=2)
    save_file(weights, file, metadata={"format": "pt"})
    convert(hugging_face, tmp_path / "mixtral-megatron", "megatron", progress=False)
    scores = scored(hugging_face, layout)
    assert (scores.experts[:, 2] == 0).all()
    assert (np.delete(scores.experts, 2, axis=1) > 0).all()
    for axis in axes_of(scores):
        for over_tokens in ("mean", "l2", "var"):
            assert np.isfinite(scores.get(axis, over_tokens)).all()
    assert (scores.get(Axis.MOE_FFN)[:, 2] == 0).all()
    np.testing.assert_allclose(scores.experts, reference_scores(hugging_face, *batch())["experts"], rtol=1e-5)
    plan = make_plan(scores, scores.architecture, CUT)
    assert plan.kept_experts == ((0, 1, 3),) * 3
    assert plan.gaps["num_moe_experts/0"] == 1.0


def test_masked_tokens_do_not_count_for_experts(hugging_face: dict[str, Path]) -> None:
    """Nothing is left of an expert whose tokens all have weight 0."""
    tokens, weights = (part[:1] for part in batch())
    teacher = hugging_face["qwen3_moe"].with_name("qwen3_moe-megatron")
    weights = torch.zeros_like(weights)
    weights[0, 7] = 1.0
    scores = run_distributed(1, measured, teacher, Layout(), tokens, weights)[0]
    assert ((scores.experts > 0).sum(axis=1) == 3).all()  # the three experts that the one token is routed to


def test_merged_passes_weigh_experts_by_their_tokens(hugging_face: dict[str, Path]) -> None:
    teacher = hugging_face["mixtral"].with_name("mixtral-megatron")
    tokens, weights = batch()
    passes = []
    for name, part in (("first", slice(0, 2)), ("second", slice(2, None)), ("both", slice(None))):
        scores = run_distributed(1, measured, teacher, Layout(), tokens[part], weights[part])[0]
        passes.append(replace(scores, settings={"samples": len(tokens[part])}, sample_ids=(name,)))
    first, second, both = passes
    merged = Scores.merge([first, second])
    assert_same(merged, both, 1e-6)
    np.testing.assert_allclose(merged.experts, both.experts, rtol=1e-6)
    np.testing.assert_array_equal(merged.routed, both.routed)
    assert (first.routed != second.routed).any()
