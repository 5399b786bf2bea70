"""Loss sums of NeMo's microbatches, reduced and reported. The maths is `distillation.objective`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronLossReduction, MegatronStep
from torch import Tensor, distributed

from minitron_nemo.distillation.balance import WEIGHTS

PARTS = ("loss", "logits", "ce", "tokens")  # of a microbatch's report, all sums but the last


class LossReduction(MegatronLossReduction):
    """From the model's output, the objective's sum [1, 1], to what Megatron's schedule and NeMo's log want."""

    def forward(self, batch: dict[str, Any], forward_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum, integer token count and report, as Megatron asks under `calculate_per_token_loss`.

        The report is fp64 [4], `PARTS`.
        """
        sums = batch.pop("loss_sums")
        report = torch.stack(
            [part.detach().double().reshape([]) for part in (forward_out, sums.logits, sums.ce, sums.tokens)]
        )
        # sum(): the schedule frees the output it gets, which must not be a view.
        return forward_out.sum(), sums.tokens.to(torch.int), report

    def reduce(self, losses_reduced_per_micro_batch: Sequence[Tensor]) -> Tensor:
        """Loss per token of the global batch, fp32; on the last pipeline stage."""
        sums = torch.stack(list(losses_reduced_per_micro_batch)).sum(dim=0)
        distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return (sums[0] / sums[-1].clamp(min=1)).float()


def step_sums(model: Any, reports: Sequence[Tensor]) -> dict[str, Tensor]:
    """This rank's sums over a step of a DistillationModel, fp64: `PARTS`, and `hidden`, 0 where no pair is."""
    device = next(model.parameters()).device
    sums = dict(zip(PARTS, torch.zeros(len(PARTS), dtype=torch.float64, device=device), strict=True))
    for report in reports:
        sums = {name: sums[name] + part for name, part in zip(PARTS, report, strict=True)}
    sums["hidden"] = torch.zeros_like(sums["loss"])
    if model.intermediate is not None:
        sums["hidden"], weighted, _ = model.intermediate.sums()
        sums["loss"] = sums["loss"] + weighted
    return sums


class LossParts(pl.Callback):
    """Logs every part of the loss per token, by the tags of docs/observability.md, and ends the step of the model."""

    def on_megatron_step_end(self, step: MegatronStep, microbatch_outputs: Sequence[Tensor]) -> None:
        """Collective: stages before the last have no outputs, and one of them may be the one that logs."""
        if step.forward_only:
            return
        model = step.pl_module
        own = step_sums(model, microbatch_outputs)
        whole = torch.stack(list(own.values()))
        for group in (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            distributed.all_reduce(whole, group=group)
        sums = dict(zip(own, whole, strict=True))
        tokens = sums.pop("tokens").clamp(min=1)
        values = {name: (value / tokens).float() for name, value in sums.items()}
        if model.intermediate is None:
            del values["hidden"]
        for name in WEIGHTS:
            if weight := model.balance.weight(name):
                values[name] = torch.tensor(weight)
        for name, value in values.items():
            step.trainer.lightning_module.log(f"train/{name}", value, batch_size=1)
        model.end(own)
