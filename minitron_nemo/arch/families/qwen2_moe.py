"""The Qwen2-MoE family: as Qwen2, with experts in the place of every MLP and one more that is shared by all tokens.

Covers Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B. Without `norm_topk_prob` the router's weights of a token are those of a
softmax over all experts, and sum to less than 1. Models with layers that have an MLP are refused.
"""

from __future__ import annotations

from minitron_nemo.arch import blocks
from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.blocks import FINAL_NORM, HF_LAYER, INPUT_NORM, PRE_EXPERTS_NORM
from minitron_nemo.arch.family import Family, HuggingFaceModel
from minitron_nemo.arch.tensors import TensorSpec

MLP = HF_LAYER + "mlp."


def table(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """All tensors in the order of the forward pass."""
    projections = (MLP + f"experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return (
        blocks.embedding(),
        *blocks.norm(INPUT_NORM, HF_LAYER + "input_layernorm"),
        *blocks.qkv("weight", "bias"),
        blocks.attention_output(),
        *blocks.norm(PRE_EXPERTS_NORM, HF_LAYER + "post_attention_layernorm"),
        *blocks.experts(MLP + "gate.weight", *projections),
        *blocks.shared_expert(),
        *blocks.norm(FINAL_NORM, "model.norm"),
        *blocks.output(architecture),
    )


FAMILY = Family(
    table,
    {
        "qwen2_moe": HuggingFaceModel(
            "Qwen2MoeForCausalLM",
            {
                "layernorm_epsilon": ("rms_norm_eps", 1e-6),
                "num_moe_experts": ("num_experts", 60),
                # Hugging Face's intermediate_size is of layers with an MLP, of which there are none.
                "ffn_hidden_size": ("moe_intermediate_size", 1408),
                "moe_ffn_hidden_size": ("moe_intermediate_size", 1408),
                "moe_router_topk": ("num_experts_per_tok", 4),
                "moe_shared_expert_intermediate_size": ("shared_expert_intermediate_size", 5632),
            },
            {
                "hidden_act": "silu",
                "qkv_bias": True,
                "use_sliding_window": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
            opposites={"moe_router_pre_softmax": ("norm_topk_prob", False)},
        )
    },
    add_qkv_bias=True,
    mixture_of_experts=True,
    moe_shared_expert_gate=True,
)
