"""The Mixtral family: as Mistral, with experts in the place of the MLP and a router's softmax over those of a token."""

from __future__ import annotations

from minitron_nemo.arch import blocks
from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.blocks import FINAL_NORM, HF_LAYER, INPUT_NORM, PRE_EXPERTS_NORM
from minitron_nemo.arch.family import Family, HuggingFaceModel
from minitron_nemo.arch.tensors import TensorSpec

MOE = HF_LAYER + "block_sparse_moe."


def table(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """All tensors in the order of the forward pass."""
    return (
        blocks.embedding(),
        *blocks.norm(INPUT_NORM, HF_LAYER + "input_layernorm"),
        *blocks.qkv("weight"),
        blocks.attention_output(),
        *blocks.norm(PRE_EXPERTS_NORM, HF_LAYER + "post_attention_layernorm"),
        *blocks.experts(MOE + "gate.weight", *(MOE + f"experts.{{expert}}.w{n}.weight" for n in (1, 3, 2))),
        *blocks.norm(FINAL_NORM, "model.norm"),
        *blocks.output(architecture),
    )


FAMILY = Family(
    table,
    {
        "mixtral": HuggingFaceModel(
            "MixtralForCausalLM",
            {
                "layernorm_epsilon": ("rms_norm_eps", 1e-5),
                "rotary_base": ("rope_theta", 1e6),
                "window_size": ("sliding_window", None),
                "num_moe_experts": ("num_local_experts", 8),
                "moe_ffn_hidden_size": ("intermediate_size", 14336),
                "moe_router_topk": ("num_experts_per_tok", 2),
            },
            {"hidden_act": "silu"},
        )
    },
    mixture_of_experts=True,
)
