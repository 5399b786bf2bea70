"""Which layers and parameters a pipeline rank has, by arithmetic: no model is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm, prod

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.tensors import NamedTensor, tensors
from minitron_nemo.models.build import padded_vocab_size
from minitron_nemo.parallel.layout import Layout

# Megatron-core's alignment of parameters within a gradient buffer, and of the buffer's end, in elements.
PARAMETER_ALIGNMENT, BUFFER_ALIGNMENT = 64, 128


def layers_of(model: Architecture, layout: Layout, rank: int) -> int:
    """Layers of a pipeline rank, over all its virtual stages."""
    return sum(layout.layers_per_stage(model.num_layers)[rank :: layout.pipeline_model_parallel_size])


def held_elements(model: Architecture, layout: Layout, stage: int) -> list[tuple[str, int]]:
    """Parameters of one stage on one tensor-parallel rank, padding included: part of the model and number."""
    tp, rows = layout.tensor_model_parallel_size, padded_vocab_size(model, layout)
    model = layout.padded(model)
    found = []
    for tensor in _held(model, layout, stage):
        part, shape = tensor.spec.part, tensor.spec.shape(model)
        if part in ("embedding", "output"):
            shape = (rows, *shape[1:])
        found.append((part, prod(shape) // (1 if tensor.spec.tp_dim is None else tp)))
    return found


def buffer_elements(sizes: Sequence[int], data_parallel_size: int) -> int:
    """Length of the buffer in which Megatron-core reduces the gradients of parameters of these sizes."""
    end = sum(_aligned(size, PARAMETER_ALIGNMENT) for size in sizes)
    return _aligned(end, lcm(data_parallel_size, BUFFER_ALIGNMENT))


def _held(model: Architecture, layout: Layout, stage: int) -> Iterator[NamedTensor]:
    """The tensors of one stage; with several, a tied embedding is on the first and on the last."""
    counts = layout.layers_per_stage(model.num_layers)
    first_layer = sum(counts[:stage])
    last = stage == layout.stages - 1
    for tensor in tensors(model):
        if tensor.layer is not None:
            held = first_layer <= tensor.layer < first_layer + counts[stage]
        elif tensor.spec.part == "embedding":
            held = stage == 0 or (last and model.share_embeddings_and_output_weights)
        else:
            held = last
        if held:
            yield tensor


def _aligned(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
