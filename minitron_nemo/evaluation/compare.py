"""`minitron compare`: any number of models side by side, on the same held-out documents.

Out of evaluation.json files, which hold every document's loss, or measured now. Differences are paired: by document,
and on tasks by question, so that what models have in common does not count as uncertainty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.tokenizer import directory_of
from minitron_nemo.config import Recipe
from minitron_nemo.data.dataset import open_heldout
from minitron_nemo.data.prepared import load_prepared
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation import tasks
from minitron_nemo.evaluation.documents import fingerprint_of
from minitron_nemo.evaluation.evaluate import DTYPES, evaluate
from minitron_nemo.evaluation.markdown import aligned, with_error
from minitron_nemo.evaluation.report import Evaluation, mean_with_error, read_evaluation, summarise
from minitron_nemo.parallel.layout import Layout

EVALUATION = "evaluation.json"
COLUMNS = ("parameters", "loss", "loss_se", "perplexity", "kl_to_teacher", "kl_to_teacher_se", "top1_agreement")


def recorded(paths: Sequence[Path]) -> Evaluation:
    """What run directories, or evaluation.json files, say of their models, by RUN/MODEL; with what tasks.json says.

    Raises UserError for what is not there.
    """
    found: Evaluation = {}
    for path in paths:
        file = path if path.is_file() else path / EVALUATION
        if not file.is_file():
            raise UserError(
                f"{path}: no {EVALUATION} in it; to measure checkpoints, give the documents by --data RECIPE, or a "
                "directory of prepared data"
            )
        on_tasks = tasks.read_tasks(file.parent / tasks.FILE_NAME)
        for name, record in read_evaluation(file).items():
            found[str(file.parent / name)] = {**record, "tasks": on_tasks.get(name, {"tasks": {}})["tasks"]}
    return found


def measured(models: Mapping[str, Path], prepared: Path, recipe: Recipe, layout: Layout, against: str) -> Evaluation:
    """Measure checkpoints on the held-out documents of `prepared`, KL and agreement to the one named `against`.

    Collective; every rank gets the same. Raises UserError for models whose tokens are not those of the data, and for
    documents longer than one of them was trained on.
    """
    expected = load_prepared(prepared).tokenizer
    for name, directory in models.items():
        if load_tokenizer(directory_of(directory)).fingerprint != expected:
            raise UserError(f"{name}: its tokenizer is not the one that {prepared} was prepared with; compare others")
    config, data = recipe.evaluate, recipe.data
    length = config.sequence_length or data.sequence_length
    longest = {name: Architecture.load(directory).max_position_embeddings for name, directory in models.items()}
    shortest = min(longest, key=longest.__getitem__)
    if not 0 < length <= longest[shortest]:
        raise UserError(
            f"evaluate.sequence_length: {length} is not within the {longest[shortest]} positions of {shortest}; give "
            f"evaluate.sequence_length={longest[shortest]} or less"
        )
    documents = open_heldout(prepared, length, config.documents, data.separator_weight)
    found = summarise(
        evaluate(
            models,
            documents,
            layout,
            dtype=DTYPES[recipe.train.precision],
            micro_batch_size=config.micro_batch_size,
            teacher=against,
        )
    )
    content = fingerprint_of(documents)
    return {name: {**found[name], "documents": content, "tasks": {}} for name in models}


def compared(evaluation: Mapping[str, Mapping[str, Any]], against: str) -> dict[str, Any]:
    """Each model's figures, and what it loses against `against`: {"against", "documents", "models": {name: ...}}.

    Raises UserError for what cannot be paired.
    """
    other = evaluation[against]
    models = {}
    for name, record in evaluation.items():
        if not all({"documents", "losses_per_document"} <= each.keys() for each in (record, other)):
            raise UserError(
                f"{name}: its {EVALUATION} does not say on what it was measured; run `minitron evaluate` again"
            )
        if record["documents"] != other["documents"]:
            raise UserError(
                f"{name}: measured on other documents than {against}, or on other tokens of them; give --data to "
                "measure both on the same"
            )
        difference = np.subtract(record["losses_per_document"], other["losses_per_document"])
        delta, error = mean_with_error(difference)
        models[name] = {
            **{key: record[key] for key in COLUMNS},
            "delta": delta,
            "delta_se": error,
            "tasks": {task: _on_task(name, task, record, other) for task in record["tasks"]},
        }
    return {"against": against, "documents": other["documents"], "models": models}


def _on_task(name: str, task: str, record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Of each metric: value, se, and delta and delta_se where both models have it for every question."""
    mine, theirs = record["tasks"][task], other["tasks"].get(task)
    if theirs is not None and theirs["fingerprint"] != mine["fingerprint"]:
        raise UserError(
            f"{name}: task {task} is not the one that the others were measured on; run `minitron tasks` again"
        )
    found = {metric: dict(value) for metric, value in mine["metrics"].items()}
    for metric, values in mine["by_question"].items():
        if theirs is not None and metric in theirs["by_question"]:
            delta, error = mean_with_error(np.subtract(values, theirs["by_question"][metric]))
            found[metric] |= {"delta": delta, "delta_se": error}
    return found


def table(comparison: Mapping[str, Any]) -> str:
    """As markdown, a row for each model."""
    models = comparison["models"]
    measured_tasks = {
        (task, metric): None for model in models.values() for task, found in model["tasks"].items() for metric in found
    }
    head = ["", "parameters", "loss", "difference", "KL", "top-1 agreement", *map(", ".join, measured_tasks)]
    rows = [head]
    for name, model in models.items():
        found = [model["tasks"].get(task, {}).get(metric) for task, metric in measured_tasks]
        rows.append(
            [
                name,
                f"{model['parameters'] / 1e6:.1f} M",
                with_error(model["loss"], model["loss_se"]),
                "" if name == comparison["against"] else with_error(model["delta"], model["delta_se"], "+"),
                f"{model['kl_to_teacher']:.4f}",
                f"{100 * model['top1_agreement']:.1f} %",
                *("" if value is None else _cell(value, name == comparison["against"]) for value in found),
            ]
        )
    return aligned(rows)


def _cell(value: Mapping[str, Any], alone: bool) -> str:
    text = with_error(value["value"], value["se"])
    if alone or "delta" not in value:
        return text
    return f"{text} ({with_error(value['delta'], value['delta_se'], '+')})"
