"""Running a model without training it: microbatches through the pipeline, and greedy generation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minitron_nemo.models.build import Model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device

Microbatch = dict[str, Any]
Item = tuple[Microbatch, bool]  # the microbatch, and whether it only fills the schedule


def forward_only(
    model: Model,
    batches: Iterable[Microbatch],
    num_microbatches: int,
    sequence_length: int,
    micro_batch_size: int,
    collect: Callable[[Tensor, Microbatch], Any],
) -> list[Any]:
    """Run `num_microbatches` of `batches` through the model without gradients. Collective.

    Every rank passes its data-parallel share; all microbatches are [micro_batch_size, sequence_length]. On the last
    pipeline stage, `collect(output, microbatch)` is called per microbatch with the model's output (see `OutputLayer`)
    and its results are returned in order; the other stages return an empty list. An interleaved schedule is filled up
    with copies of the last microbatch whose `token_weights` are 0: forward hooks see them, `collect` does not.
    """
    modes = [chunk.training for chunk in model.chunks]
    chunks = [chunk.eval() for chunk in model.chunks]
    scheduled = num_microbatches
    if len(chunks) > 1:
        stages = model.layout.pipeline_model_parallel_size
        scheduled = -(-num_microbatches // stages) * stages
    items = _filled(batches, num_microbatches, scheduled)
    iterators = list(itertools.tee(items, len(chunks)))
    try:
        with torch.no_grad(), launch.virtual_stages(model.layout):
            results = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, collect),
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=scheduled,
                seq_length=sequence_length,
                micro_batch_size=micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
    finally:
        for chunk, training in zip(chunks, modes, strict=True):
            chunk.train(training)
    return results[:num_microbatches]


def _filled(batches: Iterable[Microbatch], count: int, scheduled: int) -> Iterator[Item]:
    for batch in itertools.islice(batches, count):
        yield batch, False
    filler = batch | {"token_weights": torch.zeros_like(batch["tokens"], dtype=torch.float32)}
    for _ in range(scheduled - count):
        yield filler, True


def _forward_step(
    collect: Callable[[Tensor, Microbatch], Any], items: Iterator[Item], chunk: Any
) -> tuple[Tensor, Callable[..., Any]]:
    microbatch, fills = next(items)
    output = chunk(microbatch["tokens"], microbatch["position_ids"], None)

    def result(output: Tensor, non_loss_data: bool) -> Any:
        return None if fills else collect(output, microbatch)

    return output, result


def generate(model: Model, prompt_ids: list[int], max_new_tokens: int) -> tuple[list[int], float]:
    """Continue a prompt greedily; returns the new token ids, on every rank, and tokens per second. Collective.

    The output layer must be left to give logits. Every token costs a forward pass over the whole sequence: there is
    no cache of keys and values.
    """
    tokens = list(prompt_ids)
    start = time.perf_counter()
    for _ in range(max_new_tokens):
        tokens.append(_next_token(model, tokens))
    return tokens[len(prompt_ids) :], max_new_tokens / (time.perf_counter() - start)


def _next_token(model: Model, tokens: list[int]) -> int:
    # Sequence parallelism splits the sequence evenly; what follows the last token cannot be seen from it.
    tp = model.layout.tensor_model_parallel_size
    padded = torch.tensor([tokens + [0] * (-len(tokens) % tp)], device=current_device())  # [1, s]
    batch = {"tokens": padded, "position_ids": torch.arange(padded.shape[1], device=padded.device)[None]}
    results = forward_only(
        model, [batch], 1, padded.shape[1], 1, lambda logits, _: _argmax(logits[0, len(tokens) - 1], model)
    )
    chosen = results[0] if results else torch.zeros((), dtype=torch.int64, device=padded.device)
    torch.distributed.broadcast(
        chosen,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return int(chosen)


def _argmax(logits: Tensor, model: Model) -> Tensor:
    """Token of the largest logit; `logits` [padded_vocab/tp] are gathered over the tensor-parallel group."""
    parts = [torch.empty_like(logits) for _ in range(model.layout.tensor_model_parallel_size)]
    torch.distributed.all_gather(parts, logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts)[: model.architecture.vocab_size].argmax()
