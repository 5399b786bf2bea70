"""The Nemotron family: LayerNorm with its gain stored minus one, squared ReLU without a gate, partial rotary positions.

Covers Nemotron-4 and the Minitron models made of it.
"""

from __future__ import annotations

from minitron_nemo.arch import blocks
from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.blocks import FFN, FINAL_NORM, HF_LAYER, INPUT_NORM, PRE_MLP_NORM
from minitron_nemo.arch.family import Family, HuggingFaceModel
from minitron_nemo.arch.tensors import TensorSpec


def table(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """All tensors in the order of the forward pass."""
    return (
        blocks.embedding(),
        *blocks.norm(INPUT_NORM, HF_LAYER + "input_layernorm", bias=True),
        *blocks.qkv("weight"),
        blocks.attention_output(),
        *blocks.norm(PRE_MLP_NORM, HF_LAYER + "post_attention_layernorm", bias=True),
        blocks.mlp_input(FFN, blocks.whole(HF_LAYER + "mlp.up_proj.weight", FFN)),
        blocks.mlp_output(),
        *blocks.norm(FINAL_NORM, "model.norm", bias=True),
        *blocks.output(architecture),
    )


FAMILY = Family(
    table,
    {
        "nemotron": HuggingFaceModel(
            "NemotronForCausalLM",
            {"layernorm_epsilon": ("norm_eps", 1e-5), "rotary_percent": ("partial_rotary_factor", 0.5)},
            {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
        )
    },
    normalization="LayerNorm",
    layernorm_zero_centered_gamma=True,
    activation="squared_relu",
    gated_linear_unit=False,
)
