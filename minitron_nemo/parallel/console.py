"""Standard output and error: warnings that are left unsaid, and lines that a full disk does not take."""

from __future__ import annotations

import errno
import io
import sys
import warnings
from typing import Any

# Said once per process by every run and nobody's fault: advice for CUDA streams, fall-backs that are chosen here, and
# deprecations between Megatron-core and torch.
KNOWN_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "When using (async grad allreduce|sequence parallelism) it is recommended",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "`torch.distributed.*` is deprecated",
)


def silence_known_warnings() -> None:
    """Leave KNOWN_WARNINGS unsaid from here on; most come with Megatron-core's import."""
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


class _Log(io.FileIO):
    """A file that forgets what a full disk does not take."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return len(data)


def outlive_a_full_disk() -> None:
    """Let standard output and error lose lines where their file's disk is full: a training must not end of that."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        log = io.BufferedWriter(_Log(old.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(log, old.encoding, old.errors, write_through=True, line_buffering=True))
