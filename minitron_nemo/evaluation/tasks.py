"""`minitron tasks`: models on tasks, one model at a time -> tasks.json.

    {"schema_version": 1, "models": {NAME: {"fingerprint", "precision", "tasks": {TASK: {"fingerprint", Record}}}}}

A .jsonl file is a task of our own (`data.choices`); anything else is one of lm-evaluation-harness. The file is written
after every model and task, and what it holds of the same model (weights, architecture and tokenizer), precision and
task is not measured again. In it, null stands for what is not finite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.checkpoint.files import read_json, to_json, write_atomic
from minitron_nemo.checkpoint.fingerprint import checkpoint_identity
from minitron_nemo.checkpoint.tokenizer import directory_of
from minitron_nemo.data.choices import TOKENS_VERSION, Choices, choice_samples, read_questions
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.documents import check_layout
from minitron_nemo.evaluation.evaluate import DTYPES, open_model
from minitron_nemo.evaluation.markdown import aligned, with_error
from minitron_nemo.evaluation.scoring import Continuation, log_likelihoods
from minitron_nemo.evaluation.task import Record, Task, progress, record_of
from minitron_nemo.models.build import Model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout

FILE_NAME = "tasks.json"
SCHEMA_VERSION = 1

Content = dict[str, dict[str, Any]]  # "models" of the file


@dataclass(frozen=True)
class ChoiceTask:
    """Multiple-choice questions of a .jsonl file: `acc`, and `acc_norm` by log-probability per character."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{TOKENS_VERSION}\n".encode() + self.path.read_bytes()).hexdigest()

    def measure(self, model: Model, directory: Path, micro_batch_size: int) -> Record:
        """Collective; every rank gets the same. Raises UserError for a question that the model cannot take."""
        questions = read_questions(self.path)
        tokenizer = load_tokenizer(directory_of(directory))
        samples = choice_samples(questions, tokenizer, model.architecture.max_position_embeddings)
        requests = [
            Continuation((*sample["tokens"].tolist(), int(sample["labels"][-1])), int(sample["token_weights"].sum()))
            for sample in samples
        ]
        with progress(self.name, len(requests)) as advance:
            found = log_likelihoods(model, requests, micro_batch_size, advance)
        choices, values = Choices.of(questions), np.array([value for value, _ in found])
        right = {name: choices.right(values, normalize) for name, normalize in (("acc", False), ("acc_norm", True))}
        metrics = {name: (float(answers.mean()), _error(answers)) for name, answers in right.items()}
        return record_of(len(questions), metrics, {name: answers.tolist() for name, answers in right.items()})


def check_tasks(specs: Sequence[str]) -> None:
    """What can be said without a model and lm_eval. Raises UserError for a file that is not there, one that is no task,
    two .jsonl files of one name, and a task of lm_eval without it.
    """
    for spec in specs:
        if spec.endswith((".jsonl", ".yaml", ".yml")) and not Path(spec).is_file():
            raise UserError(f"evaluate.tasks: {spec}: no such file")
        if spec.endswith(".jsonl"):
            try:
                read_questions(Path(spec))
            except UserError as error:
                raise UserError(f"evaluate.tasks: {error}") from None
        elif find_spec("lm_eval") is None:
            raise UserError(
                f"evaluate.tasks: {spec} is a task of lm-evaluation-harness, which is not installed; "
                "pip install '.[eval]' in the clone, or give a .jsonl file"
            )
    _check_names([ChoiceTask(Path(spec)).name for spec in specs if spec.endswith(".jsonl")])


def open_tasks(specs: Sequence[str]) -> list[Task]:
    """Raises UserError for what is not there, what is no task, and two of one name."""
    check_tasks(specs)
    tasks: list[Task] = []
    for spec in specs:
        if spec.endswith(".jsonl"):
            tasks.append(ChoiceTask(Path(spec)))
        else:
            from minitron_nemo.evaluation.harness import open_harness_tasks

            tasks += open_harness_tasks(spec)
    _check_names([task.name for task in tasks])
    return tasks


def _check_names(names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"evaluate.tasks: two of them are called {twice[0]}; rename one")


