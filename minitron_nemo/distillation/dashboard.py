"""How TensorBoard groups the scalars of a training: its tab "Custom Scalars".

The layout is the same for every run, since TensorBoard joins those of all runs it shows, chart by chart: what a run
does not write (MFU on CPUs, validations that nobody asked for) is an empty chart in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# Category -> chart -> tags. Every tag of docs/observability.md is in one chart; one chart has one unit.
CHARTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Losses": {
        "what is minimised, and its terms before their weights": (
            "train/loss",
            "train/logits",
            "train/ce",
            "train/hidden",
        ),
    },
    "Held-out documents": {
        "loss": ("validation/loss",),
        "standard error of the loss": ("validation/loss_se",),
        "perplexity": ("validation/perplexity",),
        "KL from the teacher": ("validation/kl_to_teacher",),
        "top-1 agreement with the teacher": ("validation/top1_agreement",),
    },
    "Weights of the losses": {
        "alpha": ("train/alpha",),
        "ce_weight": ("train/ce_weight",),
    },
    "Optimisation": {
        "learning rate": ("train/lr",),
        "gradient norm": ("train/grad_norm",),
        "parameter norm": ("train/parameter_norm",),
        "updates that did not happen, and returns to a checkpoint": ("train/skipped", "train/roll_backs"),
    },
    "Speed": {
        "tokens a second": ("speed/tokens_per_second", "speed/tokens_per_second_per_rank"),
        "seconds an update, and of it waiting for the teacher": ("speed/seconds_per_update", "teacher/wait_seconds"),
        "TFLOP/s a rank": ("speed/tflops_per_rank",),
        "MFU": ("speed/mfu",),
        "seconds of a checkpoint": ("checkpoint/stall_seconds", "checkpoint/write_seconds"),
    },
    "Memory": {
        "bytes of the rank that needs most": ("memory/peak_allocated_bytes", "memory/resident_bytes"),
    },
    "Data": {
        "samples": ("data/samples",),
        "tokens": ("data/tokens",),
    },
}


def layout() -> dict[str, dict[str, list[str | list[str]]]]:
    """What torch's `custom_scalars` takes. TensorBoard matches tags from their beginning, as patterns."""
    return {
        category: {chart: ["Multiline", [f"{re.escape(tag)}$" for tag in tags]] for chart, tags in charts.items()}
        for category, charts in CHARTS.items()
    }
