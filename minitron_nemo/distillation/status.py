"""`RUN/status.json`: what a run is doing, for whoever decides about requeueing. Always whole, never half-written."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

from minitron_nemo.checkpoint.files import write_atomic

FILE_NAME = "status.json"
SCHEMA_VERSION = 1

State = Literal["running", "stopped", "done", "failed"]


def write_status(
    run_dir: Path,
    state: State,
    *,
    step: str | None = None,
    iteration: int | None = None,
    steps: int | None = None,
    reason: str | None = None,
) -> None:
    """Replace `run_dir`/status.json.

    `step` names the arrow of the chain; `iteration` of `steps` is the last finished update of a training step. A batch
    script requeues on "stopped" (state is saved), and not on "failed", whose `reason` says why.
    """
    status = {
        "schema_version": SCHEMA_VERSION,
        "state": state,
        "step": step,
        "iteration": iteration,
        "steps": steps,
        "reason": reason,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_atomic(run_dir / FILE_NAME, json.dumps(status, indent=2) + "\n")


def write_failure(run_dir: Path, **details: Any) -> None:
    """The same for "failed", in the midst of an error that matters more than a disk that takes no more."""
    try:
        write_status(run_dir, "failed", **details)
    except OSError as error:
        print(f"{run_dir / FILE_NAME}: cannot be written: {error.strerror}", file=sys.stderr, flush=True)
