"""The Qwen3-MoE family: as Qwen3, with experts in the place of every MLP. Covers Qwen3-30B-A3B and Qwen3-235B-A22B.

The router's weights of a token are those of a softmax over all experts, which `norm_topk_prob` makes sum to 1 over the
experts that see the token: the softmax over these alone. Models with layers that have an MLP are refused.
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
        *blocks.qkv("weight"),
        *blocks.qk_norms(),
        blocks.attention_output(),
        *blocks.norm(PRE_EXPERTS_NORM, HF_LAYER + "post_attention_layernorm"),
        *blocks.experts(MLP + "gate.weight", *projections),
        *blocks.norm(FINAL_NORM, "model.norm"),
        *blocks.output(architecture),
    )


FAMILY = Family(
    table,
    {
        "qwen3_moe": HuggingFaceModel(
            "Qwen3MoeForCausalLM",
            {
                "layernorm_epsilon": ("rms_norm_eps", 1e-6),
                "num_moe_experts": ("num_experts", 128),
                # Hugging Face's intermediate_size is of layers with an MLP, of which there are none.
                "ffn_hidden_size": ("moe_intermediate_size", 768),
                "moe_ffn_hidden_size": ("moe_intermediate_size", 768),
                "moe_router_topk": ("num_experts_per_tok", 8),
            },
            {
                "hidden_act": "silu",
                "attention_bias": False,
                "use_sliding_window": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
            opposites={"moe_router_pre_softmax": ("norm_topk_prob", False)},
        )
    },
    qk_layernorm=True,
    mixture_of_experts=True,
)
