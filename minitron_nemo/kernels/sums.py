"""Loss sums over tokens, and how tokens without weight and tokens without a finite loss enter them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.rows import Rows


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, never means; detached scalars, the same on all ranks of `tp_group`."""

    logits: Tensor  # fp32: weight * divergence, times temperature^2 where asked; 0 without a teacher
    ce: Tensor  # fp32: weight * cross-entropy
    tokens: Tensor  # int64: tokens whose weight is not 0
    weight: Tensor  # fp32: sum of weights
    nonfinite: Tensor  # int64: tokens whose loss is not finite; with any, sums and gradients are unusable


def check_tokens(labels: Tensor, token_weights: Tensor | None = None) -> None:
    """ValueError unless labels are int64 [tokens] and token_weights, where given, fp32 [tokens]."""
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels: {labels.dtype} {tuple(labels.shape)}, must be int64 [tokens]")
    if token_weights is not None and (token_weights.shape != labels.shape or token_weights.dtype != torch.float32):
        raise ValueError(
            f"token_weights: {token_weights.dtype} {tuple(token_weights.shape)}, must be float32 [{len(labels)}] as "
            "labels has it"
        )


class TokenSums:
    """Accumulates the sums of chunks of tokens, in fp64."""

    def __init__(self, token_weights: Tensor) -> None:
        self._weights = token_weights
        self._counted = token_weights != 0
        self._divergence, self._ce = token_weights.new_zeros(2, dtype=torch.float64)
        self._nonfinite = torch.zeros([], dtype=torch.int64, device=token_weights.device)

    def add(self, tokens: slice, rows: Rows) -> None:
        weights, counted = self._weights[tokens], self._counted[tokens]
        # Tokens without weight may have any label, so any cross-entropy: left out, not multiplied by 0. A NaN of theirs
        # is still an error: 0 times it would be NaN in the gradients.
        bad = rows.ce.isnan() | (rows.ce.isinf() & counted)
        self._ce += torch.where(counted, rows.ce * weights, 0.0).sum()
        if rows.divergence is not None:
            self._divergence += torch.where(counted, rows.divergence * weights, 0.0).sum()
            bad |= ~rows.divergence.isfinite()
        self._nonfinite += bad.sum()

    def total(self, objective: Objective) -> tuple[Tensor, LossSums]:
        """The objective's sum, fp32, and its parts."""
        divergence = self._divergence * objective.divergence_scale
        total = objective.logits_weight * divergence
        if objective.ce_weight:  # 0 * an infinite cross-entropy would be NaN
            total = total + objective.ce_weight * self._ce
        sums = LossSums(
            logits=divergence.float(),
            ce=self._ce.float(),
            tokens=self._counted.sum(),
            weight=self._weights.sum(),
            nonfinite=self._nonfinite,
        )
        return total.float(), sums
