"""Figures of a training run: the losses of the last updates, brought to every rank, and what goes with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.distillation.metrics import Figures
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.phases import Segment
from minitron_nemo.distillation.step import SUMS
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device

# What a step sums up that is no loss.
COUNTS = ("tokens", "weight", "nonfinite")


@dataclass(frozen=True)
class Report:
    """The updates since the last report: every figure by its tag, for TensorBoard and metrics.jsonl.

    docs/observability.md says what each of them means.
    """

    iteration: int
    scalars: Mapping[str, float]

    @property
    def loss(self) -> float:
        return self.scalars["train/loss"]

    @property
    def logits(self) -> float:
        return self.scalars["train/logits"]

    @property
    def ce(self) -> float:
        return self.scalars["train/ce"]

    @property
    def hidden(self) -> float:
        return self.scalars.get("train/hidden", 0.0)

    @property
    def alpha(self) -> float:
        return self.scalars.get("train/alpha", 0.0)

    @property
    def lr(self) -> float:
        return self.scalars["train/lr"]

    @property
    def grad_norm(self) -> float:
        return self.scalars["train/grad_norm"]

    @property
    def seconds_per_step(self) -> float:
        return self.scalars["speed/seconds_per_update"]

    def __str__(self) -> str:
        """The few figures that a line on the console has room for."""
        hidden = f", hidden {self.hidden:.4f} x {self.alpha:.3g}" if self.alpha else ""
        mfu = f" ({self.scalars['speed/mfu']:.1%} MFU)" if "speed/mfu" in self.scalars else ""
        return (
            f"loss {self.loss:.4f} (logits {self.logits:.4f}, ce {self.ce:.4f}{hidden})  lr {self.lr:.2e}  "
            f"grad norm {self.grad_norm:.2f}  {self.scalars['speed/tokens_per_second']:,.0f} tokens/s{mfu}"
        )


class Meter:
    """Adds up what happens between two reports."""

    def __init__(
        self,
        objective: DistillationObjective,
        figures: Sequence[Figures] = (),
        *,
        flops_per_token: Callable[[int], float],
        peak_flops: float | None,
    ) -> None:
        """`figures` are asked at every report; the largest value of all ranks counts.

        `flops_per_token` is of one token of an update, by sequence length; `peak_flops` what a rank's device can do a
        second at most, None where that is not known.
        """
        self.objective = objective
        self.figures = figures
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self._restart()

    def _restart(self) -> None:
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=current_device())
        self.updates = 0
        self._positions = 0
        self._flops = 0.0
        self._start = time.perf_counter()

    def add(self, sums: Tensor, segment: Segment) -> None:
        """`sums` of one update as `Step` returns them; `segment` says what it took."""
        self._sums += sums
        self._positions += segment.tokens_per_step
        self._flops += segment.tokens_per_step * self.flops_per_token(segment.sequence_length)
        self.updates += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of what happens within is no training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def report(self, iteration: int, lr: float, grad_norm: float) -> Report:
        """The report since the last one, but for what this rank's clock says the same on every rank. Collective."""
        seconds = time.perf_counter() - self._start
        train = {f"train/{name}": value for name, value in self._losses().items()}
        train |= {"train/lr": lr, "train/grad_norm": grad_norm}
        report = Report(iteration, train | self._speed(seconds) | self._figures())
        self._restart()
        return report

    def _losses(self) -> dict[str, float]:
        """Every sum per token, what is minimised, and the losses' weights, the mean over the updates."""
        # Tensor-parallel ranks hold equal sums, data-parallel ranks parts, stages before the last one zeros.
        for group in (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            torch.distributed.all_reduce(self._sums, group=group)
        sums = dict(zip(SUMS, self._sums.tolist(), strict=True))
        parts = {name: value / max(sums["tokens"], 1) for name, value in sums.items() if name not in COUNTS}
        weighted, weighted_ce = parts.pop("alpha_hidden"), parts.pop("weighted_ce")
        loss = self.objective.logits_weight * parts["logits"] + weighted_ce + weighted
        if weighted_ce:
            parts["ce_weight"] = weighted_ce / parts["ce"]
        if parts["hidden"]:
            parts["alpha"] = weighted / parts["hidden"]
        else:
            del parts["hidden"]
        return {"loss": loss, **parts}

    def _speed(self, seconds: float) -> dict[str, float]:
        ranks = launch.world_size()
        flops = self._flops / seconds / ranks
        speed = {
            "tokens_per_second": self._positions / seconds,
            "tokens_per_second_per_rank": self._positions / seconds / ranks,
            "seconds_per_update": seconds / self.updates,
            "tflops_per_rank": flops / 1e12,
        }
        if self.peak_flops is not None:
            speed["mfu"] = flops / self.peak_flops
        return {f"speed/{name}": value for name, value in speed.items()}

    def _figures(self) -> dict[str, float]:
        mine = {tag: value for source in self.figures for tag, value in source(self.updates).items()}
        largest = torch.tensor([*mine.values()], dtype=torch.float64, device=current_device())
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return dict(zip(mine, largest.tolist(), strict=True))
