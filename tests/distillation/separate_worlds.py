"""Steps of a student whose teacher is in a world of its own, on made-up samples; for the pool's ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.config import IntermediateConfig, TrainConfig
from minitron_nemo.data.sampler import Sampler, microbatches
from minitron_nemo.distillation.intermediate import IntermediateLoss, resolve_pairs
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import ddp_config
from minitron_nemo.distillation.phases import segments
from minitron_nemo.distillation.separate import SeparateTeacher, Worlds
from minitron_nemo.distillation.serving import Server
from minitron_nemo.distillation.signals import StopRequest
from minitron_nemo.distillation.step import Step
from minitron_nemo.distillation.transfers import Grid, Transfers
from minitron_nemo.distillation.watchdog import Heartbeat
from minitron_nemo.models.build import build_model
from minitron_nemo.models.checkpoint import load_model, load_output_weight
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.parallel.worlds import Side, split
from tests.distillation.reference import random_microbatches
from tests.distillation.test_step import SEQUENCE


@dataclass(frozen=True)
class RandomSource:
    """The samples of `random_microbatches`."""

    count: int
    seed: int = 1

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> dict[str, Any]:
        batch = random_microbatches(self.count, sequence_length=SEQUENCE, seed=self.seed)[index]
        columns = {key: batch[key][0] for key in ("tokens", "labels", "token_weights")}
        return {**columns, "id": f"{self.seed}: {batch['sample_ids'][0]}", "source": "random"}


@dataclass(frozen=True)
class RandomBlend:
    sources: tuple[RandomSource, ...]
    weights: tuple[float, ...] = (1.0,)
    sequence_length: int = SEQUENCE
    fingerprint: str = "random"

    def sample(self, index: tuple[int, int]) -> dict[str, Any]:
        return self.sources[index[0]].sample(index[1])


@dataclass(frozen=True)
class Case:
    """Two worlds, what the student is trained on, and how much room it has."""

    student: Layout
    students: int
    teacher: Layout
    teachers: int
    student_dir: Path
    teacher_dir: Path
    pairs: list[list[int]]
    alpha: Any = 0.0
    samples: int = 4
    buffer_bytes: int = 2**30
    teacher_seed: int = 1  # of the samples that the teacher's ranks have

    @property
    def size(self) -> int:
        return self.students + self.teachers

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(steps=3, global_batch_size=self.samples, precision="fp32")

    @property
    def intermediate(self) -> IntermediateConfig:
        return IntermediateConfig(pairs=self.pairs, alpha=self.alpha)

    def sampler(self, seed: int = 1) -> Sampler:
        blend: Any = RandomBlend((RandomSource(self.samples, seed),))
        return Sampler(blend, seed=7)


@contextmanager
def student_step(
    case: Case, projection: Tensor | None = None, watch: Callable[[Any], None] = lambda one: None
) -> Iterator[tuple[Step, Callable[[], list[Any]]] | None]:
    """On a rank: the student's step and what gives it its share of the next batch; None, at the end, on a teacher's.

    `watch` gets the server or the teacher source when it is there.
    """
    teacher, student = (Architecture.load(path) for path in (case.teacher_dir, case.student_dir))
    worlds = Worlds(Grid(case.student, case.students), Grid(case.teacher, case.teachers, first=case.students))
    pairs = resolve_pairs(case.intermediate, teacher, student)
    transfers = worlds.transfers(pairs, teacher, student)
    with split(case.teachers) as side:
        launch.initialize(case.teacher if side.of_teacher else case.student, seed=1)
        if side.of_teacher:
            model = build_model(teacher, case.teacher, dtype=torch.float32)
            load_model(model, case.teacher_dir)
            server = Server(
                side,
                transfers,
                model,
                case.sampler(case.teacher_seed),
                sequence_length=SEQUENCE,
                micro_batch_size=1,
                buffer_bytes=case.buffer_bytes,
            )
            watch(server)
            with StopRequest() as stop, Heartbeat(Path("/nowhere"), 0) as heartbeat:
                assert server.serve(stop, heartbeat) == "done"
            yield None
        else:
            source, step = _student(case, side, transfers, pairs, projection)
            watch(source)
            sampler = case.sampler()

            def share() -> list[Any]:
                position = sampler.consumed_samples
                return microbatches(
                    sampler.blend,
                    sampler.next_batch(case.samples),
                    parallel_state.get_data_parallel_rank(),
                    parallel_state.get_data_parallel_world_size(),
                    1,
                    position,
                )

            yield step, share
            source.close("done")


def _student(
    case: Case, side: Side, transfers: Transfers, pairs: Any, projection: Tensor | None
) -> tuple[SeparateTeacher, Step]:
    student = build_model(
        Architecture.load(case.student_dir), case.student, dtype=torch.float32, ddp=ddp_config(case.config)
    )
    load_model(student, case.student_dir)
    teacher = Architecture.load(case.teacher_dir)
    intermediate = IntermediateLoss(student, teacher, pairs, case.intermediate, seed=1) if pairs else None
    for chunk in intermediate.chunks if intermediate else []:
        chunk.module.weight.data.copy_(projection)
    on_last = student.output_layer is not None
    source = SeparateTeacher(
        side,
        transfers,
        teacher,
        segments(case.config, SEQUENCE),
        dtype=torch.float32,
        output_weight=load_output_weight(case.teacher_dir, case.student, torch.float32) if on_last else None,
        buffer_bytes=case.buffer_bytes,
    )
    return source, Step(student, source, DistillationObjective(), intermediate=intermediate)
