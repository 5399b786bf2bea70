"""`minitron prune`: a Plan carried out, checkpoint to checkpoint. No model is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from minitron_nemo.arch import Plan
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.checkpoint.transform import convert

PLAN_FILE = "plan.json"


def prune(teacher: Path, plan: Plan, student: Path, rank: int, world_size: int, barrier: Callable[[], None]) -> None:
    """Write the student that `plan` makes of checkpoint `teacher` to the Megatron directory `student`.

    All processes of a job call this; any number of them writes the same weights. The student appears in one piece, and
    its `plan.json` right after it. Raises UserError when the plan is for another model.
    """
    convert(teacher, student, "megatron", plan=plan, rank=rank, world_size=world_size, barrier=barrier)
    if rank == 0:
        write_atomic(student / PLAN_FILE, json.dumps(plan.to_dict()) + "\n")
    barrier()
