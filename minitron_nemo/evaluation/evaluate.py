"""Measuring models against one of them on the same documents, one at a time, on any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.documents import Sums, TeacherStates, check_layout, document_sums, run_teacher, share
from minitron_nemo.evaluation.generation import Continuations, Speed, continuations, measure_speed
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.progress import track

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Measured(Sums):
    """One model: its sums, and what and how fast it generates, where that was asked for."""

    architecture: Architecture
    speeds: tuple[Speed, ...] = ()
    continuations: Continuations = ()


def evaluate(
    models: Mapping[str, Path],
    documents: Sequence[Mapping[str, Any]],
    layout: Layout,
    *,
    dtype: torch.dtype,
    micro_batch_size: int = 1,
    generate_tokens: int = 0,
    generate_prompt_tokens: int = 16,
    generate_batch_sizes: Sequence[int] = (1,),
    teacher: str = "teacher",
) -> dict[str, Measured]:
    """Measure the model directories in `models`, the one named `teacher` first, on `documents`. Collective.

    `documents` are samples of one length, {"tokens", "labels", "token_weights": [s], "id"}; they are spread over the
    data-parallel ranks. Every model is built in `dtype` on `layout`, one at a time, and compared with the teacher. The
    beginnings of documents are continued by `generate_tokens` tokens: some to be read, batches of prompts of
    `generate_prompt_tokens` tokens to measure the speed.
    All ranks get the same results. Raises UserError for a layout that does not fit, and for a model whose vocabulary is
    not the teacher's.
    """
    check_layout(layout, len(documents[0]["tokens"]))
    launch.initialize(layout, seed=0)  # nothing is random here
    batches = share(documents, micro_batch_size)
    states: TeacherStates | None = None
    vocab_size = 0
    results = {}
    order = [teacher, *(name for name in models if name != teacher)]
    for name in track(order, "evaluate", "models", shown=launch.rank() == 0):
        model = open_model(models[name], layout, dtype)
        if states is None:
            states, vocab_size = run_teacher(model, batches), model.architecture.vocab_size
        if model.architecture.vocab_size != vocab_size:
            raise UserError(
                f"{models[name]}: vocab_size {model.architecture.vocab_size} is not the teacher's {vocab_size}"
            )
        sums = document_sums(model, states, batches, len(documents))
        read: Continuations = ()
        speeds: tuple[Speed, ...] = ()
        if generate_tokens:
            read = continuations(model, documents, generate_tokens)
            speeds = measure_speed(model, documents, generate_prompt_tokens, generate_tokens, generate_batch_sizes)
        results[name] = Measured(**vars(sums), architecture=model.architecture, speeds=speeds, continuations=read)
        del model
    return results


def open_model(directory: Path, layout: Layout, dtype: torch.dtype) -> Model:
    """The model of a checkpoint, built and loaded. Collective. Raises UserError where it does not fit the layout."""
    model = build_model(Architecture.load(directory), layout, dtype=dtype)
    load_model(model, directory)
    return model
