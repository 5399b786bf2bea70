"""Measuring models against one teacher on the same documents, on any layout.

The teacher runs once: its states after the final norm and its output weight are kept on the last pipeline stage, and
every model's logits are compared with the teacher's there, chunk by chunk, as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.data.sampler import Microbatch, stack
from minitron_nemo.errors import UserError
from minitron_nemo.kernels import token_statistics
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.models.forward import forward_only, generate
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.progress import track

PROMPTS = 3  # documents whose beginnings are continued
PROMPT_TOKENS = 16  # of each


@dataclass(frozen=True)
class Measured:
    """One model: sums over each document's tokens of weight * value, fp64 [documents], and what it generates.

    `continuations` are pairs of a prompt's token ids and those that follow, greedily; `tokens_per_second` is the speed
    of all of them.
    """

    architecture: Architecture
    ce: NDArray[np.float64]
    kl_to_teacher: NDArray[np.float64]  # KL(teacher || model)
    agreement: NDArray[np.float64]  # both models' most likely next token is the same
    weight: NDArray[np.float64]  # sum of token weights
    tokens_per_second: float | None = None  # None: not measured
    continuations: tuple[tuple[list[int], list[int]], ...] = ()


@dataclass(frozen=True)
class TeacherStates:
    """On the last stage: states per microbatch [s(/tp) * b, h] in host memory, and the output weight [padded/tp, h]."""

    states: Iterable[Tensor]
    output_weight: Tensor | None


def evaluate(
    models: Mapping[str, Path],
    documents: Sequence[Mapping[str, Any]],
    layout: Layout,
    *,
    dtype: torch.dtype,
    micro_batch_size: int = 1,
    generate_tokens: int = 0,
) -> dict[str, Measured]:
    """Measure the model directories in `models`, one of them named `teacher`, on `documents`. Collective.

    `documents` are samples of one length, {"tokens", "labels", "token_weights": [s], "id"}; they are spread over the
    data-parallel ranks. Every model is built in `dtype` on `layout`, one at a time. The beginnings of the first
    documents are continued by `generate_tokens` tokens, which also gives the speed of generation. All ranks get the
    same results. Raises UserError for a layout that does not fit, and for a model whose vocabulary is not the
    teacher's.
    """
    check_layout(layout, len(documents[0]["tokens"]))
    launch.initialize(layout, seed=0)  # nothing is random here
    batches = share(documents, micro_batch_size)
    prompts = [document["tokens"][:PROMPT_TOKENS].tolist() for document in documents[:PROMPTS]]
    teacher: TeacherStates | None = None
    vocab_size = 0
    results = {}
    for name in track(
        ["teacher", *(name for name in models if name != "teacher")], "evaluate", "models", shown=launch.rank() == 0
    ):
        model = _load(models[name], layout, dtype)
        if teacher is None:
            teacher, vocab_size = _run_teacher(model, batches), model.architecture.vocab_size
        if model.architecture.vocab_size != vocab_size:
            raise UserError(
                f"{models[name]}: vocab_size {model.architecture.vocab_size} is not the teacher's {vocab_size}"
            )
        ce, kl, agreement, weight = document_sums(model, teacher, batches, len(documents))
        speed, continuations = _generate(model, prompts, generate_tokens) if generate_tokens else (None, ())
        results[name] = Measured(model.architecture, ce, kl, agreement, weight, speed, continuations)
        del model
    return results


def check_layout(layout: Layout, sequence_length: int) -> None:
    """Raise UserError for a layout that documents of this length cannot be measured on."""
    if layout.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size: {layout.context_parallel_size} is not supported by evaluation; use 1"
        )
    if layout.sequence_parallel and sequence_length % layout.tensor_model_parallel_size:
        raise UserError(
            f"evaluate.sequence_length: {sequence_length} does not divide over "
            f"parallel.tensor_model_parallel_size {layout.tensor_model_parallel_size} with sequence_parallel"
        )


def _load(directory: Path, layout: Layout, dtype: torch.dtype) -> Model:
    model = build_model(Architecture.load(directory), layout, dtype=dtype)
    load_model(model, directory)
    return model


def share(documents: Sequence[Mapping[str, Any]], micro_batch_size: int) -> list[Microbatch]:
    """This data-parallel rank's documents, rank::size of the whole; copies of the last one fill the last microbatch."""
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    missing = -len(documents) % (size * micro_batch_size)
    mine = [dict(document) for document in [*documents, *[documents[-1]] * missing][rank::size]]
    return [stack(mine[start : start + micro_batch_size]) for start in range(0, len(mine), micro_batch_size)]


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


def _run_teacher(model: Model, batches: list[Microbatch]) -> TeacherStates:
    return TeacherStates(_run(model, batches, lambda states, batch: states.cpu()), model.output_weight)


def document_sums(
    model: Model, teacher: TeacherStates | None, batches: list[Microbatch], documents: int
) -> NDArray[np.float64]:
    """Sums of ce, KL, agreement and weight, fp64 [4, documents], on every rank. Collective.

    `batches` are what `share` gave of the `documents`. Without a teacher the model is compared with itself.
    """
    parts = _run(model, batches, partial(_compare, model, teacher, iter(teacher.states if teacher else ())))
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    total = torch.zeros(documents, 4, dtype=torch.float64, device=current_device())
    if parts and parallel_state.get_tensor_model_parallel_rank() == 0:
        mine = total[rank::size]
        mine += torch.cat(parts)[: len(mine)]
    # Every document is counted by one rank, so the sum over the whole job is a gather.
    torch.distributed.all_reduce(total)
    return np.asarray(total.T.cpu().numpy())


def _compare(
    model: Model, teacher: TeacherStates | None, teacher_states: Iterator[Tensor], states: Tensor, batch: Microbatch
) -> Tensor:
    """Sums of ce, KL, agreement and weight of the microbatch's documents, fp64 [b, 4]."""
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
    return torch.stack([torch.where(weights != 0, column * weights, 0.0).sum(0) for column in columns], dim=1)


def _generate(
    model: Model, prompts: list[list[int]], new_tokens: int
) -> tuple[float, tuple[tuple[list[int], list[int]], ...]]:
    """Tokens per second as rank 0 measured them, after one token that warms up, and the pairs of `Measured`."""
    generate(model, prompts[0], 1)
    seconds, continuations = 0.0, []
    for prompt in prompts:
        tokens, speed = generate(model, prompt, new_tokens)
        continuations.append((prompt, tokens))
        seconds += new_tokens / speed
    total = torch.tensor(seconds, dtype=torch.float64, device=current_device())
    torch.distributed.broadcast(total, src=0)
    return len(prompts) * new_tokens / float(total), tuple(continuations)
