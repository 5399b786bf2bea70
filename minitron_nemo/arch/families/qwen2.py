"""The Qwen2 family: as Llama, with a bias on queries, keys and values. Covers Qwen2 and Qwen2.5, dense."""

from __future__ import annotations

from minitron_nemo.arch import blocks
from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.blocks import FINAL_NORM, HF_LAYER, INPUT_NORM, PRE_MLP_NORM
from minitron_nemo.arch.family import BridgeModel, Family, HuggingFaceModel, NeMoModel, nemo_sizes
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


_LONG = {"seq_length": 131072}

NEMO = NeMoModel(
    "nemo.collections.llm.gpt.model.qwen2",
    "Qwen2Model",
    {
        "Qwen2Config": (
            None,
            {"seq_length": 4096, "vocab_size": 151936, "layernorm_epsilon": 1e-6, "rotary_base": 1_000_000.0},
        ),
        "Qwen2Config500M": ("Qwen2Config", nemo_sizes(24, 896, 14, 2, 4864)),
        "Qwen25Config500M": ("Qwen2Config500M", {"seq_length": 32768}),
        "Qwen2Config1P5B": ("Qwen2Config", nemo_sizes(28, 1536, 12, 2, 8960)),
        "Qwen25Config1P5B": ("Qwen2Config1P5B", _LONG),
        "Qwen25Config3B": (
            "Qwen2Config",
            nemo_sizes(36, 2048, 16, 2, 11008, share_embeddings_and_output_weights=True),
        ),
        "Qwen2Config7B": ("Qwen2Config", nemo_sizes(28, 3584, 28, 4, 18944, vocab_size=152064)),
        "Qwen25Config7B": ("Qwen2Config7B", _LONG),
        "Qwen25Config14B": (
            "Qwen2Config",
            nemo_sizes(48, 5120, 40, 8, 13824, vocab_size=152064, layernorm_epsilon=1e-5, **_LONG),
        ),
        "Qwen25Config32B": (
            "Qwen2Config",
            nemo_sizes(64, 5120, 40, 8, 27648, vocab_size=152064, layernorm_epsilon=1e-5, **_LONG),
        ),
        "Qwen2Config72B": (
            "Qwen2Config",
            nemo_sizes(80, 8192, 64, 8, 29568, vocab_size=152064, layernorm_epsilon=1e-5),
        ),
        "Qwen25Config72B": ("Qwen2Config72B", _LONG),
    },
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
    nemo={"qwen2": NEMO},
    bridge={"qwen2": BridgeModel(tuple(f"megatron.bridge.models.qwen.qwen_provider.Qwen{n}Model" for n in (2, 25)))},
)
