"""The Qwen2 family: as Llama, with a bias on queries, keys and values. Covers Qwen2 and Qwen2.5, dense."""

from __future__ import annotations

from minitron_nemo.arch import blocks
from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.blocks import FINAL_NORM, HF_LAYER, INPUT_NORM, PRE_MLP_NORM
from minitron_nemo.arch.family import Family, HuggingFaceModel
from minitron_nemo.arch.tensors import TensorSpec


def table(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """All tensors in the order of the forward pass."""
    return (
        blocks.embedding(),
        *blocks.norm(INPUT_NORM, HF_LAYER + "input_layernorm"),
        *blocks.qkv("weight", "bias"),
        blocks.attention_output(),
        *blocks.norm(PRE_MLP_NORM, HF_LAYER + "post_attention_layernorm"),
        blocks.gate_and_up(),
        blocks.mlp_output(),
        *blocks.norm(FINAL_NORM, "model.norm"),
        *blocks.output(architecture),
    )


FAMILY = Family(
    table,
    {
        "qwen2": HuggingFaceModel(
            "Qwen2ForCausalLM",
            {"layernorm_epsilon": ("rms_norm_eps", 1e-6)},
            {"hidden_act": "silu", "use_sliding_window": False},
        )
    },
    add_qkv_bias=True,
)
