"""One pass of a model with different layers left out at once: what two of them have in common is computed once.

A branch is the set of layers that it leaves out. Branches that left out the same layers so far are in one state, so
there are as many states between two layers as such histories; they lie side by side in the batch dim, as rows.

    layer         0           1           2
    row {}     ---x---+-------x---+-------x---+-->  of the branch {}
                      |           |           +-->  {2}
                      |           +-------x------>  {1}
                      +-------x-----------x------>  {0}       x: the layer is evaluated

Every layer left out alone, of L: row {} and each row that branched off go through what follows, L (L + 1) / 2
evaluations of a layer with the whole model among them, where separate passes take L^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from minitron_nemo.models.build import Model
from minitron_nemo.models.forward import Microbatch, forward_only
from minitron_nemo.parallel.layout import Layout

Branch = frozenset[int]  # layers to leave out, counted from 0


@dataclass(frozen=True)
class Fork:
    """Which of the rows that come to a layer `run` through it and which `pass` by; those that ran leave it first."""

    run: tuple[int, ...]
    passed: tuple[int, ...]


class Branches:
    """The way of `branches` through a model of `num_layers`; `rows` has the row of each behind the last layer."""

    def __init__(self, branches: Sequence[Branch], num_layers: int) -> None:
        self.forks: list[Fork] = []
        histories = [Branch()]
        for layer in range(num_layers):
            leaving = {Branch(left for left in branch if left < layer) for branch in branches if layer in branch}
            staying = {Branch(left for left in branch if left < layer) for branch in branches if layer not in branch}
            run = tuple(row for row, history in enumerate(histories) if history in staying)
            passed = tuple(row for row, history in enumerate(histories) if history in leaving)
            self.forks.append(Fork(run, passed))
            histories = [*(histories[row] for row in run), *(histories[row] | {layer} for row in passed)]
        self.rows = [histories.index(branch) for branch in branches]

    @property
    def evaluations(self) -> int:
        """Evaluations of a layer, of one sequence."""
        return sum(len(fork.run) for fork in self.forks)

    def payload(self, layout: Layout) -> int:
        """Rows that stages hand on: the most behind any stage but the last, since Megatron's messages have one size."""
        ends = list(accumulate(layout.layers_per_stage(len(self.forks))))[:-1]
        return max((len(fork.run) + len(fork.passed) for fork in (self.forks[end - 1] for end in ends)), default=1)


class ForkedLayer(nn.Module):
    """A layer as its block sees it, with several rows of `sequences` in the batch dim: [s(/tp), rows * b, h].

    What leaves it is filled up with zeros to `payload` rows, where that is given; rows beyond those of the fork are
    not looked at.
    """

    def __init__(self, layer: TransformerLayer, fork: Fork, sequences: int, payload: int | None) -> None:
        super().__init__()
        self.layer = layer
        self.fork = fork
        self.sequences = sequences
        self.payload = payload

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        """The rows behind the layer, and no context: that is of encoders."""
        entering = hidden_states.unflatten(1, (-1, self.sequences))  # [s(/tp), rows, b, h]
        leaving = []
        if self.fork.run:
            states, _ = self.layer(hidden_states=entering[:, list(self.fork.run)].flatten(1, 2), **arguments)
            leaving.append(states.unflatten(1, (-1, self.sequences)))
        if self.fork.passed:
            leaving.append(entering[:, list(self.fork.passed)])
        if self.payload is not None:
            missing = self.payload - len(self.fork.run) - len(self.fork.passed)
            leaving.append(entering.new_zeros(entering.shape[0], missing, *entering.shape[2:]))
        return torch.cat(leaving, dim=1).flatten(1, 2), None


def run_branches(
    model: Model,
    branches: Branches,
    microbatches: Iterable[Microbatch],
    count: int,
    shape: tuple[int, int],
    collect: Callable[[Tensor, Microbatch], Any],
) -> list[Any]:
    """`forward_only` of `count` microbatches of `shape` [b, s] on all branches. Collective.

    `collect` gets what the output layer gives, with the rows apart: [rows, b, ...].
    """
    sequences, length = shape
    payload = branches.payload(model.layout)
    with _forked(model, branches, sequences, payload):
        return forward_only(
            model,
            microbatches,
            count,
            length,
            sequences * payload,
            lambda output, microbatch: collect(output.unflatten(0, (-1, sequences)), microbatch),
        )


@contextmanager
def _forked(model: Model, branches: Branches, sequences: int, payload: int) -> Iterator[None]:
    """Put forked layers in the place of the model's."""
    blocks = [module.decoder for module in model.modules]
    layers = [block.layers for block in blocks]
    try:
        for module, found in zip(model.modules, layers, strict=True):
            handed_on = [None] * (len(found) - 1) + [None if module.post_process else payload]
            module.decoder.layers = nn.ModuleList(
                ForkedLayer(layer, branches.forks[layer.layer_number - 1], sequences, filled)
                for layer, filled in zip(found, handed_on, strict=True)
            )
        yield
    finally:
        for block, found in zip(blocks, layers, strict=True):
            block.layers = found
