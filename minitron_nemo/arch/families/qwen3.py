"""The Qwen3 family: as Llama, with norms of every head's query and key. Covers dense Qwen3."""

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
        *blocks.qkv("weight"),
        *blocks.qk_norms(),
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
        "qwen3": HuggingFaceModel(
            "Qwen3ForCausalLM",
            # Unlike elsewhere, an absent head_dim does not follow from the hidden size.
            {"layernorm_epsilon": ("rms_norm_eps", 1e-6), "kv_channels": ("head_dim", 128)},
            {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        )
    },
    qk_layernorm=True,
)
