"""The Llama family: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases.

Covers Llama 2 and 3, SmolLM2, Mistral and Mistral-NeMo.
"""

from __future__ import annotations

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Axis, AxisDim, GatedDim, HeadsDim, QKVDim
from minitron_nemo.arch.tensors import Piece, TensorSpec

HIDDEN = AxisDim(Axis.HIDDEN)
FFN = AxisDim(Axis.FFN)
VOCAB = AxisDim(Axis.VOCAB)

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


def table(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """All tensors in the order of the forward pass."""
    output = TensorSpec(
        "output_layer.weight", (VOCAB, HIDDEN), 0, lambda a: _whole("lm_head.weight", a.vocab_size), "output"
    )
    specs = (
        TensorSpec(
            "embedding.word_embeddings.weight",
            (VOCAB, HIDDEN),
            0,
            lambda a: _whole("model.embed_tokens.weight", a.vocab_size),
            "embedding",
        ),
        _norm(LAYER + "self_attention.linear_qkv.layer_norm_weight", HF_LAYER + "input_layernorm.weight"),
        TensorSpec(LAYER + "self_attention.linear_qkv.weight", (QKVDim(), HIDDEN), 0, _qkv, "attention"),
        TensorSpec(
            LAYER + "self_attention.linear_proj.weight",
            (HIDDEN, HeadsDim()),
            1,
            lambda a: _whole(HF_LAYER + "self_attn.o_proj.weight", a.hidden_size),
            "attention",
        ),
        _norm(LAYER + "mlp.linear_fc1.layer_norm_weight", HF_LAYER + "post_attention_layernorm.weight"),
        TensorSpec(LAYER + "mlp.linear_fc1.weight", (GatedDim(Axis.FFN), HIDDEN), 0, _gate_up, "mlp"),
        TensorSpec(
            LAYER + "mlp.linear_fc2.weight",
            (HIDDEN, FFN),
            1,
            lambda a: _whole(HF_LAYER + "mlp.down_proj.weight", a.hidden_size),
            "mlp",
        ),
        _norm("decoder.final_layernorm.weight", "model.norm.weight"),
    )
    return specs if architecture.share_embeddings_and_output_weights else (*specs, output)


def _whole(hf_name: str, rows: int) -> list[Piece]:
    return [Piece(hf_name, 0, 0, rows)]


def _norm(name: str, hf_name: str) -> TensorSpec:
    return TensorSpec(name, (HIDDEN,), None, lambda a: _whole(hf_name, a.hidden_size), "norm")


def _gate_up(architecture: Architecture) -> list[Piece]:
    ffn = architecture.ffn_hidden_size
    return [
        Piece(HF_LAYER + "mlp.gate_proj.weight", 0, 0, ffn),
        Piece(HF_LAYER + "mlp.up_proj.weight", 0, ffn, ffn),
    ]


def _qkv(architecture: Architecture) -> list[Piece]:
    head = architecture.kv_channels
    queries = architecture.heads_per_group * head
    pieces = []
    for group in range(architecture.num_query_groups):
        start = group * (queries + 2 * head)
        pieces += [
            Piece(HF_LAYER + "self_attn.q_proj.weight", group * queries, start, queries),
            Piece(HF_LAYER + "self_attn.k_proj.weight", group * head, start + queries, head),
            Piece(HF_LAYER + "self_attn.v_proj.weight", group * head, start + queries + head, head),
        ]
    return pieces
