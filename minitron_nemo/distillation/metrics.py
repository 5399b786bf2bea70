"""metrics.jsonl and TensorBoard's events, and the figures of a training run that are no losses.

    {"iteration": 40, "time": 1764000000.1, "train/loss": 2.31, "train/lr": 1e-4, ...}

One JSON object per report, written when it is made. A run that goes on after update N keeps what the file says up to
N and forgets the rest, as TensorBoard does where a file says that a session starts: those updates are made again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.data.sampler import Sampler
from minitron_nemo.distillation.dashboard import layout
from minitron_nemo.distillation.phases import Segment
from minitron_nemo.distillation.records import read_metrics
from minitron_nemo.parallel.device import Stopwatch, current_device, memory

# Figures of one rank by tag, given the number of updates since the last report. The same tags on every rank.
Figures = Callable[[int], Mapping[str, float]]


class GrowingFile:
    """What is added to a file by and by. What a full disk refuses is kept, and written before what comes next."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._pending = b""

    def write(self, content: bytes) -> None:
        """Have the next `flush` write it."""
        self._pending += content

    def flush(self) -> str | None:
        """Write what is pending; why that could not be done, if so."""
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
        except OSError as error:
            return error.strerror
        return None

    def close(self) -> None:
        """Write what is pending, if the disk takes it."""
        self.flush()
        os.close(self._file)


class MetricsFile:
    """Appends to metrics.jsonl."""

    def __init__(self, path: Path, done: int) -> None:
        """Forget what `path` says of updates after `done`, and lines that are no record: a crash can leave half of one.

        Raises OSError.
        """
        if path.exists():
            kept = "".join(_line(record) for record in read_metrics(path) if record["iteration"] <= done)
            if kept != path.read_text(errors="replace"):
                write_atomic(path, kept)
        self.path = path
        self._file = GrowingFile(path)

    def append(self, iteration: int, values: Mapping[str, float]) -> str | None:
        """Write one record; why it could not be written yet, if so. Values that are not finite become null."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._file.write(_line({"iteration": iteration, "time": round(time.time(), 3), **finite}).encode())
        return self._file.flush()

    def close(self) -> None:
        self._file.close()


class EventsFile:
    """TensorBoard's scalars.

    In its format, but not by its writer: that hands them to a thread, which ends with a traceback on the console when
    the disk is full, and takes with it what it had not written.
    """

    def __init__(self, directory: Path, done: int) -> None:
        """A new file that has TensorBoard forget what earlier ones in `directory` say of updates after `done`.

        It begins with how its scalars are grouped. Raises OSError.
        """
        # TensorBoard reads the files of a directory in the order of their names.
        self.path = directory / f"events.out.tfevents.{time.time():.6f}.{os.uname().nodename}.{os.getpid()}"
        self._file = GrowingFile(self.path)
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=done + 1, session_log=SessionLog(status=SessionLog.START))
        self._add(summary=custom_scalars(layout()))

    def append(self, iteration: int, values: Mapping[str, float]) -> str | None:
        """Add scalars; why they could not be written yet, if so."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=iteration, summary=Summary(value=scalars))
        return self._file.flush()

    def _add(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        self._file.close()


def figures(
    optimizer: MegatronOptimizer, teacher_wait: Stopwatch, sampler: Sampler, segments: Sequence[Segment]
) -> list[Figures]:
    """What every training run reports besides its losses and its speed."""
    return [
        lambda updates: {"train/parameter_norm": parameter_norm(optimizer)},
        lambda updates: {"teacher/wait_seconds": teacher_wait.take() / updates},
        lambda updates: {f"memory/{name}": value for name, value in memory().items()},
        lambda updates: {
            "data/samples": sampler.consumed_samples,
            "data/tokens": consumed_tokens(segments, sampler.consumed_samples),
        },
    ]


@torch.no_grad()
def parameter_norm(optimizer: MegatronOptimizer) -> float:
    """L2 norm of the main parameters, the same on every rank. Collective over the whole job.

    Data-parallel ranks hold shards; copies (norms of tensor-parallel ranks, embeddings tied across stages) count once,
    by the rules of Megatron's gradient norm.
    """
    total = torch.zeros([], dtype=torch.float64, device=current_device())
    for part in optimizer.chained_optimizers:
        for parameter in part.get_parameters():
            if param_is_not_shared(parameter) and tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter):
                total += torch.linalg.vector_norm(parameter, dtype=torch.float32).double().square()
    torch.distributed.all_reduce(total)
    return math.sqrt(total.item())


def flops_per_token(student: Architecture, teacher: Architecture | None, sequence_length: int) -> int:
    """FLOPs of one token of an update, by arithmetic: forward = 1, backward = 2; 3 students and 1 teacher.

    What recomputation repeats does not count.
    """
    own = 3 * forward_flops_per_token(student, sequence_length)
    return own if teacher is None else own + forward_flops_per_token(teacher, sequence_length)


def consumed_tokens(segments: Sequence[Segment], samples: int) -> int:
    """Positions in the first `samples` samples of a run; the last segment has no end."""
    tokens = 0
    for segment in segments[:-1]:
        taken = min(samples, segment.samples)
        tokens += taken * segment.sequence_length
        samples -= taken
    return tokens + samples * segments[-1].sequence_length


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
