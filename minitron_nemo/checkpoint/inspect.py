"""What a checkpoint is: family, shape, parameters, format, how it was written; the statistics of one tensor."""

from __future__ import annotations

from dataclasses import asdict
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.arch.counts import active_parameters, non_embedding_parameters, parameters
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.checkpoint.source import Source, open_source, shapes
from minitron_nemo.errors import UserError

BLOCK_VALUES = 1 << 21


def describe(path: Path, tensor: str | None = None) -> dict[str, Any]:
    """The facts, for machines; with a canonical `tensor` name its shape, data type and statistics too. UserError."""
    source = open_source(Path(path))
    architecture = source.architecture
    facts: dict[str, Any] = {
        "path": str(source.path),
        "format": source.format,
        "layout": source.layout(),
        "dtype": ", ".join(sorted({_dtype(source, name) for name in shapes(architecture)})),
        "tensors": sum(1 for _ in tensors(architecture)),
        "parameters": parameters(architecture),
        "non_embedding_parameters": non_embedding_parameters(architecture),
        "active_parameters": active_parameters(architecture),
        "tokenizer_size": source.tokenizer_size(),
        "architecture": asdict(architecture),
    }
    if tensor is not None:
        facts["tensor"] = tensor_statistics(source, tensor)
    return facts


def inspect(path: Path, tensor: str | None = None) -> str:
    """`describe` as lines of text for a person."""
    facts = describe(path, tensor)
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {_shown(entry)}" for name, entry in value.items())]
        else:
            lines.append(f"{key}: {_shown(value)}")
    return "\n".join(lines)


def tensor_statistics(source: Source, name: str) -> dict[str, Any]:
    """Minimum, maximum, mean, standard deviation (of the population) and number of NaNs of a canonical tensor.

    Sums are float64 and run over blocks, so memory does not grow with the tensor; NaNs are left out of the others.
    Raises UserError for a name the architecture does not have.
    """
    known = shapes(source.architecture)
    if name not in known:
        raise UserError(f"{source.path}: no tensor {name!r}; one is e.g. {next(iter(known))}")
    shape = known[name]
    step = max(1, BLOCK_VALUES // prod(shape[1:]))
    count, nans, total, squares = 0, 0, 0.0, 0.0
    low, high = float("inf"), float("-inf")
    for start in range(0, shape[0], step):
        block = source.read(name, start, min(start + step, shape[0])).double()
        values = block[~block.isnan()]
        nans += block.numel() - values.numel()
        if values.numel():
            count += values.numel()
            total += values.sum().item()
            squares += torch.linalg.vector_norm(values).item() ** 2
            low, high = min(low, values.min().item()), max(high, values.max().item())
    mean = total / count if count else float("nan")
    deviation = sqrt(max(0.0, squares / count - mean**2)) if count else float("nan")
    facts = {"name": name, "shape": list(shape), "dtype": _dtype(source, name)}
    return facts | {"min": low, "max": high, "mean": mean, "std": deviation, "nan_count": nans}


def _dtype(source: Source, name: str) -> str:
    return str(source.dtype(name)).removeprefix("torch.")


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
