"""What became of losses, learning rate and throughput over the tokens of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_nemo.report.charts import Chart, Series, curves
from minitron_nemo.report.read import Training

# Terms of what is minimised, by label: the loss, and the weight that it is logged with.
TERMS = {
    "logits": ("train/logits", None),
    "hidden × alpha": ("train/hidden", "train/alpha"),
    "cross-entropy × weight": ("train/ce", "train/ce_weight"),
}


def distillation_charts(
    training: Training, evaluation: Mapping[str, Mapping[str, Any]], logits_weight: float
) -> list[Chart]:
    """Charts of the distillation; with the teacher's and the pruned model's loss where `evaluation` has them.

    None before the first report.
    """
    if not training.series("train/loss"):
        return []
    levels = {name: evaluation[name]["loss"] for name in ("teacher", "pruned") if name in evaluation}
    total = Series("total", training.series("train/loss"))
    drawn = [
        curves(
            "What is minimised",
            "The loss and its weighted terms, if several; each the mean since the report before.",
            [total, *_terms(training, logits_weight)],
            y="nats per token",
            zero=True,
        ),
        _cross_entropy(training, levels),
    ]
    divergence = _validation(training, "kl_to_teacher", "held out")
    if divergence.points:
        caption = "KL(teacher, student) on the held-out documents."
        drawn.append(curves("Divergence from the teacher", caption, [divergence], y="nats per token", zero=True))
    return [*drawn, *_progress(training)]


def correction_charts(training: Training) -> list[Chart]:
    """Charts of the teacher's correction, which minimises the cross-entropy alone; none before the first report."""
    if not training.series("train/loss"):
        return []
    return [_cross_entropy(training, {}), *_progress(training)]


def _cross_entropy(training: Training, levels: Mapping[str, float]) -> Chart:
    return curves(
        "Cross-entropy",
        "Of the training text and, where it was measured, of the held-out documents ± one standard error over them.",
        [Series("training", training.series("train/ce")), _validation(training, "loss", "held out")],
        y="nats per token",
        levels=levels,
    )


def _progress(training: Training) -> list[Chart]:
    rate = [Series("learning rate", training.series("train/lr"))]
    speed = [Series("throughput", training.series("speed/tokens_per_second"))]
    return [
        curves("Learning rate", "Of the last update before each report.", rate, y="learning rate", zero=True),
        curves(
            "Throughput", "All processes together; saves count, validations do not.", speed, y="tokens/s", zero=True
        ),
    ]


def _terms(training: Training, logits_weight: float) -> list[Series]:
    """The terms that are part of the total; a term by itself would be the total once more."""
    found = []
    for label, (tag, weight_tag) in TERMS.items():
        weights = dict(training.series(weight_tag)) if weight_tag else {}
        values = training.series(tag)
        if weight_tag is None:
            weights = {tokens: logits_weight for tokens, _ in values}
        points = [(tokens, value * weights[tokens]) for tokens, value in values if weights.get(tokens)]
        if any(value for _, value in points):
            found.append(Series(label, points))
    return found if len(found) > 1 else []


def _validation(training: Training, name: str, label: str) -> Series:
    errors = dict(training.series(f"validation/{name}_se"))
    points = training.series(f"validation/{name}")
    return Series(label, points, [errors.get(tokens) for tokens, _ in points])


def versus_scratch(distilled: Training, scratch: Training) -> tuple[str, Chart] | None:
    """Tokens that each needed to the lowest held-out loss of the distillation, in words and as a chart.

    None where one of them has no validations.
    """
    ours, theirs = (_validation(training, "loss", "") for training in (distilled, scratch))
    if not ours.points or not theirs.points:
        return None
    goal = min(loss for _, loss in ours.points)
    needed = [_first(series, goal) for series in (ours, theirs)]
    assert needed[0] is not None
    words = f"Distillation reached a held-out loss of {goal:.4f} nats per token after {needed[0]:,.0f} tokens; "
    if needed[1] is None:
        most, best = theirs.points[-1][0], min(loss for _, loss in theirs.points)
        words += f"training from scratch did not within {most:,.0f} tokens, where its best was {best:.4f}."
    else:
        words += f"training from scratch needed {needed[1]:,.0f}, {needed[1] / needed[0]:.2g} times as many."
    chart = curves(
        "Held-out loss, distilled and from scratch",
        "The same shape and the same documents; error bars are one standard error over documents.",
        [Series("distilled", ours.points, ours.errors), Series("from scratch", theirs.points, theirs.errors)],
        y="nats per token",
    )
    return words, chart


def _first(series: Series, goal: float) -> float | None:
    """Tokens after which the loss was at most `goal` for the first time."""
    return next((tokens for tokens, loss in series.points if loss <= goal), None)
