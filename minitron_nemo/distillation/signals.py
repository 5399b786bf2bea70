"""SIGTERM and SIGUSR1 ask a training run to save and stop.

The handler only raises a flag. Once per step the flags of all ranks are combined, so that every rank stops after the
same update, whichever of them the signal reached.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch

from minitron_nemo.parallel.device import current_device

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Context manager that holds the handlers; the previous ones come back at its end. Main thread only.

    `received` is the number of the signal that this rank got last; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self) -> str | None:
        """Name of the signal that some rank received, the same on all ranks, or None. Collective over all ranks."""
        flag = torch.tensor(self.received, dtype=torch.int32, device=current_device())
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        number = int(flag.item())
        return signal.Signals(number).name if number else None
