"""From measurements to evaluation.json and to the table people read.

A document's loss is the weighted mean over its tokens; a model's loss is the mean over documents, so that long
documents do not outvote short ones and documents are the independent observations: `_se` are standard errors over
documents, and differences between models are paired by document. KL and agreement are averaged the same way, and so
is KL within each bucket of positions (`kl_by_position`), over the documents that have tokens there.
`samples` are continuations of the beginnings of held-out documents, as text; `documents` stands for what was measured
on, token by token. In the file, null stands for what is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import exp, inf, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.arch.counts import non_embedding_parameters, parameters
from minitron_nemo.checkpoint.files import read_json
from minitron_nemo.checkpoint.tokenizer import directory_of
from minitron_nemo.config import Recipe
from minitron_nemo.data.dataset import open_heldout
from minitron_nemo.data.tokenizer import Tokenizer, load_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.documents import fingerprint_of
from minitron_nemo.evaluation.evaluate import DTYPES, Measured, evaluate
from minitron_nemo.evaluation.markdown import aligned, with_error
from minitron_nemo.parallel.layout import Layout

# Paired differences of loss that a model's record holds, where both models were measured.
DELTAS = {"pruned": ("teacher",), "distilled": ("teacher", "pruned")}

# Figures of a record that are there as numbers or not at all: their null is one that is not finite.
NUMBERS = ("loss", "kl_to_teacher", "top1_agreement", "delta_vs_teacher", "delta_vs_pruned")

ORDER = ("source", "corrected", "teacher", "intermediate", "pruned", "distilled")

Evaluation = dict[str, dict[str, Any]]


def evaluate_models(models: Mapping[str, Path], prepared: Path, recipe: Recipe, layout: Layout) -> Evaluation:
    """Measure `models` (teacher, pruned and others) on the held-out documents, in `train.precision`.

    Collective; every rank gets the same result, the content of evaluation.json. Raises UserError for input that does
    not fit.
    """
    config = recipe.evaluate
    documents = open_heldout(
        prepared,
        config.sequence_length or recipe.data.sequence_length,
        config.documents,
        recipe.data.separator_weight,
    )
    measured = evaluate(
        models,
        documents,
        layout,
        dtype=DTYPES[recipe.train.precision],
        micro_batch_size=config.micro_batch_size,
        generate_tokens=config.generate_tokens,
        generate_prompt_tokens=config.generate_prompt_tokens,
        generate_batch_sizes=config.generate_batch_sizes,
    )
    evaluation = summarise(measured)
    content = fingerprint_of(documents)
    tokenizer = load_tokenizer(directory_of(models["teacher"]))
    for name, model in measured.items():
        evaluation[name] |= {"documents": content, "samples": samples(model, tokenizer)}
    return evaluation


def summarise(measured: Mapping[str, Measured]) -> Evaluation:
    """One record per model; losses in nats per token. A standard error of a single document is None.

    `losses_per_document` are in the order of the documents, the same for every model and every evaluation of one
    recipe's data: differences between models that were not measured together can be paired.

    Documents whose tokens all have weight 0 are left out. Raises UserError if none is left.
    """
    counted = next(iter(measured.values())).weight > 0
    if not counted.any():
        raise UserError("evaluate.documents: no held-out document has a token of weight other than 0; give longer text")
    losses = {name: _per_document(model, model.ce, counted) for name, model in measured.items()}
    result: Evaluation = {}
    for name, model in measured.items():
        loss, error = mean_with_error(losses[name])
        result[name] = {
            "loss": loss,
            "loss_se": error,
            "losses_per_document": losses[name].tolist(),
            "perplexity": perplexity(loss),
            "parameters": parameters(model.architecture),
            "non_embedding_parameters": non_embedding_parameters(model.architecture),
            "generation": [asdict(speed) for speed in model.speeds],
            "generation_tokens_per_second": model.speeds[0].tokens_per_second if model.speeds else None,
            "kl_by_position": _by_position(model),
        }
        for key, sums in (("kl_to_teacher", model.kl_to_teacher), ("top1_agreement", model.agreement)):
            result[name][key], result[name][f"{key}_se"] = mean_with_error(_per_document(model, sums, counted))
        for other in DELTAS.get(name, ()):
            if other in losses:
                delta, error = mean_with_error(losses[name] - losses[other])
                result[name] |= {f"delta_vs_{other}": delta, f"delta_vs_{other}_se": error}
    return result


def perplexity(loss: float) -> float:
    """e to the loss in nats; infinite where that is more than a float holds, from about 709.8 nats on."""
    try:
        return exp(loss)
    except OverflowError:
        return inf


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation.json, with numbers again where it has null for what is not finite.

    Raises UserError for a damaged one.
    """
    content: Evaluation = read_json(path, "run `minitron evaluate` again")
    if not all(isinstance(record, dict) for record in content.values()):
        raise UserError(f"{path}: not what `minitron evaluate` writes; run it again")
    return with_numbers(content)


