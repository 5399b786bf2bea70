"""The Qwen3 family: as Llama, with norms of every head's query and key. Covers dense Qwen3."""

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
        *blocks.qkv("weight"),
        *blocks.qk_norms(),
        blocks.attention_output(),
        *blocks.norm(PRE_MLP_NORM, HF_LAYER + "post_attention_layernorm"),
        blocks.gate_and_up(),
        blocks.mlp_output(),
        *blocks.norm(FINAL_NORM, "model.norm"),
        *blocks.output(architecture),
    )


_TIED = {"share_embeddings_and_output_weights": True}

NEMO = NeMoModel(
    "nemo.collections.llm.gpt.model.qwen3",
    "Qwen3Model",
    {
        "Qwen3Config": (
            None,
            {
                "num_query_groups": 8,
                "kv_channels": 128,
                "max_position_embeddings": 40960,
                "vocab_size": 151936,
                "layernorm_epsilon": 1e-6,
                "rotary_base": 1_000_000.0,
            },
        ),
        "Qwen3Config600M": ("Qwen3Config", nemo_sizes(28, 1024, 16, 8, 3072, **_TIED)),
        "Qwen3Config1P7B": ("Qwen3Config", nemo_sizes(28, 2048, 16, 8, 6144, **_TIED)),
        "Qwen3Config4B": ("Qwen3Config", nemo_sizes(36, 2560, 32, 8, 9728, **_TIED)),
        "Qwen3Config8B": ("Qwen3Config", nemo_sizes(36, 4096, 32, 8, 12288)),
        "Qwen3Config14B": ("Qwen3Config", nemo_sizes(40, 5120, 40, 8, 17408)),
        "Qwen3Config32B": ("Qwen3Config", nemo_sizes(64, 5120, 64, 8, 25600)),
    },
    length="max_position_embeddings",
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
    nemo={"qwen3": NEMO},
    bridge={"qwen3": BridgeModel(("megatron.bridge.models.qwen.qwen_provider.Qwen3Model",))},
)
