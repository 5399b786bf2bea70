"""The student: its logits against Hugging Face's on weights sliced in the test, and what planted parts become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import PruneConfig, RepairConfig
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import Scores
from minitron_nemo.models.build import build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.prune import prune
from tests.families import FAMILIES, MIXTURES, write_tiny
from tests.importance.measuring import measured
from tests.importance.test_collect import batch
from tests.pool import run_distributed
from tests.pruning.slicing import slice_hugging_face
from tests.tiny import write_tiny_llama

TARGETS: dict[str, dict[str, Any]] = {
    "all axes": {"hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": 4, "drop_layers": [1, 4]},
    "width": {"hidden_size": 48, "ffn_hidden_size": 72},
    "depth": {"num_layers": 3},
    "depth, a block": {"num_layers": 3, "depth_method": "contiguous"},
    "heads": {"num_attention_heads": 4},
    "heads, merged": {"num_attention_heads": 4, "repair": RepairConfig(merge_heads=True)},
    "query groups": {"num_query_groups": 3, "hidden_size": 48},
    "groups and heads": {"num_query_groups": 2, "num_attention_heads": 2, "repair": RepairConfig(merge_heads=True)},
}


def logits_of(directory: Path, tokens: torch.Tensor) -> np.ndarray:
    """Logits [b, s, vocab] of a Megatron checkpoint, in one process."""
    launch.initialize(Layout(), seed=1)
    architecture = Architecture.load(directory)
    model = build_model(architecture, Layout(), dtype=torch.float32)
    load_model(model, directory)
    assert parallel_state.is_pipeline_last_stage()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batches = [{"tokens": tokens, "position_ids": positions}]
    (logits,) = forward_only(model, batches, 1, tokens.shape[1], len(tokens), lambda output, _: output)
    return logits[..., : architecture.vocab_size].numpy()


def prune_together(teacher: Path, plan: Plan, student: Path) -> None:
    prune(teacher, plan, student, launch.rank(), launch.world_size(), launch.gather)


def scores_of(hugging_face: Path, teacher: Path) -> Scores:
    convert(hugging_face, teacher, "megatron", progress=False)
    return run_distributed(1, measured, teacher, Layout(), *batch())[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.fast_cases(1)
def test_student_has_the_logits_of_hugging_faces_model_sliced_by_the_plan(
    target: str, tied: bool, tmp_path: Path
) -> None:
    assert_student_is_hugging_faces_slice("llama", TARGETS[target], tied, tmp_path)


@pytest.mark.parametrize("target", ["all axes", "groups and heads"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.fast_cases(1)
def test_students_of_every_family_have_the_logits_of_hugging_faces_model_sliced_by_the_plan(
    family: str, target: str, tmp_path: Path
) -> None:
    assert_student_is_hugging_faces_slice(family, TARGETS[target], family in ("qwen3", "phi3"), tmp_path)


def assert_student_is_hugging_faces_slice(family: str, target: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    hugging_face = write_tiny(family, tmp_path / "hf", num_layers=6, tied=tied)
    scores = scores_of(hugging_face, tmp_path / "teacher")
    if family in MIXTURES:
        target = target | {"num_moe_experts": 3}
        if "ffn_hidden_size" in target:
            target["moe_ffn_hidden_size"] = target.pop("ffn_hidden_size")
    if family == "qwen2_moe":
        target["moe_shared_expert_intermediate_size"] = 48
    plan = make_plan(scores, scores.architecture, PruneConfig(**target))
    run_distributed(2, prune_together, tmp_path / "teacher", plan, tmp_path / "student")
    sliced = AutoModelForCausalLM.from_pretrained(
        slice_hugging_face(hugging_face, plan, tmp_path / "sliced"), dtype=torch.float32, attn_implementation="eager"
    )
    tokens, _ = batch()
    with torch.no_grad():
        expected = sliced(tokens).logits.numpy()
    actual = run_distributed(1, logits_of, tmp_path / "student", tokens)[0]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert Plan.load(tmp_path / "student" / "plan.json") == plan


def test_what_was_planted_as_useless_scores_lowest_and_is_pruned(tmp_path: Path) -> None:
    """A channel with gains of 0, a neuron with a gate of 0, a head that looks everywhere alike, an identity layer."""
    hugging_face = write_tiny_llama(tmp_path / "hf", num_layers=6)
    file = hugging_face / "model.safetensors"
    weights = load_file(file)
    channel, neuron, head, layer = 17, 31, 5, 3
    for number in range(6):
        prefix = f"model.layers.{number}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"][channel] = 0
        weights[f"{prefix}mlp.gate_proj.weight"][neuron] = 0
        queries = weights[f"{prefix}self_attn.q_proj.weight"]
        queries *= 20  # the others look at few tokens, so that they average little away
        queries[head * 8 : head * 8 + 8] = 0
    weights[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()
    weights[f"model.layers.{layer}.mlp.down_proj.weight"].zero_()
    save_file(weights, file, metadata={"format": "pt"})
    scores = scores_of(hugging_face, tmp_path / "teacher")
    assert scores.get(Axis.HIDDEN)[channel] == 0
    assert (scores.get(Axis.FFN)[:, neuron] == 0).all()
    assert (scores.get(Axis.HEADS)[:, 4:6].argmin(axis=1) == head - 4).all()  # its query group has heads 4 and 5
    assert scores.block_influence[layer] < 1e-6 < np.delete(scores.block_influence, layer).min()
    config = PruneConfig(hidden_size=63, ffn_hidden_size=95, num_attention_heads=4, num_layers=5)
    plan = make_plan(scores, scores.architecture, config)
    assert plan.kept_hidden and plan.kept_ffn and plan.kept_heads
    assert set(range(64)) - set(plan.kept_hidden) == {channel}
    assert all(set(range(96)) - set(kept) == {neuron} for kept in plan.kept_ffn)
    assert all(head not in kept and head - 1 in kept for kept in plan.kept_heads)
    assert plan.kept_layers == (0, 1, 2, 4, 5)


def test_removing_dead_neurons_and_layers_changes_no_logits(tmp_path: Path) -> None:
    hugging_face = write_tiny_llama(tmp_path / "hf", num_layers=4)
    file = hugging_face / "model.safetensors"
    weights = load_file(file)
    for number in range(4):
        weights[f"model.layers.{number}.mlp.gate_proj.weight"][10 * number : 10 * number + 32] = 0
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.2.{name}.weight"].zero_()
    save_file(weights, file, metadata={"format": "pt"})
    scores = scores_of(hugging_face, tmp_path / "teacher")
    plan = make_plan(scores, scores.architecture, PruneConfig(ffn_hidden_size=64, num_layers=3))
    run_distributed(1, prune_together, tmp_path / "teacher", plan, tmp_path / "student")
    tokens, _ = batch()
    before, after = (run_distributed(1, logits_of, tmp_path / name, tokens)[0] for name in ("teacher", "student"))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_plan_for_another_model_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    convert(write_tiny_llama(tmp_path / "hf"), tmp_path / "teacher", "megatron", progress=False)
    other = Architecture.load(tmp_path / "teacher").resized({Axis.FFN: 80})
    with pytest.raises(UserError, match="the plan is for another model: ffn_hidden_size is 96, planned 80"):
        prune(tmp_path / "teacher", Plan.identity(other), tmp_path / "student")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "teacher"]
