"""The Phi-3 family: as Llama; Hugging Face keeps queries, keys and values in one tensor, and gate and up in another.

Covers Phi-3 with 4k of context and Phi-4 (14B). The longer contexts are scaled by long and short factors ("su",
"longrope"), which are refused.
"""

from __future__ import annotations

from minitron_nemo.arch import blocks
from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.blocks import FINAL_NORM, GATE_AND_UP, HF_LAYER, INPUT_NORM, LAYER, PRE_MLP_NORM
from minitron_nemo.arch.family import Family, HuggingFaceModel, NeMoModel, nemo_sizes
from minitron_nemo.arch.tensors import Piece, TensorSpec


def table(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """All tensors in the order of the forward pass."""
    return (
        blocks.embedding(),
        *blocks.norm(INPUT_NORM, HF_LAYER + "input_layernorm"),
        TensorSpec(LAYER + "self_attention.linear_qkv.weight", (blocks.QKV, blocks.HIDDEN), 0, _fused_qkv, "attention"),
        blocks.attention_output(),
        *blocks.norm(PRE_MLP_NORM, HF_LAYER + "post_attention_layernorm"),
        blocks.mlp_input(GATE_AND_UP, blocks.whole(HF_LAYER + "mlp.gate_up_proj.weight", GATE_AND_UP)),
        blocks.mlp_output(),
        *blocks.norm(FINAL_NORM, "model.norm"),
        *blocks.output(architecture),
    )


def _fused_qkv(architecture: Architecture) -> list[Piece]:
    """`qkv_proj` holds all queries, then all keys, then all values."""
    name = HF_LAYER + "self_attn.qkv_proj.weight"
    queries = architecture.num_attention_heads * architecture.kv_channels
    keys = architecture.num_query_groups * architecture.kv_channels
    return blocks.by_group(architecture, [(name, 0), (name, queries), (name, queries + keys)])


NEMO = NeMoModel(
    "nemo.collections.llm.gpt.model.phi3mini",
    "Phi3Model",
    {
        "Phi3Config": (None, {"seq_length": 4096}),
        "Phi3ConfigMini": ("Phi3Config", nemo_sizes(32, 3072, 32, 32, 8192, rotary_base=10000.0, vocab_size=32064)),
    },
)

FAMILY = Family(
    table,
    {
        "phi3": HuggingFaceModel(
            "Phi3ForCausalLM",
            {
                "layernorm_epsilon": ("rms_norm_eps", 1e-5),
                "rotary_percent": ("partial_rotary_factor", 1.0),
                "window_size": ("sliding_window", None),
            },
            {"hidden_act": "silu"},
        )
    },
    nemo={"phi3": NEMO},
)
