"""Loss sums of NeMo's microbatches, reduced and reported. The maths is `distillation.objective`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronLossReduction, MegatronStep
from torch import Tensor, distributed

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


class LossParts(pl.Callback):
    """Logs every part of the loss per token, by the tags of docs/observability.md, wherever NeMo logs to."""

    def on_megatron_step_end(self, step: MegatronStep, microbatch_outputs: Sequence[Tensor]) -> None:
        """Collective: stages before the last have no outputs, and one of them may be the one that logs."""
        if step.forward_only:
            return
        device = next(step.pl_module.parameters()).device
        sums = torch.zeros(len(PARTS), dtype=torch.float64, device=device)
        for report in microbatch_outputs:
            sums += report
        for group in (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            distributed.all_reduce(sums, group=group)
        for name, value in zip(PARTS[:-1], (sums[:-1] / sums[-1].clamp(min=1)).float(), strict=True):
            step.trainer.lightning_module.log(f"train/{name}", value, batch_size=1)
