"""Hooks on the experts of a mixture: which tokens each one sees, what its linear_fc2 reads, what it adds to them.

Megatron-core's SequentialMLP gives every expert its tokens in the order of the sequence and multiplies its activations
by the router's weight of each. So what linear_fc2 reads has that weight in it, and so has the expert's output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, distributed, nn
from torch.nn import functional

from minitron_nemo.importance.counted import Current
from minitron_nemo.importance.reduce import Reducer, token_norms


def experts_of(layer: TransformerLayer) -> list[Any]:
    """The experts of a layer; none where it has an MLP."""
    return list(layer.mlp.experts.local_experts) if hasattr(layer.mlp, "experts") else []


def down_projections(layer: TransformerLayer) -> list[Any]:
    """The linear_fc2 of a layer's MLP, or of each of its experts."""
    return [mlp.linear_fc2 for mlp in experts_of(layer) or [layer.mlp]]


class Routing:
    """Which tokens the experts of one layer see, set whenever its router has chosen while `handle` is attached.

    Of each expert `members` [b, n] says which of the n rows that it reads are tokens of which sequence, 1 or 0, and
    `routed` [b, experts], fp64, counts them; tokens that do not count are of none. All tensor-parallel ranks have the
    same.
    """

    members: tuple[Tensor, ...]
    routed: Tensor

    def __init__(self, layer: TransformerLayer, current: Current) -> None:
        self.layer = layer
        self.current = current
        self.handle = layer.mlp.router.register_forward_hook(self._on_router)

    def watch(self, expert: int, add: Callable[[Tensor], None]) -> Any:
        """Give to `add` what an expert's linear_fc2 reads of tokens that count, [t, moe_ffn/tp]; the hook's handle."""

        def on_rows(module: nn.Module, args: tuple[Any, ...]) -> None:
            add(args[0][self.members[expert].sum(dim=0) != 0])

        return experts_of(self.layer)[expert].linear_fc2.register_forward_pre_hook(on_rows)

    def _on_router(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        # [s(/tp) x b, experts]; under sequence parallelism an expert sees the tokens of all ranks, one after the other
        chosen = gather_from_sequence_parallel_region(output[1], group=self.layer.mlp.experts.tp_group)
        mask = self.current.counted.mask  # [b, s]
        # Of each sequence, its tokens in the order of the experts' rows.
        members = torch.diag_embed(mask.t()).flatten(0, 1).t()  # [b, s x b]
        self.routed = members.double() @ chosen.double()
        expert, token = chosen.t().nonzero().unbind(dim=1)
        self.members = members[:, token].split(torch.bincount(expert, minlength=chosen.shape[1]).tolist(), dim=1)


def shared_expert_hooks(layer: TransformerLayer, current: Current, add: Callable[[Tensor], None]) -> list[Any]:
    """Give to `add` what a shared expert's linear_fc2 reads of tokens that count times their gate, [t, shared/tp].

    The gate multiplies what linear_fc2 gives, so that these are the inputs of what the expert adds to a token. Returns
    the handles of the hooks.
    """
    mlp = layer.mlp.shared_experts
    gates: list[Tensor] = []  # of the microbatch that is in the layer: [s, b, 1]

    def on_states(module: nn.Module, args: tuple[Any, ...]) -> None:
        own = torch.sigmoid(functional.linear(args[0], mlp.gate_weight))  # [s(/tp), b, 1]
        gates.append(gather_from_sequence_parallel_region(own, group=layer.mlp.experts.tp_group))

    def on_neurons(module: nn.Module, args: tuple[Any, ...]) -> None:
        counts = current.counted.mask.t() != 0  # [s, b]
        add(args[0][counts].mul_(gates.pop()[counts]))

    return [mlp.register_forward_pre_hook(on_states), mlp.linear_fc2.register_forward_pre_hook(on_neurons)]


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
        self.routing = Routing(layer, current)
        self.handles = [self.routing.handle, layer.mlp.router.register_forward_hook(self._on_router)]
        for number, expert in enumerate(experts_of(layer)):
            self.handles += [
                expert.linear_fc2.register_forward_pre_hook(partial(self._on_neurons, number)),
                expert.register_forward_hook(partial(self._on_output, number)),
            ]
        if layer.mlp.shared_experts is not None:
            self.handles.append(layer.mlp.shared_experts.linear_fc2.register_forward_pre_hook(self._on_shared))

    def _on_router(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        self.sums["routed"] += self.routing.routed.unbind(dim=1)

    def _on_neurons(self, expert: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0]  # [n, moe_ffn/tp]
        self.sums["ffn"].append(self.reducer.sums_by_group(rows, self.routing.members[expert]))

    def _on_shared(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.sums["shared"].append(self.reducer.absolute_sums(args[0], self.current.counted.mask))

    def _on_output(self, expert: int, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        rows = output[0]  # [n, h], of this tensor-parallel rank's neurons alone
        if self.tp_group.size() > 1:
            rows = rows.to(torch.float32, copy=True)
            distributed.all_reduce(rows, group=self.tp_group)
        norms = token_norms(rows) * self.routing.members[expert].sum(dim=0)
        self.sums["experts"].append(norms.sum(dtype=torch.float64))
