"""The Llama family: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases.

Covers Llama 2 and 3, SmolLM2, Mistral and Mistral-NeMo.
"""

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
        blocks.attention_output(),
        *blocks.norm(PRE_MLP_NORM, HF_LAYER + "post_attention_layernorm"),
        blocks.gate_and_up(),
        blocks.mlp_output(),
        *blocks.norm(FINAL_NORM, "model.norm"),
        *blocks.output(architecture),
    )


EPSILON = {"layernorm_epsilon": ("rms_norm_eps", 1e-6)}

_CODE = {"rotary_base": 1_000_000, "seq_length": 16384}
_LLAMA3 = {"rotary_base": 500_000, "seq_length": 8192}
_LLAMA31 = {"rotary_base": 500_000, "seq_length": 131072}
_LLAMA32 = {**_LLAMA31, "scale_factor": 32.0, "share_embeddings_and_output_weights": True}
_LLAMA31_SCALING = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
_LARGE_MISTRAL = {"kv_channels": 128, "seq_length": 4096, "window_size": None, "rotary_base": 1e6}

NEMO = {
    "llama": NeMoModel(
        "nemo.collections.llm.gpt.model.llama",
        "LlamaModel",
        {
            "LlamaConfig": (None, {"seq_length": 4096}),
            "Llama2Config7B": ("LlamaConfig", nemo_sizes(32, 4096, 32, 32, 11008)),
            "Llama2Config13B": ("LlamaConfig", nemo_sizes(40, 5120, 40, 40, 13824)),
            "Llama2Config70B": ("LlamaConfig", nemo_sizes(80, 8192, 64, 8, 28672)),
            "CodeLlamaConfig7B": ("Llama2Config7B", _CODE),
            "CodeLlamaConfig13B": ("Llama2Config13B", _CODE),
            "CodeLlamaConfig34B": ("LlamaConfig", nemo_sizes(48, 8192, 64, 8, 22016, **_CODE)),
            "CodeLlamaConfig70B": ("Llama2Config70B", {}),
            "Llama3Config": ("LlamaConfig", {"num_query_groups": 8}),
            "Llama3Config8B": ("Llama3Config", nemo_sizes(32, 4096, 32, 8, 14336, **_LLAMA3)),
            "Llama3Config70B": ("Llama3Config", nemo_sizes(80, 8192, 64, 8, 28672, **_LLAMA3)),
            "Llama31Config": ("Llama3Config", _LLAMA31_SCALING),
            "Llama31Config8B": ("Llama31Config", nemo_sizes(32, 4096, 32, 8, 14336, **_LLAMA31)),
            "Llama31Config70B": ("Llama31Config", nemo_sizes(80, 8192, 64, 8, 28672, **_LLAMA31)),
            "Llama31Config405B": ("Llama31Config", nemo_sizes(126, 16384, 128, 8, 53248, **_LLAMA31)),
            "Llama32Config1B": ("Llama31Config", nemo_sizes(16, 2048, 32, 8, 8192, **_LLAMA32)),
            "Llama32Config3B": ("Llama31Config", nemo_sizes(28, 3072, 24, 8, 8192, **_LLAMA32)),
        },
        scaled="Llama31Config",
    ),
    "mistral": NeMoModel(
        "nemo.collections.llm.gpt.model.mistral",
        "MistralModel",
        {
            "MistralConfig7B": (None, nemo_sizes(32, 4096, 32, 8, 14336, seq_length=32768, window_size=[4096, 0])),
            "MistralNeMoConfig12B": ("MistralConfig7B", {"num_layers": 40, "hidden_size": 5120, **_LARGE_MISTRAL}),
            "MistralNeMoConfig123B": ("MistralConfig7B", nemo_sizes(88, 12288, 96, 8, 28672, **_LARGE_MISTRAL)),
            "MistralSmall3Config24B": (
                "MistralConfig7B",
                nemo_sizes(
                    40, 5120, 32, 8, 32768, kv_channels=128, seq_length=32768, window_size=None, rotary_base=1e8
                ),
            ),
        },
    ),
}
BRIDGE = {
    "llama": BridgeModel(("megatron.bridge.models.llama.",)),
    "mistral": BridgeModel(
        ("megatron.bridge.models.mistral.",), "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider"
    ),
}

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
    nemo=NEMO,
    bridge=BRIDGE,
)
