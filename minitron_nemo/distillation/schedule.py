"""The learning rate as a function of the step: no state, so a resumed run cannot disagree with an uninterrupted one.

warm-up   lr(n) = peak * n / warmup                                                  1 <= n <= warmup
cosine    lr(n) = floor + (peak - floor) * (1 + cos(pi * (n - warmup) / (steps - warmup))) / 2     else
"""

from __future__ import annotations

import math

from minitron_nemo.errors import UserError


def learning_rate(step: int, *, peak: float, floor: float, warmup_steps: int, steps: int) -> float:
    """Learning rate of the `step`-th update, counted from 1.

    The first update is a real one (peak / warmup), the update `warmup_steps` runs at `peak`, the last one at `floor`
    (2407.14679 A.10 and 2408.11796 table 4: warm-up, then cosine).
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def check_schedule(section: str, *, peak: float, floor: float, warmup_steps: int, steps: int) -> None:
    """Raise UserError, naming the keys of the recipe's `section`, for a schedule that makes no sense.

    A warm-up longer than the run is no error: a recipe tried for a few steps ends within it.
    """
    if steps < 1 or warmup_steps < 0:
        key, value = ("steps", steps) if steps < 1 else ("warmup_steps", warmup_steps)
        raise UserError(f"{section}.{key}: {value} is not a number of updates")
    if not 0 <= floor <= peak:
        raise UserError(f"{section}.min_lr: {floor:g} is not between 0 and {section}.lr {peak:g}")
