"""The learning rate as a function of the step: no state, so a resumed run cannot disagree with an uninterrupted one.

With t the share of the decay that is over, in [0, 1]:

warm-up   lr(n) = peak * n / warmup_steps                              n <= warmup_steps
cosine    lr(n) = floor + (peak - floor) * (1 + cos(pi * t)) / 2       decaying from the warm-up's end
linear    lr(n) = peak + (floor - peak) * t                            likewise
WSD       peak until `wsd_decay_steps` before the end, then linear     (2404.06395 section 4)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minitron_nemo.config import TrainConfig
from minitron_nemo.errors import UserError

DECAY_STYLES = ("cosine", "linear", "WSD")


@dataclass(frozen=True)
class Schedule:
    """Warm-up and decay over `steps` updates, counted from 1.

    The first update is a real one (peak / warmup_steps), the update `warmup_steps` runs at `peak`, the last one at
    `floor` (2407.14679 A.10 and 2408.11796 table 4: warm-up, then cosine).
    """

    steps: int
    peak: float
    floor: float
    warmup_steps: int
    decay_style: str = "cosine"
    wsd_decay_steps: int = 0

    @staticmethod
    def from_config(config: TrainConfig) -> Schedule:
        return Schedule(
            steps=config.steps,
            peak=config.lr,
            floor=config.min_lr,
            warmup_steps=config.warmup_steps,
            decay_style=config.lr_decay_style,
            wsd_decay_steps=config.lr_wsd_decay_steps,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of update `step`."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        start = self.steps - self.wsd_decay_steps if self.decay_style == "WSD" else self.warmup_steps
        if step <= start:
            return self.peak
        over = min((step - start) / (self.steps - start), 1.0)
        if self.decay_style == "cosine":
            return self.floor + (self.peak - self.floor) * 0.5 * (1.0 + math.cos(math.pi * over))
        return self.peak + (self.floor - self.peak) * over

    def check(self, section: str) -> None:
        """Raise UserError, naming the keys of the recipe's `section`, for a schedule that makes no sense.

        A warm-up longer than the run is no error: a recipe tried for a few steps ends within it.
        """
        if self.steps < 1 or self.warmup_steps < 0:
            key, value = ("steps", self.steps) if self.steps < 1 else ("warmup_steps", self.warmup_steps)
            raise UserError(f"{section}.{key}: {value} is not a number of updates")
        if not 0 <= self.floor <= self.peak:
            raise UserError(f"{section}.min_lr: {self.floor:g} is not between 0 and {section}.lr {self.peak:g}")
        if self.decay_style not in DECAY_STYLES:
            raise UserError(f"{section}.lr_decay_style: {self.decay_style!r} is not one of {', '.join(DECAY_STYLES)}")
        if self.decay_style == "WSD" and not 0 < self.wsd_decay_steps <= self.steps:
            raise UserError(
                f"{section}.lr_wsd_decay_steps: {self.wsd_decay_steps} is not between 1 and {section}.steps "
                f"{self.steps}; WSD falls from {section}.lr to {section}.min_lr over that many updates"
            )
