"""The Nemotron family: LayerNorm with its gain stored minus one, squared ReLU without a gate, partial rotary positions.

Covers Nemotron-4 and the Minitron models made of it.
"""

from __future__ import annotations

from minitron_nemo.arch import blocks
from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.blocks import FFN, FINAL_NORM, HF_LAYER, INPUT_NORM, PRE_MLP_NORM
from minitron_nemo.arch.family import BridgeModel, Family, HuggingFaceModel, NeMoModel, nemo_sizes
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


# Presets of NeMo's classes are those of the 4B model where they say nothing else.
_4B = nemo_sizes(32, 3072, 24, 8, 9216, kv_channels=128)
_PLAIN = {"kv_channels": None}

NEMO = NeMoModel(
    "nemo.collections.llm.gpt.model.nemotron",
    "NemotronModel",
    {
        "NemotronConfig": (None, {**_4B, "seq_length": 4096, "rotary_percent": 0.5}),
        "Nemotron3Config4B": ("NemotronConfig", {}),
        "Nemotron3Config8B": ("NemotronConfig", nemo_sizes(32, 4096, 32, None, 16384, **_PLAIN)),
        "Nemotron3Config22B": ("NemotronConfig", nemo_sizes(40, 6144, 48, None, 24576, **_PLAIN)),
        "Nemotron4Config15B": ("NemotronConfig", nemo_sizes(32, 6144, 48, 8, 24576, **_PLAIN)),
        "Nemotron4Config340B": ("NemotronConfig", nemo_sizes(96, 18432, 96, 8, 73728, **_PLAIN)),
    },
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
    nemo={"nemotron": NEMO},
    bridge={"nemotron": BridgeModel(("megatron.bridge.models.nemotron.",))},
)
