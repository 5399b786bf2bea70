"""Rankings that nobody prunes by, to compare with: random ones, and those by the norms of weights, as Scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.importance.scores import AGGREGATIONS, Array, Scores


def ranked(scores: Scores, hidden: Array, ffn: Array, layers: Array) -> Scores:
    """`scores` that rank the entries of hidden [h], ffn [layers, f] and layers [layers] by these values."""

    def moments(shape: tuple[int, ...], values: Array) -> Array:
        # `Scores.get` with its defaults: the root of the sums of squares of the means, hidden channels' over all norms.
        array = np.zeros(shape)
        array[1, AGGREGATIONS.index("mean"), : len(values)] = values**2
        return array

    return replace(
        scores,
        hidden=moments(scores.hidden.shape, hidden[None]),
        ffn=moments(scores.ffn.shape, ffn),
        block_influence=layers,
    )


def magnitudes(teacher: Path) -> tuple[Array, Array, Array]:
    """Norms of all weights that belong to a hidden channel [h], a layer's neuron [layers, f] and a layer [layers]."""
    source = open_source(teacher)
    shape = source.architecture
    hidden, layers = np.zeros(shape.hidden_size), np.zeros(shape.num_layers)
    ffn = np.zeros((shape.num_layers, shape.ffn_hidden_size))
    for tensor in tensors(shape):
        rows = tensor.spec.shape(shape)[0]
        squares = source.read(tensor.name, 0, rows).double().square().numpy()
        for number, dim in enumerate(tensor.spec.dims):
            along = squares.sum(axis=tuple(other for other in range(squares.ndim) if other != number))
            if Axis.HIDDEN in dim.axes:
                hidden += along
            if Axis.FFN in dim.axes:
                ffn[tensor.layer] += along.reshape(-1, shape.ffn_hidden_size).sum(axis=0)  # of gate and up
        if tensor.layer is not None:
            layers[tensor.layer] += squares.sum()
    return np.sqrt(hidden), np.sqrt(ffn), np.sqrt(layers)


def drawn(shape: Architecture, seed: int) -> tuple[Array, Array, Array]:
    """Random values for every hidden channel [h], neuron [layers, f] and layer [layers]."""
    numbers = np.random.default_rng(seed)
    hidden, layers = numbers.random(shape.hidden_size), numbers.random(shape.num_layers)
    return hidden, numbers.random((shape.num_layers, shape.ffn_hidden_size)), layers