def with_numbers(stored: Mapping[str, Mapping[str, Any]]) -> Evaluation:
    """What JSON holds of an evaluation, with NaN for the null of a figure; a perplexity is that of its loss."""
    return {name: _with_numbers(record) for name, record in stored.items()}


def _with_numbers(stored: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {key: nan if key in NUMBERS and value is None else value for key, value in stored.items()}
    if record.get("perplexity", 0.0) is None:
        record["perplexity"] = perplexity(record["loss"])
    if "losses_per_document" in record:
        record["losses_per_document"] = [nan if loss is None else loss for loss in record["losses_per_document"]]
    if "kl_by_position" in record:
        parts = record["kl_by_position"]
        record["kl_by_position"] = [{**part, "kl": nan if part["kl"] is None else part["kl"]} for part in parts]
    return record


def samples(model: Measured, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """What the model generated: {"prompt", "continuation"}, without the separator that a document begins with."""
    return [
        {
            "prompt": tokenizer.decode(prompt[1:] if prompt[0] == tokenizer.separator_id else prompt),
            "continuation": tokenizer.decode(tokens),
        }
        for prompt, tokens in model.continuations
    ]


def table(evaluation: Mapping[str, Mapping[str, Any]]) -> str:
    """The evaluation as a markdown table, models in the order of `ORDER`, then others."""
    header = (
        "",
        "parameters",
        "loss",
        "perplexity",
        "KL to teacher",
        "top-1 agreement",
        "Δ loss vs teacher",
        "Δ loss vs pruned",
        "tokens/s",
    )
    known = [name for name in ORDER if name in evaluation]
    rows = [header]
    for name in [*known, *(name for name in evaluation if name not in known)]:
        record = evaluation[name]
        speed = record["generation_tokens_per_second"]
        rows.append(
            (
                name,
                f"{record['parameters'] / 1e6:.1f} M",
                _with_error(record, "loss"),
                f"{record['perplexity']:.2f}",
                f"{record['kl_to_teacher']:.4f}",
                f"{100 * record['top1_agreement']:.1f} %",
                _with_error(record, "delta_vs_teacher", "+"),
                _with_error(record, "delta_vs_pruned", "+"),
                "" if speed is None else f"{speed:.1f}",
            )
        )
    return aligned(rows)


def _per_document(model: Measured, sums: NDArray[np.float64], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray(sums[counted] / model.weight[counted])


def _by_position(model: Measured) -> list[dict[str, Any]]:
    """{"from", "to" (without it), "kl", "se"} of every bucket that a document has a token of weight other than 0 in."""
    found = []
    spans = zip(model.edges, model.edges[1:], model.kl_by_position, model.weight_by_position, strict=False)
    for start, stop, kl, weight in spans:
        counted = weight > 0
        if counted.any():
            mean, error = mean_with_error(kl[counted] / weight[counted])
            found.append({"from": start, "to": stop, "kl": mean, "se": error})
    return found


def mean_with_error(values: NDArray[np.float64]) -> tuple[float, float | None]:
    """Mean and its standard error, None of a single value."""
    with np.errstate(invalid="ignore"):  # infinite ones have a mean, and NaN for its error
        error = float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error


def _with_error(record: Mapping[str, Any], key: str, sign: str = "") -> str:
    if key not in record:
        return ""
    return with_error(record[key], record[f"{key}_se"], sign)
