"""What came out: the verdict in words, the models side by side, the shape before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from minitron_nemo.arch import Axis, Plan
from minitron_nemo.arch.blocks import EMBEDDING
from minitron_nemo.arch.counts import (
    active_parameters,
    forward_flops_per_token,
    non_embedding_parameters,
    parameters,
)
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.evaluation.report import ORDER, mean_with_error
from minitron_nemo.report.charts import Chart, colours, draw, error_bars, interval, with_error

INTERMEDIATE = "intermediate"
ROLES = {
    "source": "as it came",
    "corrected": "the source after its correction",
    "teacher": "what the student learns from",
    INTERMEDIATE: "the student of the stage before, which is cut",
    "pruned": "cut, not trained",
    "distilled": "the result",
}
# The widths between a layer's two norms, of those that a family has.
MLPS = (
    ("experts of a layer", Axis.EXPERTS),
    ("FFN size", Axis.FFN),
    ("FFN size of an expert", Axis.MOE_FFN),
    ("FFN size of the shared expert", Axis.SHARED_FFN),
)
# What makes models, in words.
MAKING = {"convert": "conversion", "correct": "correction", "prune": "pruning", "distill": "distillation"}
AGREEMENT = "of positions where student and teacher agree on the likeliest next token"
NBSP = "\N{NO-BREAK SPACE}"

Evaluation = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A value with its standard error beside it; "" for a value that is not there."""

    text: str
    error: str = ""


@dataclass(frozen=True)
class Table:
    """Rows are (label, cells); a model or a stage is a column, so that the table fits on a phone."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Figure]]]


def count(number: float) -> str:
    """1234567 -> 1.23 M, to three digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            decimals = 2 if number < 10 * size else 1 if number < 100 * size else 0
            return f"{number / size:.{decimals}f}{NBSP}{unit}"
    return f"{number:g}"


def in_bytes(number: float) -> str:
    """1234567 -> 1.23 MB, to three digits."""
    return count(number).replace("B", "G") + ("B" if number >= 1000 else f"{NBSP}B")


def models(evaluation: Evaluation) -> list[str]:
    """Names in the order that they came about in, others behind them."""
    known = [name for name in ORDER if name in evaluation]
    return [*known, *(name for name in evaluation if name not in known)]


def made_since(outdated: Mapping[str, str]) -> str:
    """What has made models anew since they were measured, in words; "" for nothing. `outdated`: model -> step."""
    made = (step.rpartition("/") for step in dict.fromkeys(outdated.values()))
    return " and ".join(f"{MAKING[name]} of {stage}" if stage else MAKING[name] for stage, _, name in made)


def verdict(evaluation: Evaluation) -> str:
    """The result in two sentences; "" while the distilled student is not measured, or where a loss is not finite."""
    if not _comparable(evaluation):
        return ""
    teacher, distilled = (evaluation[name] for name in ("teacher", "distilled"))
    kept = distilled["non_embedding_parameters"] / teacher["non_embedding_parameters"]
    (lost, lost_error), gained = _cost(evaluation), -distilled["delta_vs_pruned"]
    left = distilled["delta_vs_teacher"]
    pruning = "Pruning the intermediate model" if INTERMEDIATE in evaluation else "Pruning"
    words = (
        f"The student has {kept:.1%} of the teacher's parameters outside the embeddings "
        f"({count(distilled['non_embedding_parameters'])} of {count(teacher['non_embedding_parameters'])}). "
        f"{pruning} {'cost' if lost >= 0 else 'gained'} {_nats(abs(lost), lost_error)} of held-out loss, "
        f"distillation {'regained' if gained >= 0 else 'lost another'} "
        f"{_nats(abs(gained), distilled['delta_vs_pruned_se'])}"
    )
    if lost > 0 and gained > 0:
        words += f", {gained / lost:.0%} of it"
    side = "above" if left >= 0 else "below"
    return f"{words}: the student ends {_nats(abs(left), distilled['delta_vs_teacher_se'])} {side} the teacher."


