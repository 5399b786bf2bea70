"""Sums over the tokens of held-out documents, of a model beside its teacher, on any layout.

The teacher runs once: its states after the final norm and its output weight are kept on the last pipeline stage, and
every model's logits are compared with the teacher's there, chunk by chunk, as in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from minitron_nemo.data.sampler import Microbatch, stack
from minitron_nemo.errors import UserError
from minitron_nemo.kernels import token_statistics
from minitron_nemo.models.build import Model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout


@dataclass(frozen=True)
class Sums:
    """Over each document's tokens, of weight * value, fp64 [documents]; by position, [buckets, documents].

    Bucket i holds the tokens at `edges[i]` up to, without it, `edges[i + 1]`, counted from 0 at the document separator.
    """

    ce: NDArray[np.float64]
    kl_to_teacher: NDArray[np.float64]  # KL(teacher || model)
    agreement: NDArray[np.float64]  # both models' most likely next token is the same
    weight: NDArray[np.float64]  # sum of token weights
    edges: tuple[int, ...]
    kl_by_position: NDArray[np.float64]
    weight_by_position: NDArray[np.float64]


@dataclass(frozen=True)
class TeacherStates:
    """On the last stage: states per microbatch [s(/tp) * b, h] in host memory, and the output weight [padded/tp, h]."""

    states: Iterable[Tensor]
    output_weight: Tensor | None


def check_layout(layout: Layout, sequence_length: int, compared: bool = False) -> None:
    """Raise UserError for a layout that documents of this length cannot be measured on.

    `compared`: in a validation, beside a teacher on the same ranks.
    """
    if layout.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size: {layout.context_parallel_size} is not supported by evaluation; use 1"
        )
    check_length(layout, sequence_length, compared)


def check_length(layout: Layout, sequence_length: int, compared: bool) -> None:
    """The part of `check_layout` about the length. A colocated teacher's states are split on every layout."""
    tp = layout.tensor_model_parallel_size
    if (layout.sequence_parallel or compared) and sequence_length % tp:
        raise UserError(
            f"evaluate.sequence_length: {sequence_length} is not a multiple of parallel.tensor_model_parallel_size "
            f"{tp}, over which hidden states are split; change one of them"
        )


def fingerprint_of(documents: Sequence[Mapping[str, Any]]) -> str:
    """Hash of all tokens and weights: models that were measured on the same can be compared document by document."""
    content = [(document["id"], document["token_weights"].tolist()) for document in documents]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def share(documents: Sequence[Mapping[str, Any]], micro_batch_size: int) -> list[Microbatch]:
    """This data-parallel rank's documents, rank::size of the whole; copies of the last one fill the last microbatch."""
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    missing = -len(documents) % (size * micro_batch_size)
    mine = [dict(document) for document in [*documents, *[documents[-1]] * missing][rank::size]]
    return [stack(mine[start : start + micro_batch_size]) for start in range(0, len(mine), micro_batch_size)]


def run_teacher(model: Model, batches: list[Microbatch]) -> TeacherStates:
    """What `document_sums` compares models with. Collective."""
    return TeacherStates(_run(model, batches, lambda states, batch: states.cpu()), model.output_weight)


def document_sums(model: Model, teacher: TeacherStates | None, batches: list[Microbatch], documents: int) -> Sums:
    """The same on every rank. Collective.

    `batches` are what `share` gave of the `documents`. Without a teacher the model is compared with itself.
    """
    edges = bucket_edges(batches[0]["tokens"].shape[1])
    parts = _run(model, batches, partial(_compare, model, teacher, iter(teacher.states if teacher else ()), edges))
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    buckets = len(edges) - 1
    total = torch.zeros(documents, 4 + 2 * buckets, dtype=torch.float64, device=current_device())
    if parts and parallel_state.get_tensor_model_parallel_rank() == 0:
        mine = total[rank::size]
        mine += torch.cat(parts)[: len(mine)]
    # Every document is counted by one rank, so the sum over the whole job is a gather.
    torch.distributed.all_reduce(total)
    ce, kl, agreement, weight, *by_position = total.T.cpu().numpy()
    kl_by_position, weight_by_position = np.stack(by_position).reshape(2, buckets, documents)
    return Sums(ce, kl, agreement, weight, edges, kl_by_position, weight_by_position)


def bucket_edges(sequence_length: int) -> tuple[int, ...]:
    """0, 1, 2, 4, 8, ... and the length."""
    edges = [0]
    while (edge := max(1, 2 * edges[-1])) < sequence_length:
        edges.append(edge)
    return (*edges, sequence_length)


def _run(model: Model, batches: list[Microbatch], collect: Any) -> list[Any]:
    """`collect(states [s(/tp) * b, h], microbatch)` of every microbatch, on the last stage.

    The output layer is left as it was found: the model may be in training.
    """
    layer = model.output_layer
    if layer is not None:
        found = layer.mode, layer.head
        layer.mode, layer.head = "hidden", None
    micro_batch_size, sequence_length = batches[0]["tokens"].shape
    results = forward_only(
        model,
        batches,
        len(batches),
        sequence_length,
        micro_batch_size,
        lambda output, batch: collect(output.transpose(0, 1).flatten(0, 1), batch),  # [b, s(/tp), h] -> s outermost
    )
    if layer is not None:
        layer.mode, layer.head = found
    return results


def _compare(
    model: Model,
    teacher: TeacherStates | None,
    teacher_states: Iterator[Tensor],
    edges: tuple[int, ...],
    states: Tensor,
    batch: Microbatch,
) -> Tensor:
    """Of the microbatch's documents: ce, KL, agreement, weight, then KL and weight of each bucket, fp64 [b, 4 + 2n]."""
    weight = model.output_weight
    teacher_weight = teacher.output_weight if teacher else weight
    assert weight is not None and teacher_weight is not None, "only the last stage has states"
    statistics = token_statistics(
        states,
        weight,
        next(teacher_states).to(states.device) if teacher else states,
        teacher_weight,
        batch["labels"].t().reshape(-1),
        vocab_size=model.architecture.vocab_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        sequence_parallel=model.layout.sequence_parallel,
    )
    weights = batch["token_weights"].t().double()  # [s, b]
    columns = [*(column.view(weights.shape).double() for column in statistics), torch.ones_like(weights)]
    ce, kl, agreement, ones = (torch.where(weights != 0, column * weights, 0.0) for column in columns)
    buckets = list(zip(edges, edges[1:], strict=False))
    by_position = [column[start:stop].sum(0) for column in (kl, ones) for start, stop in buckets]
    return torch.stack([*(column.sum(0) for column in (ce, kl, agreement, ones)), *by_position], dim=1)
