"""Running a model without training it: microbatches through the pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minitron_nemo.models.build import Model
from minitron_nemo.parallel import launch

Microbatch = dict[str, Any]
Item = tuple[Microbatch, bool]  # the microbatch, and whether it only fills the schedule


def forward_only(
    model: Model,
    batches: Iterable[Microbatch],
    num_microbatches: int,
    sequence_length: int,
    micro_batch_size: int,
    collect: Callable[[Tensor, Microbatch], Any],
    **arguments: Any,
) -> list[Any]:
    """Run `num_microbatches` of `batches` through the model without gradients. Collective.

    Every rank passes its data-parallel share; all microbatches are [micro_batch_size, sequence_length]. On the last
    pipeline stage, `collect(output, microbatch)` is called per microbatch with the model's output (see `OutputLayer`)
    and its results are returned in order; the other stages return an empty list. An interleaved schedule is filled up
    with copies of the last microbatch whose `token_weights` are 0: forward hooks see them, `collect` does not.
    `arguments` are further ones of GPTModel.forward.
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
                forward_step_func=partial(_forward_step, collect, arguments),
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
    collect: Callable[[Tensor, Microbatch], Any], arguments: dict[str, Any], items: Iterator[Item], chunk: Any
) -> tuple[Tensor, Callable[..., Any]]:
    microbatch, fills = next(items)
    output = chunk(microbatch["tokens"], microbatch["position_ids"], None, **arguments)

    def result(output: Tensor, non_loss_data: bool) -> Any:
        return None if fills else collect(output, microbatch)

    return output, result
