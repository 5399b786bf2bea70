"""What a model generates, how fast, and in how much memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from minitron_nemo.models.build import Model
from minitron_nemo.models.generation import generate
from minitron_nemo.parallel.device import current_device, peak_memory, reset_peak_memory

SAMPLES = 3  # documents whose beginnings are continued, to be read
SAMPLE_TOKENS = 16  # of each

Continuations = tuple[tuple[list[int], list[int]], ...]  # a prompt's token ids, and those that follow


@dataclass(frozen=True)
class Speed:
    """Of `batch_size` rows at once: new tokens of all of them per second, their prompts' pass included.

    `peak_memory_bytes` are of the rank that took most (see `device.peak_memory`).
    """

    batch_size: int
    tokens_per_second: float
    peak_memory_bytes: int


def continuations(model: Model, documents: Sequence[Mapping[str, Any]], new_tokens: int) -> Continuations:
    """The beginnings of the first documents, continued greedily. Collective."""
    prompts = [document["tokens"][:SAMPLE_TOKENS].tolist() for document in documents[:SAMPLES]]
    return tuple(zip(prompts, generate(model, prompts, new_tokens), strict=True))


def measure_speed(
    model: Model,
    documents: Sequence[Mapping[str, Any]],
    prompt_tokens: int,
    new_tokens: int,
    batch_sizes: Sequence[int],
) -> tuple[Speed, ...]:
    """For each size of the batch, as rank 0 measures it; every rank gets the same. Collective.

    The model should have generated before. Rows begin like the documents, again from the first where they run out; so
    does a row that is longer than its document.
    """
    speeds = []
    for size in batch_sizes:
        rows = islice(cycle(documents), size)
        prompts = [list(islice(cycle(row["tokens"].tolist()), prompt_tokens)) for row in rows]
        reset_peak_memory()
        start = time.perf_counter()
        generate(model, prompts, new_tokens)
        measured = torch.tensor(
            [size * new_tokens / (time.perf_counter() - start), peak_memory()],
            dtype=torch.float64,
            device=current_device(),
        )
        torch.distributed.broadcast(measured[:1], src=0)
        torch.distributed.all_reduce(measured[1:], op=torch.distributed.ReduceOp.MAX)
        speeds.append(Speed(size, float(measured[0]), int(measured[1])))
    return tuple(speeds)
