"""`minitron prune`: a Plan carried out, checkpoint to checkpoint. No model is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron_nemo.arch import Plan
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.errors import alone


def prune(
    teacher: Path,
    plan: Plan,
    student: Path,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Any], list[Any]] = alone,
) -> None:
    """Write the student that `plan` makes of checkpoint `teacher` to the Megatron directory `student`.

    All processes of a job call this; any number of them writes the same weights. The student, with its `plan.json`,
    appears in one piece. Raises UserError when the plan is for another model.
    """
    convert(teacher, student, "megatron", plan=plan, rank=rank, world_size=world_size, gather=gather)
