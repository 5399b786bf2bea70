"""Weights of the losses beside L_logits: constants, or L_logits / that loss (2407.14679 section 3 has it for alpha).

The first backward of a pipeline schedule runs before its last forward, so the ratio of a step is known after it only:
step n uses the ratio of step n - 1, of sums over its whole global batch. It is training state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minitron_nemo.errors import UserError

DYNAMIC = "dynamic"
# The weights and the losses they belong to.
WEIGHTS = {"ce_weight": "ce", "alpha": "hidden"}


def check_weight(key: str, weight: float | str) -> None:
    """Raise UserError, naming the recipe's `key`, for what is no weight."""
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if weight != DYNAMIC and not (number and 0 <= float(weight) < float("inf")):
        raise UserError(f"{key}: {weight!r} is no weight; give {DYNAMIC} or a number from 0 on")


class Balance:
    """`ce_weight` and `alpha` of the next step; None as long as a dynamic one has not been measured."""

    def __init__(self, ce_weight: float | str, alpha: float | str) -> None:
        settings = dict(zip(WEIGHTS, (ce_weight, alpha), strict=True))
        self.dynamic = [name for name, setting in settings.items() if setting == DYNAMIC]
        self._weights = {name: None if name in self.dynamic else float(setting) for name, setting in settings.items()}

    @property
    def measured(self) -> bool:
        return None not in self._weights.values()

    def weight(self, name: str) -> float:
        """As the next step uses it; 0 where it has not been measured."""
        return self._weights[name] or 0.0

    def state_dict(self) -> dict[str, float | None]:
        """What resumes a run, and what an update that did not happen puts back."""
        return {name: self._weights[name] for name in self.dynamic}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Take what `state_dict` of a balance with the same settings gave."""
        self._weights |= state

    def update(self, sums: Mapping[str, Tensor]) -> None:
        """Take this rank's sums of `logits`, `ce` and `hidden` over a step. Collective over all ranks if dynamic.

        The ranks of a tensor-parallel group hold equal sums, as do numerator and denominator; so one reduction over
        the world gives every rank the same bits. A ratio without meaning (no token, a student equal to its teacher, a
        loss that is not finite) leaves a weight as it is.
        """
        if not self.dynamic:
            return
        total = torch.stack([sums["logits"], *(sums[WEIGHTS[name]] for name in self.dynamic)])
        torch.distributed.all_reduce(total)
        for name, ratio in zip(self.dynamic, (total[0] / total[1:]).tolist(), strict=True):
            if 0 < ratio < float("inf"):
                self._weights[name] = ratio
            elif self._weights[name] is None:
                self._weights[name] = 0.0
