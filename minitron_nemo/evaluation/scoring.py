"""Log-probabilities of continuations behind their contexts, on any layout: what tasks are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, distributed

from minitron_nemo.data.sampler import Microbatch, stack
from minitron_nemo.errors import UserError
from minitron_nemo.kernels import label_statistics
from minitron_nemo.models.build import Model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel.device import current_device

TOGETHER = 8  # microbatches of each rank that go through the pipeline in one pass, padded to one length


@dataclass(frozen=True)
class Continuation:
    """Token ids, of which the last `scored` are the continuation."""

    tokens: tuple[int, ...]
    scored: int

    @staticmethod
    def of(context: Sequence[int], continuation: Sequence[int], most_tokens: int) -> Continuation:
        """As lm-evaluation-harness cuts: of what is longer than the model takes, the beginning goes.

        Raises UserError for an empty context, and for a continuation that is empty or longer than `most_tokens`.
        """
        if not context or not 0 < len(continuation) <= most_tokens:
            raise UserError(
                f"a context of {len(context)} tokens and a continuation of {len(continuation)}: both need a token, and "
                f"the model takes {most_tokens}; change the task"
            )
        return Continuation(tuple([*context, *continuation][-(most_tokens + 1) :]), len(continuation))


def log_likelihoods(
    model: Model,
    requests: Sequence[Continuation],
    micro_batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, bool]]:
    """Of each continuation: its log-probability, and whether every token of it is the most likely one. Collective.

    All ranks pass the same requests, which are spread over the data-parallel ranks, and get the same results. `advance`
    is told of every so many that are done. The output layer is left as it was found.
    """
    order = sorted(range(len(requests)), key=lambda number: -len(requests[number].tokens))  # alike ones together
    at_once = TOGETHER * micro_batch_size * parallel_state.get_data_parallel_world_size()
    results = torch.zeros(len(requests), 2, dtype=torch.float64, device=current_device())
    layer = model.output_layer
    if layer is not None:
        mode, layer.mode = layer.mode, "hidden"
    for start in range(0, len(order), at_once):
        numbers = order[start : start + at_once]
        results[numbers] = _scored(model, [requests[number] for number in numbers], micro_batch_size)
        advance(len(numbers))
    if layer is not None:
        layer.mode = mode
    return [(log_probability, greedy == 1) for log_probability, greedy in results.tolist()]


def _scored(model: Model, requests: Sequence[Continuation], micro_batch_size: int) -> Tensor:
    """fp64 [requests, 2] on every rank."""
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    multiple = model.layout.tensor_model_parallel_size if model.layout.sequence_parallel else 1
    length = -(-max(len(request.tokens) - 1 for request in requests) // multiple) * multiple
    samples = [_sample(request, length) for request in requests]
    samples += samples[-1:] * (-len(samples) % (size * micro_batch_size))
    mine = samples[rank::size]
    batches = [stack(mine[start : start + micro_batch_size]) for start in range(0, len(mine), micro_batch_size)]
    parts = forward_only(model, batches, len(batches), length, micro_batch_size, partial(_statistics, model))
    total = torch.zeros(len(samples), 2, dtype=torch.float64, device=current_device())
    if parts and parallel_state.get_tensor_model_parallel_rank() == 0:
        total[rank::size] = torch.cat(parts)
    distributed.all_reduce(total)  # every request was scored by one rank
    return total[: len(requests)]


def _sample(request: Continuation, length: int) -> dict[str, Any]:
    """Padding stands behind all that counts, where no token that counts sees it."""
    count = len(request.tokens) - 1
    padded = torch.zeros(length + 1, dtype=torch.int64)
    padded[: count + 1] = torch.tensor(request.tokens)
    weights = torch.zeros(length)
    weights[count - request.scored : count] = 1.0
    return {"tokens": padded[:-1], "labels": padded[1:], "token_weights": weights, "id": ""}


def _statistics(model: Model, states: Tensor, batch: Microbatch) -> Tensor:
    """Of the microbatch's continuations, fp64 [b, 2]; `states` [b, s(/tp), h], of which only theirs are projected."""
    weight = model.output_weight
    assert weight is not None, "only the last stage has states"
    if model.layout.sequence_parallel:
        states = gather_from_sequence_parallel_region(states.transpose(0, 1).contiguous()).transpose(0, 1)
    counted = batch["token_weights"] != 0  # [b, s]
    log_probability, greedy = label_statistics(
        states[counted],
        weight,
        batch["labels"][counted],
        vocab_size=model.architecture.vocab_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    rows = counted.nonzero()[:, 0]
    sums = torch.zeros(2, len(counted), dtype=torch.float64, device=states.device)
    sums[0].index_add_(0, rows, log_probability)
    sums[1].index_add_(0, rows, greedy.double())
    return torch.stack([sums[0], (sums[1] == counted.sum(1)).double()], dim=1)
