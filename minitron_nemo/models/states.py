"""The states between layers: where a model computes them, how to see them there, how they reach another stage.

State k is the output of layer k (from 0; -1 is the embedding's) after the norm that reads it: the input norm of layer
k + 1, or the final norm. It belongs to the pipeline rank that owns that norm, on any split and with virtual stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.models.build import Model
from minitron_nemo.models.norm import normalize
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout

EMBEDDING = -1

# (input of the norm, state), both [s(/tp), b, h] -> what the norm shall be given instead, or None for its input
See = Callable[[Tensor, Tensor], Tensor | None]


def watch(model: Model, state: int, see: See) -> bool:
    """Call `see` whenever this rank computes `state`; False where the state belongs to another rank.

    The state is computed beside the model's own norm, which TransformerEngine fuses with the product that follows;
    its gradient reaches the norm's gain. Within the hook the norm's parameters are gathered (`overlap_param_gather`).
    """
    norm = _norms(model).get(state)
    if norm is None:
        return False
    fused = hasattr(norm, "layer_norm_weight")
    weight = norm.layer_norm_weight if fused else norm.weight
    bias = getattr(norm, "layer_norm_bias" if fused else "bias", None)

    def hook(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = arguments[0]
        replaced = see(x, normalize(x, weight, bias, model.config))
        return None if replaced is None else (replaced, *arguments[1:])

    norm.register_forward_pre_hook(hook)
    return True


def _norms(model: Model) -> dict[int, Any]:
    """The modules of this rank that begin with a norm of the residual stream, by the state they read."""
    found: dict[int, Any] = {}
    for module in model.modules:
        for layer in module.decoder.layers:
            fused = layer.self_attention.linear_qkv
            # layer_number counts from 1 over the whole model, so layer n + 1 in its words reads the output of n - 1.
            found[layer.layer_number - 2] = fused if hasattr(fused, "layer_norm_weight") else layer.input_layernorm
        if module.post_process:
            found[model.architecture.num_layers - 1] = module.decoder.final_layernorm
    return found


def owners(num_layers: int, layout: Layout) -> dict[int, int]:
    """Pipeline rank of every state of a model of that depth."""
    stages = enumerate(layout.layers_per_stage(num_layers))
    readers = [stage % layout.pipeline_model_parallel_size for stage, layers in stages for _ in range(layers)]
    last = layout.pipeline_model_parallel_size - 1
    return dict(enumerate([*readers, last], start=EMBEDDING))


def shard_sequence(states: Tensor, layout: Layout) -> Tensor:
    """[s, b, h], or [s/tp, b, h] under sequence parallelism, -> this tensor-parallel rank's [s/tp, b, h]."""
    tp = layout.tensor_model_parallel_size
    if tp > 1 and not layout.sequence_parallel:
        states = states.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()]
    return states.contiguous()


def gather_sequence(shard: Tensor) -> Tensor:
    """[s/tp, ...] of every tensor-parallel rank -> [s, ...] on each. Not differentiable."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    if tp == 1:
        return shard
    whole = shard.new_empty((shard.shape[0] * tp, *shard.shape[1:]))
    torch.distributed.all_gather(list(whole.chunk(tp)), shard, group=parallel_state.get_tensor_model_parallel_group())
    return whole


@dataclass(frozen=True, order=True)
class Delivery:
    """State `state` of one model goes from pipeline rank `source`, which computes it, to `target`."""

    state: int
    source: int
    target: int


class StateCapture:
    """Keeps states of a frozen model's forward passes and brings them to the pipeline ranks that need them."""

    def __init__(self, model: Model, deliveries: Iterable[Delivery]) -> None:
        """`deliveries` are those of the whole pipeline group, the same on all its ranks."""
        self.model = model
        self.deliveries = sorted(set(deliveries))
        self.rank = parallel_state.get_pipeline_model_parallel_rank()
        self._captured: dict[int, list[Tensor]] = {}
        for state in {delivery.state for delivery in self.deliveries if delivery.source == self.rank}:
            self._captured[state] = []
            owned = watch(model, state, partial(self._keep, state))
            assert owned, f"state {state} is not computed on pipeline rank {self.rank}"

    def states_held(self) -> int:
        """Of one microbatch, on the pipeline rank that holds most of them."""
        held: dict[int, set[tuple[int, int]]] = {}
        for delivery in self.deliveries:
            for rank in (delivery.source, delivery.target):
                held.setdefault(rank, set()).add((delivery.state, delivery.source))
        return max((len(states) for states in held.values()), default=0)

    def take(self, token_shapes: Sequence[tuple[int, int]]) -> list[dict[int, Tensor]]:
        """What was captured since the last call, per microbatch, where it is needed: {state: [s/tp, b, h]}.

        `token_shapes` are [b, s] of the microbatches. Collective over the pipeline group.
        """
        taken: list[dict[int, Tensor]] = [{} for _ in token_shapes]
        for delivery in self.deliveries:  # in the same order on all ranks, so that no two of them wait for each other
            for index, shape in enumerate(token_shapes):
                if delivery.source == self.rank:
                    state = self._captured[delivery.state][index]
                    if delivery.target == self.rank:
                        taken[index][delivery.state] = state
                    else:
                        torch.distributed.send(state, **_peer("dst", delivery.target))
                elif delivery.target == self.rank:
                    taken[index][delivery.state] = self._receive(delivery.source, *shape)
        for captured in self._captured.values():
            captured.clear()
        return taken

    def _keep(self, state: int, _: Tensor, values: Tensor) -> None:
        self._captured[state].append(shard_sequence(values, self.model.layout))

    def _receive(self, source: int, micro_batch_size: int, sequence_length: int) -> Tensor:
        layout, config = self.model.layout, self.model.config
        shape = (sequence_length // layout.tensor_model_parallel_size, micro_batch_size, config.hidden_size)
        values = torch.empty(shape, dtype=config.params_dtype, device=current_device())
        torch.distributed.recv(values, **_peer("src", source))
        return values


def _peer(direction: str, pipeline_rank: int) -> dict[str, Any]:
    group = parallel_state.get_pipeline_model_parallel_group()
    return {direction: torch.distributed.get_global_rank(group, pipeline_rank), "group": group}
