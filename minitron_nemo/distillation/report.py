"""Figures of a training run: the losses of the last updates, brought to every rank, and what goes with them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.step import SUMS
from minitron_nemo.parallel.device import current_device


@dataclass(frozen=True)
class Report:
    """The updates since the last report; `lr` and `grad_norm` (before clipping) are those of the last one.

    `loss` is what is minimised; `logits` and `ce` are its parts before their weights (`ce` is computed beside a
    divergence even at weight 0), `hidden` that of the intermediate losses, and `alpha` its weight, the mean over the
    updates. Each loss is a sum over tokens, in nats, divided by the number of tokens whose weight is not 0.
    `tokens_per_second` counts positions of all ranks, ignored ones included.
    """

    iteration: int
    loss: float
    logits: float
    ce: float
    hidden: float
    alpha: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seconds_per_step: float

    def scalars(self) -> dict[str, float]:
        """TensorBoard's view."""
        names = ("loss", "logits", "ce", "hidden", "alpha", "lr", "grad_norm", "tokens_per_second")
        return {f"train/{name}": getattr(self, name) for name in names}

    def __str__(self) -> str:
        hidden = f", hidden {self.hidden:.4f} x {self.alpha:.3g}" if self.alpha else ""
        return (
            f"loss {self.loss:.4f} (kl {self.logits:.4f}, ce {self.ce:.4f}{hidden})  lr {self.lr:.2e}  "
            f"grad norm {self.grad_norm:.2f}  {self.tokens_per_second:,.0f} tokens/s"
        )


class Meter:
    """Adds up the sums of steps between two reports."""

    def __init__(self, objective: DistillationObjective) -> None:
        self.objective = objective
        self._restart()

    def _restart(self) -> None:
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=current_device())
        self._steps = 0
        self._positions = 0
        self._start = time.perf_counter()

    def add(self, sums: Tensor, positions: int) -> None:
        """`sums` of one step as `Step` returns them, and the `positions` of its global batch."""
        self._sums += sums
        self._positions += positions
        self._steps += 1

    def report(self, iteration: int, lr: float, grad_norm: float) -> Report:
        """The report since the last one, but for this rank's clock the same on every rank. Collective."""
        # Tensor-parallel ranks hold equal sums, data-parallel ranks parts, stages before the last one zeros.
        for group in (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            torch.distributed.all_reduce(self._sums, group=group)
        values = dict(zip(SUMS, self._sums.tolist(), strict=True))
        logits, ce, hidden, weighted = (
            values[name] / max(values["tokens"], 1) for name in ("logits", "ce", "hidden", "alpha_hidden")
        )
        seconds = (time.perf_counter() - self._start) / self._steps
        report = Report(
            iteration=iteration,
            loss=self.objective.logits_weight * logits + self.objective.ce_weight * ce + weighted,
            logits=logits,
            ce=ce,
            hidden=hidden,
            alpha=weighted / hidden if hidden else 0.0,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=self._positions / (seconds * self._steps),
            seconds_per_step=seconds,
        )
        self._restart()
        return report
