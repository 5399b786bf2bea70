"""Hooks on the experts of a mixture: which tokens each one sees, what its linear_fc2 reads, what it adds to them.

Megatron-core's SequentialMLP gives every expert its tokens in the order of the sequence and multiplies its activations
by the router's weight of each. So what linear_fc2 reads has that weight in it, and so has the expert's output.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, distributed, nn

from minitron_nemo.importance.counted import Current
from minitron_nemo.importance.reduce import Reducer, token_norms


def experts_of(layer: TransformerLayer) -> list[Any]:
    """The experts of a layer; none where it has an MLP."""
    return list(layer.mlp.experts.local_experts) if hasattr(layer.mlp, "experts") else []


def down_projections(layer: TransformerLayer) -> list[Any]:
    """The linear_fc2 of a layer's MLP, or of each of its experts."""
    return [mlp.linear_fc2 for mlp in experts_of(layer) or [layer.mlp]]


class ExpertHooks:
    """Measures the experts of one layer, expert by expert in their order, while its hooks are attached.

    Every microbatch appends to the lists in `sums`: to `ffn` the `absolute_sums` of each expert's neurons over the
    tokens of each sequence that it sees, fp64 [2, b, moe_ffn/tp]; to `routed` the number of those tokens, fp64 [b]; to
    `experts` the sum over all of them of the L2 norm of its output, fp64 []; to `shared` the sums of a shared expert's
    neurons over all tokens, fp64 [2, b, shared/tp]. Tokens that do not count are left out. `routed` and `experts` are
    the same on all tensor-parallel ranks.
    """

    def __init__(
        self, layer: TransformerLayer, current: Current, reducer: Reducer, sums: dict[str, list[Tensor]]
    ) -> None:
        self.current = current
        self.reducer = reducer
        self.sums = sums
        self.tp_group = layer.mlp.experts.tp_group
        self.handles = [layer.mlp.router.register_forward_hook(self._on_router)]
        for number, expert in enumerate(experts_of(layer)):
            self.handles += [
                expert.linear_fc2.register_forward_pre_hook(partial(self._on_neurons, number)),
                expert.register_forward_hook(partial(self._on_output, number)),
            ]
        if layer.mlp.shared_experts is not None:
            self.handles.append(layer.mlp.shared_experts.linear_fc2.register_forward_pre_hook(self._on_shared))

    def _on_router(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        # [s(/tp) x b, experts]; under sequence parallelism an expert sees the tokens of all ranks, one after the other
        chosen = gather_from_sequence_parallel_region(output[1], group=self.tp_group)
        mask = self.current.counted.mask  # [b, s]
        # Of each sequence, its tokens in the order of the experts' rows.
        members = torch.diag_embed(mask.t()).flatten(0, 1).t()  # [b, s x b]
        self.sums["routed"] += (members.double() @ chosen.double()).unbind(dim=1)
        expert, token = chosen.t().nonzero().unbind(dim=1)
        self.members = members[:, token].split(torch.bincount(expert, minlength=chosen.shape[1]).tolist(), dim=1)

    def _on_neurons(self, expert: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0]  # [n, moe_ffn/tp]
        self.sums["ffn"].append(self.reducer.sums_by_group(rows, self.members[expert]))

    def _on_shared(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.sums["shared"].append(self.reducer.absolute_sums(args[0], self.current.counted.mask))

    def _on_output(self, expert: int, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        rows = output[0]  # [n, h], of this tensor-parallel rank's neurons alone
        if self.tp_group.size() > 1:
            rows = rows.to(torch.float32, copy=True)
            distributed.all_reduce(rows, group=self.tp_group)
        norms = token_norms(rows) * self.members[expert].sum(dim=0)
        self.sums["experts"].append(norms.sum(dtype=torch.float64))
