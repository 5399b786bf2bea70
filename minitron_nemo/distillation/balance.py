"""The weight of the intermediate losses: a constant, or L_logits / L_hidden (2407.14679 section 3).

The first backward of a pipeline schedule runs before its last forward, so the ratio of a step is known after it only:
step n uses the ratio of step n - 1, of sums over its whole global batch. It is training state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_nemo.errors import UserError

DYNAMIC = "dynamic"


def check_alpha(alpha: float | str) -> None:
    """Raise UserError, naming the recipe's key, for what is no weight."""
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if alpha != DYNAMIC and not (number and 0 <= float(alpha) < float("inf")):
        raise UserError(f"distill.intermediate.alpha: {alpha!r} is no weight; give {DYNAMIC} or a number from 0 on")


class Balance:
    """`alpha` of the next step; None as long as a dynamic one has not been measured."""

    def __init__(self, alpha: float | str) -> None:
        self.dynamic = alpha == DYNAMIC
        self.alpha = None if self.dynamic else float(alpha)

    def update(self, logits: Tensor, hidden: Tensor) -> None:
        """Take this rank's sums of the two losses over a step. Collective over all ranks if dynamic.

        The ranks of a tensor-parallel group hold equal sums, as do numerator and denominator; so one reduction over
        the world gives every rank the same bits. A ratio without meaning (no token, a student equal to its teacher, a
        loss that is not finite) leaves alpha as it is.
        """
        if not self.dynamic:
            return
        sums = torch.stack([logits, hidden])
        torch.distributed.all_reduce(sums)
        ratio = (sums[0] / sums[1]).item()
        if 0 < ratio < float("inf"):
            self.alpha = ratio
        elif self.alpha is None:
            self.alpha = 0.0
