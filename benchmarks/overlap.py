"""How much of a separate teacher's time is hidden behind the student's.

    torchrun --nproc-per-node 2 benchmarks/overlap.py [--teachers 1] [--updates 8] [--trace overlap.json]

The job's last `--teachers` processes run the teacher, the others train the student, data-parallel on both sides. The
same updates are run with the teacher colocated on the student's processes first. Models have the shape of a third of
SmolLM2-135M's layers with a vocabulary of 8192, and random weights; the student's FFN has the size `--ffn`. The trace
is one for chrome://tracing or ui.perfetto.dev: teacher's passes, student's waits and the student's forward and backward
passes by rank. The first update, behind which no teacher can hide, is in the trace and not in the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from step import randomised

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.axes import Axis
from minitron_nemo.data.sampler import Microbatch, Sampler, microbatches
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.phases import Segment
from minitron_nemo.distillation.separate import SeparateTeacher, Worlds
from minitron_nemo.distillation.serving import Server
from minitron_nemo.distillation.signals import StopRequest
from minitron_nemo.distillation.step import Step
from minitron_nemo.distillation.teacher import ColocatedTeacher, TeacherSource
from minitron_nemo.distillation.transfers import Grid, Transfers
from minitron_nemo.distillation.watchdog import Heartbeat
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.parallel.worlds import Side, split

TEACHER, STUDENT, WAIT = "teacher", "student", "wait"
MARKS = {TEACHER: "T", STUDENT: "S", WAIT: "w"}
COLUMNS = 100
SHAPE = Architecture(
    num_layers=10,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=8192,
    max_position_embeddings=8192,
    share_embeddings_and_output_weights=True,
)


class Span(NamedTuple):
    rank: int
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Random:
    """A blend of one source of random tokens."""

    sequence_length: int
    weights: tuple[float, ...] = (1.0,)

    @property
    def sources(self) -> list[range]:
        return [range(4096)]

    def sample(self, index: tuple[int, int]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index[1])
        text = torch.randint(0, SHAPE.vocab_size, (self.sequence_length + 1,), generator=generator)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "token_weights": torch.ones(len(text) - 1),
            "id": str(index[1]),
        }


def main() -> None:
    options = parse()
    launch.join_job()
    students = launch.job_size() - options.teachers
    worlds = Worlds(Grid(Layout(), students), Grid(Layout(), options.teachers, first=students))
    student = SHAPE.resized({Axis.FFN: options.ffn})
    run = (Segment(options.updates, options.sequence_length, options.microbatches * students, 1),)
    spans: dict[str, list[Span]] = {"colocated": [], "separate": []}
    with split(options.teachers) as side:
        launch.initialize(Layout(), seed=1)
        teacher = None
        if side.of_teacher:
            serve(side, worlds.transfers([], SHAPE, student), options, spans["separate"])
        else:
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
            model = randomised(build_model(student, Layout(), dtype=torch.float32, ddp=ddp))
            teacher = randomised(build_model(SHAPE, Layout(), dtype=torch.float32))
            colocated = ColocatedTeacher(
                teacher,
                sequence_length=options.sequence_length,
                micro_batch_size=1,
                buffer_bytes=options.buffer_bytes,
                student_layout=Layout(),
            )
            train(model, colocated, run, options, spans["colocated"])
            source = SeparateTeacher(
                side,
                worlds.transfers([], SHAPE, student),
                SHAPE,
                run,
                dtype=torch.float32,
                output_weight=colocated.output_weight,
                buffer_bytes=options.buffer_bytes,
            )
            train(model, source, run, options, spans["separate"])
            source.close("done")
    gathered: list[Any] = [None] * launch.job_size()
    torch.distributed.all_gather_object(gathered, spans)
    if launch.rank() == 0:
        for placement in spans:
            report(placement, [span for one in gathered for span in one[placement]], students, options)


def serve(side: Side, transfers: Transfers, options: argparse.Namespace, spans: list[Span]) -> None:
    model = randomised(build_model(SHAPE, Layout(), dtype=torch.float32))
    blend: Any = Random(options.sequence_length)
    server = Server(
        side,
        transfers,
        model,
        Sampler(blend, seed=1),
        sequence_length=options.sequence_length,
        micro_batch_size=1,
        buffer_bytes=options.buffer_bytes,
    )
    server._pass = timed(server._pass, TEACHER, spans)  # type: ignore[method-assign]
    with StopRequest() as stop, Heartbeat(Path(), 0) as heartbeat:
        server.serve(stop, heartbeat)


def train(
    student: Model, teacher: TeacherSource, run: Sequence[Segment], options: argparse.Namespace, spans: list[Span]
) -> None:
    blend: Any = Random(options.sequence_length)
    sampler = Sampler(blend, seed=1)
    step = Step(student, teacher, DistillationObjective())
    step._forward_backward = timed(step._forward_backward, STUDENT, spans)  # type: ignore[method-assign]
    name = TEACHER if isinstance(teacher, ColocatedTeacher) else WAIT
    teacher.step = timed(teacher.step, name, spans)  # type: ignore[method-assign]
    for _ in range(options.updates):
        step(share(sampler, run[0]))


def share(sampler: Sampler, segment: Segment) -> list[Microbatch]:
    position = sampler.consumed_samples
    ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return microbatches(sampler.blend, sampler.next_batch(segment.global_batch_size), *ranks, 1, position)


def timed(function: Callable[..., Any], name: str, spans: list[Span]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        start = time.time()
        try:
            return function(*arguments)
        finally:
            spans.append(Span(launch.job_rank(), name, start, time.time()))

    return call


def report(placement: str, spans: list[Span], students: int, options: argparse.Namespace) -> None:
    """Figures, a timeline in text, and the trace."""
    own = [[span for span in spans if span.rank == rank] for rank in range(launch.job_size())]
    second = min(span.start for span in own[0][2:])  # what follows the first update's pair of spans
    end = max(span.end for span in spans)
    waits = [span for rank in own[:students] for span in rank if span.name != STUDENT and span.start >= second]
    waited = sum(span.end - span.start for span in waits) / students / (options.updates - 1)
    update = (max(span.end for span in own[0]) - second) / (options.updates - 1)
    print(f"{placement}: {update:.3f} s an update, teacher/wait_seconds {waited:.3f}")
    if placement == "separate":
        passes = [span for span in spans if span.name == TEACHER and span.end > second]
        busy = sum(span.end - max(span.start, second) for span in passes)
        exposed = sum(overlap(span, wait) for span in passes for wait in waits if wait.rank == 0)
        print(f"teacher's passes {busy:.3f} s, of which {1 - exposed / busy:.1%} while the student computed")
        events = [event(span) for span in spans]
        Path(options.trace).write_text(json.dumps({"traceEvents": events}))
    start = min(span.start for span in spans)
    for rank, found in enumerate(own):
        if found:
            print(f"rank {rank} {''.join(timeline(found, start, end))}")
    print(f"       {COLUMNS} columns of {(end - start) / COLUMNS:.3f} s; T teacher, S student, w student waits\n")


def overlap(one: Span, other: Span) -> float:
    return max(0.0, min(one.end, other.end) - max(one.start, other.start))


def event(span: Span) -> dict[str, Any]:
    """Complete event of the Trace Event Format, in microseconds."""
    times = {"ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6}
    return {"name": span.name, "ph": "X", "pid": 0, "tid": span.rank, **times}


def timeline(spans: Sequence[Span], start: float, end: float) -> Iterator[str]:
    """For each column what takes most of it."""
    width = (end - start) / COLUMNS
    for column in range(COLUMNS):
        bin_ = Span(0, "", start + column * width, start + (column + 1) * width)
        most = max(spans, key=partial(overlap, bin_))
        yield MARKS[most.name] if overlap(bin_, most) > width / 2 else "."


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, default=1)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=4, help="of a rank of the student, an update")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--buffer-bytes", type=int, default=2**31)
    parser.add_argument("--trace", default="overlap.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
