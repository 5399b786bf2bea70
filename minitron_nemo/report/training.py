"""What became of losses, learning rate and throughput over the tokens of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from minitron_nemo.report.charts import Chart, Series, curves
from minitron_nemo.report.read import Training
from minitron_nemo.report.results import Figure, Table, count, in_bytes

TOKENS_PER_SECOND = "speed/tokens_per_second"
NAMES = {"corrected": "correction", "distilled": "distillation"}

# Rows of the table of trainings: label, tag, and how all its values become one figure.
FACTS: Sequence[tuple[str, str, Callable[[Sequence[float]], str]]] = (
    ("tokens", "data/tokens", lambda values: count(values[-1])),
    ("loss, last report", "train/loss", lambda values: f"{values[-1]:.4f}"),
    ("held-out loss, lowest", "validation/loss", lambda values: f"{min(values):.4f}"),
    ("tokens/s, median", TOKENS_PER_SECOND, lambda values: f"{median(values):,.0f}"),
    ("model FLOP/s utilisation, median", "speed/mfu", lambda values: f"{median(values):.1%}"),
    ("seconds an update, median", "speed/seconds_per_update", lambda values: f"{median(values):.3g}"),
    ("of them waiting for the teacher", "teacher/wait_seconds", lambda values: f"{median(values):.3g}"),
    ("peak memory of a GPU", "memory/peak_allocated_bytes", lambda values: in_bytes(max(values))),
    ("memory of a process", "memory/resident_bytes", lambda values: in_bytes(max(values))),
    ("updates that did not happen", "train/skipped", lambda values: f"{values[-1]:.0f}"),
)

# Terms of what is minimised, by label: the loss, and the weight that it is logged with.
TERMS = {
    "logits": ("train/logits", None),
    "hidden × alpha": ("train/hidden", "train/alpha"),
    "cross-entropy × weight": ("train/ce", "train/ce_weight"),
}


def distillation_charts(training: Training, losses: Mapping[str, float], logits_weight: float) -> list[Chart]:
    """Charts of the distillation; with the teacher's and the pruned model's held-out loss where `losses` has them.

    None before the first report.
    """
    if not training.series("train/loss"):
        return []
    levels = {name: losses[name] for name in ("teacher", "pruned") if name in losses}
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
    """What the updates were like, as far as it was reported."""
    drawn = []
    for title, caption, tag, unit in (
        ("Learning rate", "Of the last update before each report.", "train/lr", "learning rate"),
        ("Gradient norm", "Of the last update before each report, before clipping.", "train/grad_norm", "L2 norm"),
        ("Throughput", "All processes together; saves count, validations do not.", TOKENS_PER_SECOND, "tokens/s"),
    ):
        series = Series(title.lower(), training.series(tag))
        if series.points:
            drawn.append(curves(title, caption, [series], y=unit, zero=True))
    return drawn


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


def versus(distilled: Training, baseline: Training) -> tuple[str, Chart] | None:
    """Tokens that each needed to the lowest held-out loss that both reached, in words and as a chart.

    Those of trainings before, the teacher's correction above all, are named besides. None where one of the two has no
    validations.
    """
    ours, theirs = (_validation(training, "loss", "") for training in (distilled, baseline))
    if not ours.points or not theirs.points:
        return None
    best, its_best = (min(loss for _, loss in series.points) for series in (ours, theirs))
    goal = max(best, its_best)
    mine, its = (_first(series, goal) for series in (ours, theirs))
    words = f"Distillation reached a held-out loss of {goal:.4f} nats per token after {mine:,.0f} tokens; "
    words += f"the baseline needed {its:,.0f}, {its / mine:.2g} times as many."
    if distilled.earlier or baseline.earlier:
        whole = (its + baseline.earlier) / (mine + distilled.earlier)
        words += f" Before, the teacher's correction and earlier stages took {distilled.earlier:,.0f} tokens, and the "
        words += f"baseline's {baseline.earlier:,.0f}: with these it is {whole:.2g} times as many."
    if its_best > best:
        words += f" The {best:.4f} that distillation ended with it did not reach in {theirs.points[-1][0]:,.0f} tokens."
    chart = curves(
        "Held-out loss, distilled and baseline",
        "Error bars are one standard error over documents.",
        [Series("distilled", ours.points, ours.errors), Series("baseline", theirs.points, theirs.errors)],
        y="nats per token",
    )
    return words, chart


def _first(series: Series, goal: float) -> float:
    """Tokens after which the loss was at most `goal`, which it reached, for the first time."""
    return next(tokens for tokens, loss in series.points if loss <= goal)


def facts(trainings: Mapping[str, Training]) -> Table | None:
    """What each training took, trainings as columns; None before the first report."""
    named = {label: trainings[name] for name, label in NAMES.items() if name in trainings}
    shown = {label: each for label, each in named.items() if each.series("train/loss")}
    rows = [
        (label, [Figure("" if not (values := _values(training, tag)) else form(values)) for training in shown.values()])
        for label, tag, form in FACTS
    ]
    found = [row for row in rows if any(cell.text for cell in row[1])]
    return Table(list(shown), found) if shown else None


def _values(training: Training, tag: str) -> list[float]:
    return [value for _, value in training.series(tag)]
