"""Lines that the tables of several families have in common: the tensors Megatron-core stores, with their axes.

What differs between families is which of these they have and which rows of which Hugging Face tensors they are.
"""

from __future__ import annotations

from collections.abc import Callable

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Axis, AxisDim, Dim, GatedDim, HeadsDim, KVChannelsDim, OneDim, QKVDim
from minitron_nemo.arch.tensors import Piece, TensorSpec

HIDDEN = AxisDim(Axis.HIDDEN)
FFN = AxisDim(Axis.FFN)
GATE_AND_UP = GatedDim(Axis.FFN)
EXPERTS = AxisDim(Axis.EXPERTS)
MOE_FFN = AxisDim(Axis.MOE_FFN)
MOE_GATE_AND_UP = GatedDim(Axis.MOE_FFN)
SHARED_FFN = AxisDim(Axis.SHARED_FFN)
SHARED_GATE_AND_UP = GatedDim(Axis.SHARED_FFN)
VOCAB = AxisDim(Axis.VOCAB)
QKV = QKVDim()

LAYER = "decoder.layers.{layer}."
INPUT_NORM = LAYER + "self_attention.linear_qkv.layer_norm_"
PRE_MLP_NORM = LAYER + "mlp.linear_fc1.layer_norm_"
PRE_EXPERTS_NORM = LAYER + "pre_mlp_layernorm."  # read by router and experts, so that no linear layer has it
FINAL_NORM = "decoder.final_layernorm."
HF_LAYER = "model.layers.{layer}."
EMBEDDING = "embedding.word_embeddings.weight"

Pieces = Callable[[Architecture], list[Piece]]


def whole(hf_name: str, dim: Dim) -> Pieces:
    """All rows are those of one Hugging Face tensor, in the same order."""
    return lambda a: [Piece(hf_name, 0, 0, dim.size(a))]


def embedding() -> TensorSpec:
    return TensorSpec(EMBEDDING, (VOCAB, HIDDEN), 0, whole("model.embed_tokens.weight", VOCAB), "embedding")


def norm(prefix: str, hf_prefix: str, bias: bool = False) -> tuple[TensorSpec, ...]:
    """A norm of the residual stream; `prefix` is what precedes `weight` and `bias` in its stored names."""
    return tuple(
        TensorSpec(prefix + kind, (HIDDEN,), None, whole(f"{hf_prefix}.{kind}", HIDDEN), "norm")
        for kind in ("weight", "bias")[: 1 + bias]
    )


def qk_norms() -> tuple[TensorSpec, ...]:
    """Norms of every head's query and of every key, with one gain for all heads."""
    dim = KVChannelsDim()
    return tuple(
        TensorSpec(
            f"{LAYER}self_attention.{kind}_layernorm.weight",
            (dim,),
            None,
            whole(f"{HF_LAYER}self_attn.{kind}_norm.weight", dim),
            "norm",
        )
        for kind in "qk"
    )


def qkv(*kinds: str) -> tuple[TensorSpec, ...]:
    """Queries, keys and values from Hugging Face's `q_proj`, `k_proj` and `v_proj`; `kinds`: "weight", "bias"."""

    def pieces(kind: str) -> Pieces:
        names = [f"{HF_LAYER}self_attn.{letter}_proj.{kind}" for letter in "qkv"]
        return lambda a: by_group(a, [(name, 0) for name in names])

    return tuple(
        TensorSpec(
            f"{LAYER}self_attention.linear_qkv.{kind}",
            (QKV, HIDDEN) if kind == "weight" else (QKV,),
            0,
            pieces(kind),
            "attention",
        )
        for kind in kinds
    )


def by_group(architecture: Architecture, starts: list[tuple[str, int]]) -> list[Piece]:
    """Rows of a `QKVDim`; `starts` are the Hugging Face tensors of queries, keys and values and their first rows."""
    head = architecture.kv_channels
    lengths = (architecture.heads_per_group * head, head, head)
    pieces, start = [], 0
    for group in range(architecture.num_query_groups):
        for (hf_name, hf_start), length in zip(starts, lengths, strict=True):
            pieces.append(Piece(hf_name, hf_start + group * length, start, length))
            start += length
    return pieces


def attention_output() -> TensorSpec:
    pieces = whole(HF_LAYER + "self_attn.o_proj.weight", HIDDEN)
    return TensorSpec(LAYER + "self_attention.linear_proj.weight", (HIDDEN, HeadsDim()), 1, pieces, "attention")


def mlp_input(dim: Dim, pieces: Pieces) -> TensorSpec:
    return TensorSpec(LAYER + "mlp.linear_fc1.weight", (dim, HIDDEN), 0, pieces, "mlp")


def gate_and_up() -> TensorSpec:
    """Gate over up, from Hugging Face's `gate_proj` and `up_proj`."""

    def pieces(architecture: Architecture) -> list[Piece]:
        ffn = architecture.ffn_hidden_size
        return [Piece(HF_LAYER + f"mlp.{name}_proj.weight", 0, i * ffn, ffn) for i, name in enumerate(("gate", "up"))]

    return mlp_input(GATE_AND_UP, pieces)


def mlp_output() -> TensorSpec:
    pieces = whole(HF_LAYER + "mlp.down_proj.weight", HIDDEN)
    return TensorSpec(LAYER + "mlp.linear_fc2.weight", (HIDDEN, FFN), 1, pieces, "mlp")


def experts(hf_router: str, gate: str, up: str, down: str) -> tuple[TensorSpec, ...]:
    """The router, then gate over up and the way down of every expert, from the Hugging Face tensors of these names.

    What Megatron-core stores has `experts` twice: the module of the layer, and its experts, which it stacks.
    """

    def gate_over_up(architecture: Architecture) -> list[Piece]:
        rows = MOE_FFN.size(architecture)
        return [Piece(name, 0, i * rows, rows) for i, name in enumerate((gate, up))]

    expert = LAYER + "mlp.experts.experts.{expert}."
    return (
        TensorSpec(LAYER + "mlp.router.weight", (EXPERTS, HIDDEN), None, whole(hf_router, EXPERTS), "router"),
        TensorSpec(expert + "linear_fc1.weight", (MOE_GATE_AND_UP, HIDDEN), 0, gate_over_up, "experts"),
        TensorSpec(expert + "linear_fc2.weight", (HIDDEN, MOE_FFN), 1, whole(down, HIDDEN), "experts"),
    )


def shared_expert() -> tuple[TensorSpec, ...]:
    """An expert that sees every token, and the row whose product with a token's states is its gate's logit."""

    def gate_over_up(architecture: Architecture) -> list[Piece]:
        rows = SHARED_FFN.size(architecture)
        return [Piece(f"{theirs}.{name}_proj.weight", 0, i * rows, rows) for i, name in enumerate(("gate", "up"))]

    ours, theirs = LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_expert"
    down, gate = whole(theirs + ".down_proj.weight", HIDDEN), whole(theirs + "_gate.weight", OneDim())
    return (
        TensorSpec(ours + "linear_fc1.weight", (SHARED_GATE_AND_UP, HIDDEN), 0, gate_over_up, "mlp"),
        TensorSpec(ours + "linear_fc2.weight", (HIDDEN, SHARED_FFN), 1, down, "mlp"),
        TensorSpec(ours + "gate_weight", (OneDim(), HIDDEN), None, gate, "router"),
    )


def output(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """The output layer; nothing where it is tied to the embedding."""
    if architecture.share_embeddings_and_output_weights:
        return ()
    return (TensorSpec("output_layer.weight", (VOCAB, HIDDEN), 0, whole("lm_head.weight", VOCAB), "output"),)