def measure_tasks(
    models: Mapping[str, Path],
    specs: Sequence[str],
    layout: Layout,
    path: Path,
    *,
    precision: str,
    micro_batch_size: int = 1,
) -> Content:
    """Measure the model directories on every task that `path` does not hold yet, and write it there. Collective.

    Every rank gets the same. Raises UserError for what does not fit together.
    """
    check_layout(layout, layout.tensor_model_parallel_size)  # a length that divides: requests are padded to one

    def prepare() -> None:  # one rank says what is wrong, and fetches what all read
        open_tasks(specs)

    launch.from_rank_0(prepare)
    tasks = open_tasks(specs)
    content = launch.from_rank_0(partial(_identified, models, precision, path))
    launch.initialize(layout, seed=0)  # nothing is random here
    for name, directory in models.items():
        known = content[name]["tasks"]
        missing = [task for task in tasks if known.get(task.name, {}).get("fingerprint") != task.fingerprint]
        for task, record in _measured(name, directory, missing, layout, precision, micro_batch_size):
            known[task.name] = {"fingerprint": task.fingerprint, **record}
            launch.from_rank_0(partial(_write, path, content))
    wanted = {task.name for task in tasks}
    for model_record in content.values():
        model_record["tasks"] = {name: record for name, record in model_record["tasks"].items() if name in wanted}
    launch.from_rank_0(partial(_write, path, content))
    return content


def _measured(
    name: str, directory: Path, tasks: Sequence[Task], layout: Layout, precision: str, micro_batch_size: int
) -> Iterator[tuple[Task, Record]]:
    """One model, gone again when it is done with its tasks."""
    if not tasks:
        return
    model = open_model(directory, layout, DTYPES[precision])
    for task in tasks:
        if launch.rank() == 0:
            print(f"[tasks] {name}: {task.name}", flush=True)
        yield task, task.measure(model, directory, micro_batch_size)


def read_tasks(path: Path) -> Content:
    """What a tasks.json holds, by model, with NaN for the null of a value; nothing where there is none.

    Raises UserError for a damaged one.
    """
    if not path.exists():
        return {}
    content = read_json(path, "remove it")
    models, version = content.get("models"), content.get("schema_version")
    if not isinstance(models, dict):
        raise UserError(f"{path}: not a file of measured tasks; remove it")
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {version} is not {SCHEMA_VERSION}; remove it")
    try:
        return {name: {**model, "tasks": _with_numbers(model["tasks"])} for name, model in models.items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a file of measured tasks ({error}); remove it") from None


def _with_numbers(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A model's records by task, with NaN for the null of a value."""
    return {
        task: {
            **record,
            "metrics": {name: {**each, "value": _number(each["value"])} for name, each in record["metrics"].items()},
            "by_question": {name: list(map(_number, values)) for name, values in record["by_question"].items()},
        }
        for task, record in stored.items()
    }


def _number(stored: float | None) -> float:
    return nan if stored is None else stored


def table(content: Mapping[str, Mapping[str, Any]]) -> str:
    """As markdown: a row for each metric of each task, a column for each model, with standard errors."""
    rows = {
        (task, metric): record["questions"]
        for model in content.values()
        for task, record in model["tasks"].items()
        for metric in record["metrics"]
    }
    lines = [("task", "metric", "questions", *content)]
    for (task, metric), questions in rows.items():
        found = [model["tasks"].get(task, {"metrics": {}})["metrics"].get(metric) for model in content.values()]
        cells = ("" if each is None else with_error(each["value"], each["se"]) for each in found)
        lines.append((task, metric, str(questions), *cells))
    return aligned(lines)


def _identified(models: Mapping[str, Path], precision: str, path: Path) -> Content:
    """What `path` holds of these models in this precision; nothing of others."""
    before = read_tasks(path)
    content: Content = {}
    for name, directory in models.items():
        identity = {"fingerprint": checkpoint_identity(directory), "precision": precision}
        same = [model for model in before.values() if identity.items() <= model.items()]
        content[name] = {**identity, "tasks": same[0]["tasks"] if same else {}}
    return content


def _write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_json({"schema_version": SCHEMA_VERSION, "models": content}) + "\n")


def _error(values: NDArray[np.bool_]) -> float | None:
    """Standard error of the mean."""
    return float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else None
