"""Bytes that Megatron-core's own layers move outside their products with weights, for which a GPU has to wait.

Every operation reads its operands once and writes its result once, as CUDA's kernels do: softmax's backward pass first
writes gradient x output, 12 bytes that a CPU does without, and a norm is one kernel. With e bytes an element a layer
moves

                                forward       backward
    scores, [b, n/tp, s, s]     16 + 2 e      32 + 4 e      mask and softmax in fp32, attention's two and four products
                                + 2 (4 + e)   + 2 (4 + e)   in 16 bits: to fp32 and back
                                              + 36          in fp32: the mask is set in a view, so autograd copies
    neurons, t f/tp             7 e           13 e          silu, up + 0, what multiplies both; squared ReLU: 4 e, 10 e
    states, t(/tp) h            10 e          14 e          two norms of one kernel each, two residual sums

Left out is what queries, keys and values take, whose elements are few beside the scores', and of mixtures what routes
tokens and weighs experts. TransformerEngine's layers fuse most of this and hold no scores.
"""

from __future__ import annotations

from minitron_nemo.arch.family import family
from minitron_nemo.planning.activations import FP32, Activations


def forward_traffic(own: Activations) -> int:
    """Bytes of one layer's forward pass over a microbatch, on one rank."""
    e = own.element_size
    scores = 16 + 2 * e + (_conversions(e) if e < FP32 else 0)
    return own.scores() * scores + _neurons(own) * (7 if _gated(own) else 4) * e + 10 * own.states()


def backward_traffic(own: Activations) -> int:
    """The same of its backward pass."""
    e = own.element_size
    scores = 32 + 4 * e + (_conversions(e) if e < FP32 else 36)
    return own.scores() * scores + _neurons(own) * (13 if _gated(own) else 10) * e + 14 * own.states()


def _conversions(element_size: int) -> int:
    return 2 * (FP32 + element_size)


def _neurons(own: Activations) -> int:
    return own.tokens * own.neurons // own.layout.tensor_model_parallel_size


def _gated(own: Activations) -> bool:
    return family(own.model.family).gated_linear_unit
