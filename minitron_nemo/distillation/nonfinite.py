"""Updates that do not happen because a loss or the gradient norm is not finite.

As in Megatron's fp16 training, the iteration and the data go on, parameters and moments stay, and the learning rate's
schedule counts the updates that happened. So a run that skips a batch is, bit for bit, the run without that batch.

After too many in a row the parameters themselves are suspect: the trainer goes back to a checkpoint's parameters and
moments, and on with the data where it stands. The updates since then count as skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.distillation.step import SUMS, Step
from minitron_nemo.parallel import launch

SHOWN = 4


class Diverged(FloatingPointError):
    """Losses or gradients stay not finite: raised by all ranks of the student alike, after the same update."""


@dataclass
class Skips:
    """Training state: iterations without an update, those of them at the end, and how often training went back."""

    skipped: int = 0
    in_a_row: int = 0
    roll_backs: int = 0

    def skip(self) -> None:
        self.skipped += 1
        self.in_a_row += 1

    def rolled_back(self, iteration: int, updates: int) -> None:
        """After `iteration`, the parameters are those of `updates` updates again."""
        self.skipped = iteration - updates
        self.in_a_row = 0
        self.roll_backs += 1


def nonfinite_losses(sums: Tensor, step: Step) -> str | None:
    """Which microbatches and samples of the step had tokens without a finite loss, the same on every rank; or None."""
    count = sums[SUMS.index("nonfinite")].clone()
    torch.distributed.all_reduce(count)
    return None if count == 0 else f"the loss is not finite: {_gathered(step.nonfinite())}"


def nonfinite_gradients(grad_norm: float, batches: Sequence[Microbatch]) -> str:
    """What to say of a batch whose losses are finite and whose gradient norm is not."""
    samples = [f"microbatch {index} (samples {', '.join(batch['sample_ids'])})" for index, batch in enumerate(batches)]
    return f"the gradient norm is {grad_norm}: {_gathered(samples)}"


def _gathered(mine: Sequence[str]) -> str:
    """The first few of what all ranks have to say, each with its data-parallel rank. Collective."""
    rank = parallel_state.get_data_parallel_rank()
    found: list[list[str]] = [[] for _ in range(launch.world_size())]
    torch.distributed.all_gather_object(found, [f"data-parallel rank {rank}, {name}" for name in mine])
    names = sorted({name for part in found for name in part})  # tensor-parallel ranks say the same
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "; ".join(names[:SHOWN]) + rest
