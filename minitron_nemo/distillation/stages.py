"""Which layers and parameters a pipeline rank has, by arithmetic: no model is built."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.tensors import table
from minitron_nemo.models.build import padded_vocab_size
from minitron_nemo.parallel.layout import Layout

# Megatron-core's alignment of parameters within a gradient buffer, and of the buffer's end, in elements.
PARAMETER_ALIGNMENT, BUFFER_ALIGNMENT = 64, 128


def layers_of(model: Architecture, layout: Layout, rank: int) -> int:
    """Layers of a pipeline rank, over all its virtual stages."""
    return sum(layout.layers_per_stage(model.num_layers)[rank :: layout.pipeline_model_parallel_size])


def held_elements(model: Architecture, layout: Layout, stage: int) -> list[tuple[str, int]]:
    """Parameters of one stage on one tensor-parallel rank, padding included: part of the model and number.

    With several stages, a tied embedding is on the first and on the last.
    """
    tp, rows = layout.tensor_model_parallel_size, padded_vocab_size(model, layout)
    model = layout.padded(model)
    last = stage == layout.stages - 1
    before: list[tuple[str, int]] = []
    of_layer: list[tuple[str, int]] = []
    behind: list[tuple[str, int]] = []
    for spec in table(model):
        part, shape = spec.part, spec.shape(model)
        if part in ("embedding", "output"):
            shape = (rows, *shape[1:])
        held = part, prod(shape) // (1 if spec.tp_dim is None else tp)
        if spec.per_layer:
            of_layer += [held] * (model.size(Axis.EXPERTS) if spec.per_expert else 1)
        elif part == "embedding":
            if stage == 0 or (last and model.share_embeddings_and_output_weights):
                before.append(held)
        elif last:
            behind.append(held)
    return before + of_layer * layout.layers_per_stage(model.num_layers)[stage] + behind


def buffer_elements(sizes: Sequence[int], data_parallel_size: int) -> int:
    """Length of the buffer in which Megatron-core reduces the gradients of parameters of these sizes."""
    end = sum(_aligned(size, PARAMETER_ALIGNMENT) for size in sizes)
    return _aligned(end, lcm(data_parallel_size, BUFFER_ALIGNMENT))


def _aligned(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
