"""A task, whatever it is made of, and what is recorded of a model on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from minitron_nemo.models.build import Model
from minitron_nemo.parallel import launch

# {"questions": int, "metrics": {name: {"value": float, "se": float | None}}, "by_question": {name: [float]}}
Record = dict[str, Any]


class Task(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is measured."""

    def measure(self, model: Model, directory: Path, micro_batch_size: int) -> Record:
        """Of a loaded model, whose tokenizer is in the checkpoint `directory`. Collective; the same on every rank."""


def record_of(
    questions: int, metrics: Mapping[str, tuple[float, float | None]], by_question: Mapping[str, Sequence[float]]
) -> Record:
    """`metrics` are values with their standard errors; `by_question` has those that are means over the questions."""
    return {
        "questions": questions,
        "metrics": {name: {"value": value, "se": error} for name, (value, error) in metrics.items()},
        "by_question": {name: [float(value) for value in values] for name, values in by_question.items()},
    }


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over requests on rank 0's standard error; call what it gives with how many are done."""
    with tqdm(total=total, desc=label, unit="request", disable=launch.rank() != 0, mininterval=1.0) as bar:
        yield bar.update
