"""A family is one module: one defined here, and nowhere else, is converted, scored, pruned and run by the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, StableLmConfig

from minitron_nemo.arch import Architecture, blocks
from minitron_nemo.arch.blocks import FINAL_NORM, HF_LAYER, INPUT_NORM, PRE_MLP_NORM
from minitron_nemo.arch.families import FAMILIES
from minitron_nemo.arch.family import Family, HuggingFaceModel
from minitron_nemo.arch.tensors import TensorSpec
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import PruneConfig
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.plan import make_plan
from tests.checkpoint.weights import same_weights
from tests.families import fill
from tests.importance.measuring import measured
from tests.importance.test_collect import assert_equal_hugging_face, batch
from tests.pool import run_distributed
from tests.pruning.slicing import slice_hugging_face
from tests.pruning.test_prune import logits_of
from tests.tiny import write_byte_tokenizer


def table(architecture: Architecture) -> tuple[TensorSpec, ...]:
    return (
        blocks.embedding(),
        *blocks.norm(INPUT_NORM, HF_LAYER + "input_layernorm", bias=True),
        *blocks.qkv("weight", "bias"),
        blocks.attention_output(),
        *blocks.norm(PRE_MLP_NORM, HF_LAYER + "post_attention_layernorm", bias=True),
        blocks.gate_and_up(),
        blocks.mlp_output(),
        *blocks.norm(FINAL_NORM, "model.norm", bias=True),
        *blocks.output(architecture),
    )


# LayerNorm with plain gains, a gate, biased queries, a quarter of the channels rotated: no other family is like this.
STABLELM = Family(
    table,
    {
        "stablelm": HuggingFaceModel(
            "StableLmForCausalLM",
            {"layernorm_epsilon": ("layer_norm_eps", 1e-5), "rotary_percent": ("partial_rotary_factor", 0.25)},
            {"hidden_act": "silu", "use_qkv_bias": True, "qk_layernorm": False, "use_parallel_residual": False},
        )
    },
    normalization="LayerNorm",
    add_qkv_bias=True,
)


@pytest.fixture(autouse=True)
def known_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "stablelm", STABLELM)


def knowing(function: Callable[..., Any], *args: Any) -> Any:
    """On a rank: `function` while the family is known there, too."""
    FAMILIES["stablelm"] = STABLELM
    try:
        return function(*args)
    finally:
        del FAMILIES["stablelm"]


@pytest.mark.slow
def test_a_family_defined_in_one_place_goes_all_the_way(tmp_path: Path) -> None:
    config = StableLmConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        use_qkv_bias=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    fill(model, seed=0, around=1.0)
    model.save_pretrained(tmp_path / "hf")
    write_byte_tokenizer(tmp_path / "hf")

    convert(tmp_path / "hf", tmp_path / "teacher", "megatron", progress=False)
    convert(tmp_path / "teacher", tmp_path / "bridge", "bridge", progress=False)  # which has no name for it
    convert(tmp_path / "bridge", tmp_path / "back", "hf", progress=False)
    assert same_weights(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(UserError, match="NeMo has no classes for stablelm"):
        convert(tmp_path / "teacher", tmp_path / "nemo", "nemo", progress=False)

    sharded = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
    scores = run_distributed(2, knowing, measured, tmp_path / "teacher", sharded, *batch())[0]
    assert_equal_hugging_face(scores, tmp_path / "hf", 2e-5)  # of the variance of variances, from fp32 activations

    # Its heads are always hidden_size / heads wide, so both are halved.
    sizes = PruneConfig(hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, num_layers=3)
    plan = make_plan(scores, scores.architecture, sizes)
    convert(tmp_path / "teacher", tmp_path / "student", "megatron", plan=plan, progress=False)
    sliced = AutoModelForCausalLM.from_pretrained(
        slice_hugging_face(tmp_path / "hf", plan, tmp_path / "sliced"), dtype=torch.float32, attn_implementation="eager"
    )
    tokens, _ = batch()
    with torch.no_grad():
        expected = sliced(tokens).logits.numpy()
    actual = run_distributed(1, knowing, logits_of, tmp_path / "student", tokens)[0]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
