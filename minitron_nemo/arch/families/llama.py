"""The Llama family: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases.

Covers Llama 2 and 3, SmolLM2, Mistral and Mistral-NeMo.
"""

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
        blocks.attention_output(),
        *blocks.norm(PRE_MLP_NORM, HF_LAYER + "post_attention_layernorm"),
        blocks.gate_and_up(),
        blocks.mlp_output(),
        *blocks.norm(FINAL_NORM, "model.norm"),
        *blocks.output(architecture),
    )


EPSILON = {"layernorm_epsilon": ("rms_norm_eps", 1e-6)}

FAMILY = Family(
    table,
    {
        "llama": HuggingFaceModel(
            "LlamaForCausalLM",
            EPSILON,
            {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
            whole_heads=True,
        ),
        "mistral": HuggingFaceModel(
            "MistralForCausalLM", EPSILON | {"window_size": ("sliding_window", 4096)}, {"hidden_act": "silu"}
        ),
    },
)
