"""Greedy generation with a cache of keys and values, many prompts at once, on any layout.

Prompts need not be of one length. The first pass reads as much of each as the shortest has; from there on every pass
reads one token of each row, its prompt's next one or what was predicted for it. So all rows stand at one position,
nothing is padded, and a row's tokens are those that it would get alone.

    shortest prompt   | a a a . . .        . predicted and kept
    longer one        | b b b b b . . .    the second pass reads its fourth token, whatever the first predicted
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, distributed

from minitron_nemo.models.build import Model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel.device import current_device

# What Megatron-core's modules read sequence parallelism from, beside their config.
SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Callable[[Sequence[int]], bool] = lambda tokens: False,
) -> list[list[int]]:
    """Continue prompts of token ids greedily; the new tokens of each, on every rank. Collective.

    A row ends after `max_new_tokens`, or where `ends(its new tokens)` is true, those tokens included. Collective over
    the ranks of one model: data-parallel ranks may have prompts of their own. The output layer must be left to give
    logits.
    """
    context = StaticInferenceContext(len(prompts), max(map(len, prompts)) + max_new_tokens)
    rows = [list(prompt) for prompt in prompts]
    done = [max_new_tokens == 0] * len(rows)
    position, ahead = 0, min(map(len, prompts))
    with _whole_sequences(model):
        while not all(done):
            block = [(row[position:] + [0] * ahead)[:ahead] for row in rows]  # 0: of a row that is done
            predicted = _next_tokens(model, block, context)
            position, ahead = position + ahead, 1
            context.sequence_len_offset = position
            for number, (row, prompt, token) in enumerate(zip(rows, prompts, predicted, strict=True)):
                if len(row) == position and not done[number]:
                    row.append(token)
                    new = row[len(prompt) :]
                    done[number] = len(new) == max_new_tokens or ends(new)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _next_tokens(model: Model, block: list[list[int]], context: StaticInferenceContext) -> list[int]:
    """Each row's likeliest token behind the block [b, s], whose keys and values are added to the context."""
    tokens = torch.tensor(block, device=current_device())
    positions = torch.arange(context.sequence_len_offset, context.sequence_len_offset + tokens.shape[1])
    batch = {"tokens": tokens, "position_ids": positions.to(tokens.device).expand_as(tokens)}

    def likeliest(logits: Tensor, _: Any) -> Tensor:
        return logits[:, -1, : model.architecture.vocab_size].argmax(-1)  # [b]

    results = forward_only(
        model,
        [batch],
        1,
        tokens.shape[1],
        tokens.shape[0],
        likeliest,
        inference_context=context,
        runtime_gather_output=True,
    )
    chosen = results[0] if results else tokens.new_zeros(tokens.shape[0])
    distributed.broadcast(
        chosen,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    found: list[int] = chosen.tolist()
    return found


@contextmanager
def _whole_sequences(model: Model) -> Iterator[None]:
    """Without sequence parallelism: a single token does not split. The weights are the same with it and without.

    Not Megatron-core's `set_model_to_sequence_parallel`, which remembers modules by their address in memory and so
    takes a model for one that was freed before.
    """
    parts = [part for module in model.modules for part in module.modules()]
    configs = {id(part.config): part.config for part in parts if hasattr(part, "config")}  # some have copies
    changed: list[tuple[Any, str]] = []
    for owner in (*configs.values(), *parts):
        changed += [(owner, name) for name in SEQUENCE_PARALLEL if getattr(owner, name, None) is True]
    for owner, name in changed:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in changed:
            setattr(owner, name, True)
