"""Bytes that a model's layers keep of one microbatch for the backward pass, and work with meanwhile.

The method is that of 2205.05198 (Korthikanti et al., section 4): add up what every operation saves. The terms are those
of GPTModel with our specs: no dropout, so no masks of it; grouped queries; a gated MLP. With e bytes an element, t
tokens of a microbatch on a context-parallel rank (t/tp of them under sequence parallelism where marked *), a layer
without TransformerEngine keeps

    2 x norm*     RMSNorm: its input and the normalised states in fp32; LayerNorm: its input in e
    2 x h e*      what linear_qkv and linear_fc1 read
    4 n d e / tp  queries, keys and values, repeated for every head, and the context that linear_proj reads
    n s (4 + 2) / tp   softmax in fp32 and, in 16 bits, what multiplies the values: [b, n, s, s]
    5 f e / tp    gate and up, silu(gate), up + 0, their product that linear_fc2 reads; squared ReLU: 2 f e / tp

a token, besides cosines and sines of a sequence's positions, and with TransformerEngine's layers less: norms keep their
input in e, keys and values stay grouped, attention keeps a number per head instead of scores, and the gated activation
its input and its output: 3 f e / tp.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.family import family
from minitron_nemo.arch.tensors import table
from minitron_nemo.parallel.layout import Layout

FP32 = 4


@dataclass(frozen=True)
class Activations:
    """A model on a layout, with microbatches of one shape; every figure is of one rank, in bytes."""

    model: Architecture
    layout: Layout
    micro_batch_size: int
    sequence_length: int
    element_size: int  # of weights and states
    transformer_engine: bool = False

    @property
    def tokens(self) -> int:
        """Of a microbatch, on one context-parallel rank."""
        return self.micro_batch_size * self.sequence_length // self.layout.context_parallel_size

    def states(self) -> int:
        """The residual stream of a microbatch, [s(/tp), b, h]: what a layer keeps that is recomputed as a whole."""
        return self._local_tokens * self.model.hidden_size * self.element_size

    def layer(self) -> int:
        """What one layer keeps of a microbatch."""
        inputs = 2 * self.states()
        return 2 * self.norm(self.model.hidden_size) + inputs + self._attention() + self._mlp()

    def angles(self) -> int:
        """What recomputed layers keep together: the angle of every position and channel that turns, in fp32."""
        return self._turned() * FP32

    def norm(self, width: int, tokens: int | None = None) -> int:
        """What a norm over `width` channels keeps of the local tokens."""
        tokens = self._local_tokens if tokens is None else tokens
        if self.transformer_engine:
            return tokens * (width * self.element_size + FP32)
        if family(self.model.family).normalization == "RMSNorm":
            return tokens * FP32 * (2 * width + 1)
        return tokens * self.element_size * (width + 2)

    def embedding(self) -> int:
        """Token ids and, on tensor-parallel ranks, which of them are held elsewhere."""
        return self.tokens * (8 + (self._tp > 1))

    def backward_work(self) -> int:
        """Gradients of states at once in one layer's backward pass, and of its largest matrix before it is added."""
        width = 5 if family(self.model.family).gated_linear_unit else 2
        mlp = self.tokens * width * self.neurons * self.element_size // self._tp
        # Of the probabilities, of the softmax's output and its input in fp32.
        attention = self.scores() * (self.element_size + 2 * FP32)
        return max(mlp, attention) + 2 * self.states() + self._largest_matrix()

    def forward_work(self) -> int:
        """States at once in one layer's forward pass where none is kept, and what attention's products take."""
        kept = 3 if self.transformer_engine else 5
        width = kept if family(self.model.family).gated_linear_unit else 2
        mlp = self.tokens * width * self.neurons * self.element_size // self._tp
        scores = self.element_size + FP32 if self.element_size == FP32 else 2 * (self.element_size + FP32)
        return max(mlp, self.scores() * scores + self._queries_keys_values()) + 2 * self.states()

    @property
    def _tp(self) -> int:
        return self.layout.tensor_model_parallel_size

    @property
    def _local_tokens(self) -> int:
        return self.tokens // self._tp if self.layout.sequence_parallel else self.tokens

    @property
    def _padded(self) -> Architecture:
        return self.layout.padded(self.model)

    @property
    def neurons(self) -> int:
        """Of all experts that a token meets, over tensor-parallel ranks."""
        shape = self.model
        if shape.num_moe_experts is None:
            return shape.ffn_hidden_size
        return (shape.moe_router_topk or 0) * shape.ffn_hidden_size + shape.size(Axis.SHARED_FFN)

    def scores(self) -> int:
        """Elements of attention's scores, [b, n/tp, s, s]; 0 where they are never held."""
        if self.transformer_engine and self.element_size < FP32:
            return 0
        length = self.sequence_length // self.layout.context_parallel_size
        return self.micro_batch_size * self._padded.num_attention_heads * length * length // self._tp

    def _queries_keys_values(self) -> int:
        shape = self._padded
        heads, groups = shape.num_attention_heads, shape.num_query_groups
        values = heads + 2 * groups  # a view of what linear_qkv gave, which stays whole
        kept = 3 * heads if heads > groups and not self.transformer_engine else heads + groups + values
        return self.tokens * kept * shape.kv_channels * self.element_size // self._tp

    def _attention(self) -> int:
        shape, e = self._padded, self.element_size
        heads = shape.num_attention_heads // self._tp
        context = self.tokens * heads * shape.kv_channels * e
        kept = self._queries_keys_values() + context
        if family(shape.family).qk_layernorm:
            groups = shape.num_query_groups // self._tp
            kept += self.norm(shape.kv_channels, self.tokens * (heads + groups))
        if self.scores():
            kept += self.scores() * (FP32 if e == FP32 else FP32 + e)
        else:
            kept += self.tokens * heads * FP32
        if self.transformer_engine:
            return kept
        return kept + 4 * self._turned() * e

    def _turned(self) -> int:
        """Channels of a head that turn, at all positions."""
        positions = self.sequence_length // self.layout.context_parallel_size
        return positions * int(self.model.kv_channels * self.model.rotary_percent)

    def _mlp(self) -> int:
        shape, e = self.model, self.element_size
        if not family(shape.family).gated_linear_unit:
            return 2 * self.tokens * self.neurons * e // self._tp
        kept = (3 if self.transformer_engine else 5) * self.tokens * self.neurons * e // self._tp
        if shape.num_moe_experts is None:
            return kept
        if not self.transformer_engine:  # an expert's product is multiplied by the token's weight, too
            kept += self.tokens * (shape.moe_router_topk or 0) * shape.ffn_hidden_size * e // self._tp
        # Of every token: its row for each of its experts, where it goes, with what weight (fp32, int64).
        chosen = self.tokens * (shape.moe_router_topk or 0)
        kept += chosen * (shape.hidden_size * e + FP32 + 8) + self.tokens * shape.num_moe_experts * (1 + FP32)
        kept += self._local_tokens * (shape.moe_router_topk or 0) * (8 + FP32)
        if shape.has(Axis.SHARED_FFN):
            kept += self.states() + self._local_tokens * e  # its output, and the gate
        return kept

    def _largest_matrix(self) -> int:
        """The gradient of a layer's largest matrix on one rank."""
        sizes = [
            prod(spec.shape(self._padded)) // (1 if spec.tp_dim is None else self._tp)
            for spec in table(self._padded)
            if spec.per_layer
        ]
        return max(sizes) * self.element_size