def headlines(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The result in a few large figures, each with its words; none where there is no `verdict`."""
    if not _comparable(evaluation):
        return []
    teacher, distilled = (evaluation[name] for name in ("teacher", "distilled"))
    kept = distilled["non_embedding_parameters"] / teacher["non_embedding_parameters"]
    found = [(f"{kept:.0%}", "of the teacher's parameters outside the embeddings")]
    (lost, _), gained = _cost(evaluation), -distilled["delta_vs_pruned"]
    if lost > 0 and gained > 0:
        found.append((f"{gained / lost:.0%}", "of the loss that pruning cost is regained by distillation"))
    found.append((f"{distilled['top1_agreement']:.0%}", AGREEMENT))
    its, own = (next(iter(model.get("generation") or ()), None) for model in (teacher, distilled))
    if its and own:
        faster, size = own["tokens_per_second"] / its["tokens_per_second"], own["batch_size"]
        at_once = "one text at a time" if size == 1 else f"{size} texts at once"
        found.append((f"{faster:.1f}{NBSP}×", f"the teacher's speed of generation, {at_once}"))
    return found


def table(evaluation: Evaluation) -> Table:
    """Models as columns."""
    names = models(evaluation)
    rows: list[tuple[str, list[Figure]]] = [
        ("parameters", [Figure(count(evaluation[name]["parameters"])) for name in names]),
        ("without embeddings", [Figure(count(evaluation[name]["non_embedding_parameters"])) for name in names]),
    ]
    for label, key, form, unit in (
        ("held-out loss, nats per token", "loss", ".4f", 1),
        ("perplexity", "perplexity", ".2f", 1),
        ("KL to teacher, nats per token", "kl_to_teacher", ".4f", 1),
        ("top-1 agreement with teacher, %", "top1_agreement", ".1f", 100),
        ("loss minus teacher's, paired", "delta_vs_teacher", "+.4f", 1),
        ("loss minus pruned one's, paired", "delta_vs_pruned", "+.4f", 1),
        ("generation, tokens/s", "generation_tokens_per_second", ".1f", 1),
    ):
        rows.append((label, [_figure(evaluation[name], key, form, unit) for name in names]))
    return Table(names, [row for row in rows if any(cell.text for cell in row[1])])


def with_loss(evaluation: Evaluation) -> Evaluation:
    """The models whose held-out loss is finite."""
    return {name: record for name, record in evaluation.items() if isfinite(record["loss"])}


def chart(evaluation: Evaluation) -> Chart:
    """Losses of the models, all finite, with their standard errors."""
    names = models(evaluation)
    rows = [
        {
            "y": name,
            "x": record["loss"],
            **interval(record["loss"], record["loss_se"]),
            "series": name,
            "says": f"{name}: {with_error(record['loss'], record['loss_se'])} nats per token",
        }
        for name, record in ((name, evaluation[name]) for name in names)
    ]
    encoding = {
        "x": {"field": "x", "type": "quantitative", "title": "nats per token", "scale": {"zero": False}},
        "y": {"field": "y", "type": "nominal", "title": None, "sort": names},
        "color": {**colours(names), "legend": None},
    }
    points = {
        "data": {"values": rows},
        "mark": {"type": "point", "size": 60},
        "encoding": {**encoding, "description": {"field": "says"}},
    }
    caption = "On the held-out documents, ± one standard error over them. Differences are paired: see the table."
    return draw("Held-out loss", caption, [*error_bars(rows, encoding, "x"), points], height=50 + 28 * len(names))


def shape(plan: Plan, sequence_length: int | None) -> Table:
    """Sizes before and after, and what they come to; FLOPs by arithmetic."""
    before, after = plan.source, plan.target
    topk, met = [], []
    if before.has(Axis.EXPERTS):
        topk = [("experts that see a token", before.moe_router_topk or 0, after.moe_router_topk or 0)]
        met = [("parameters that a token meets", active_parameters(before), active_parameters(after))]
    sizes: list[tuple[str, int, int]] = [
        ("layers", before.num_layers, after.num_layers),
        ("hidden size", before.hidden_size, after.hidden_size),
        *((label, before.size(axis), after.size(axis)) for label, axis in MLPS if before.has(axis)),
        *topk,
        ("attention heads", before.num_attention_heads, after.num_attention_heads),
        ("query groups", before.num_query_groups, after.num_query_groups),
        ("channels of a head", before.kv_channels, after.kv_channels),
        ("vocabulary", before.vocab_size, after.vocab_size),
        ("parameters", parameters(before), parameters(after)),
        ("without embeddings", non_embedding_parameters(before), non_embedding_parameters(after)),
        *met,
    ]
    if sequence_length is not None:
        flops = [forward_flops_per_token(model, sequence_length) for model in (before, after)]
        sizes.append(("FLOPs per token, forward", flops[0], flops[1]))
    rows = [(label, [Figure(_size(old)), Figure(_size(new)), Figure(f"{new / old:.1%}")]) for label, old, new in sizes]
    weights = [2 * parameters(model) for model in (before, after)]
    shares = [*map(in_bytes, weights), f"{weights[1] / weights[0]:.1%}"]
    rows.append(("weights in bf16", [Figure(share) for share in shares]))
    return Table(("cut from", "student", "kept"), rows)


def cuts(plan: Plan) -> str:
    """Which layers go, and what makes up for cuts, in words."""
    gone = sorted(set(range(plan.source.num_layers)) - set(plan.kept_layers))
    words = [f"Layers dropped, counted from 0: {', '.join(map(str, gone))}." if gone else "All layers stay."]
    if plan.merged_heads is not None:
        words.append("Queries of kept heads take in those of dropped ones.")
    if plan.rotated:
        words.append(rotation(plan))
    # The embedding's is the rotation itself; one matrix may be for several tensors.
    fitted = [each for each in tensors(plan.target) if each.name != EMBEDDING and plan.matrix_of(each) is not None]
    scaled = [f"{len(plan.norm_scales)} norms rescaled"] if plan.norm_scales else []
    repairs = [*scaled, f"{len(fitted)} weight matrices fitted by least squares"] if fitted else scaled
    words.append(f"To make up for what goes: {', '.join(repairs)}." if repairs else "Nothing makes up for what goes.")
    return " ".join(words)


def rotation(plan: Plan) -> str:
    """What a rotated Plan makes of the hidden channels, in words."""
    words = f"Rotated: {plan.target.hidden_size} combinations of {plan.source.hidden_size} channels"
    keeps = plan.provenance.get("rotation_keeps")  # not there before `minitron repair` has found the rotation
    return f"{words}." if keeps is None else f"{words}, which keep {keeps:.1%} of the squares behind the norms."


def _comparable(evaluation: Evaluation) -> bool:
    """Whether the distilled student is measured, and every model has a finite loss."""
    return {"teacher", "pruned", "distilled"} <= set(evaluation) and len(with_loss(evaluation)) == len(evaluation)


def _cost(evaluation: Evaluation) -> tuple[float, float | None]:
    """Loss of the pruned model less that of the one it is cut out of, and its standard error; paired by document."""
    pruned, key = evaluation["pruned"], "losses_per_document"
    if INTERMEDIATE in evaluation:
        return mean_with_error(np.subtract(pruned[key], evaluation[INTERMEDIATE][key]))
    return pruned["delta_vs_teacher"], pruned["delta_vs_teacher_se"]


def _figure(record: Mapping[str, Any], key: str, form: str, unit: float) -> Figure:
    if record.get(key) is None:
        return Figure("")
    error = record.get(f"{key}_se")
    text = f"{unit * record[key]:{form}}".replace("-", "\N{MINUS SIGN}")
    return Figure(text, "" if error is None else f"± {unit * error:{form.lstrip('+')}}")


def _nats(value: float, error: float | None) -> str:
    return (f"{value:.4f}" if error is None else f"{value:.4f}{NBSP}±{NBSP}{error:.4f}") + " nats per token"


def _size(number: float) -> str:
    return f"{number:,}" if number < 1_000_000 else count(number)
