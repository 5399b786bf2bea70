"""Training runs for the tests: tiny models, made-up samples, things that happen at chosen updates."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.config import IntermediateConfig, TrainConfig
from minitron_nemo.data.sampler import Sampler
from minitron_nemo.distillation.intermediate import IntermediateLoss, deliveries, resolve_pairs
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import ddp_config, params_dtype
from minitron_nemo.distillation.phases import segments, stretches
from minitron_nemo.distillation.report import Report
from minitron_nemo.distillation.separate import SeparateTeacher, Worlds
from minitron_nemo.distillation.serving import Server
from minitron_nemo.distillation.signals import StopRequest
from minitron_nemo.distillation.teacher import ColocatedTeacher
from minitron_nemo.distillation.trainer import Outcome, Trainer
from minitron_nemo.distillation.transfers import Grid, Transfers
from minitron_nemo.distillation.validation import Validation
from minitron_nemo.distillation.watchdog import HEARTBEATS, Heartbeat
from minitron_nemo.evaluation.heldout import HeldOut
from minitron_nemo.models.build import build_model
from minitron_nemo.models.checkpoint import load_model, load_output_weight
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.parallel.worlds import Side, split
from tests.distillation.reference import VOCAB

SEQUENCE = 16


@dataclass(frozen=True)
class MadeUpSource:
    """64 samples of random tokens, each a function of its number."""

    sequence_length: int = SEQUENCE

    def __len__(self) -> int:
        return 64

    def sample(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(0, VOCAB, (self.sequence_length + 1,), generator=generator)
        weights = torch.rand(self.sequence_length, generator=generator)
        weights[::5] = 0.0
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "token_weights": weights,
            "id": str(index),
            "source": "made up",
        }


DOCUMENTS = [MadeUpSource().sample(number) for number in range(1000, 1005)]  # held out; 5: ranks have unequal shares


@dataclass(frozen=True)
class MadeUpBlend:
    sources: tuple[MadeUpSource, ...] = (MadeUpSource(),)
    weights: tuple[float, ...] = (1.0,)

    @property
    def sequence_length(self) -> int:
        return self.sources[0].sequence_length

    @property
    def fingerprint(self) -> str:
        return f"made up, {self.sequence_length}, {self.weights}"

    def resized(self, sequence_length: int) -> MadeUpBlend:
        return MadeUpBlend(tuple(MadeUpSource(sequence_length) for _ in self.sources), self.weights)

    def sample(self, index: tuple[int, int]) -> dict[str, Any]:
        return self.sources[index[0]].sample(index[1])


class EventfulSampler(Sampler):
    """Calls `events[n]` on every rank just before update n (counted from 1) reads its samples."""

    def __init__(self, config: TrainConfig, events: Mapping[int, Callable[[], None]], seed: int = 7) -> None:
        blend: Any = MadeUpBlend()
        super().__init__(blend, seed, stretches(config, blend))
        sizes = [part.global_batch_size for part in segments(config, SEQUENCE) for _ in range(part.steps)]
        self.updates = {start: number for number, start in enumerate(accumulate(sizes, initial=0), start=1)}
        self.events = events

    def next_batch(self, size: int) -> Any:
        event = self.events.get(self.updates[self.consumed_samples])
        if event is not None:
            event()
        return super().next_batch(size)


@dataclass(frozen=True)
class Job:
    """What a run is made of; `config` overrides a run of 6 updates of 4 sequences in fp32.

    The teacher has `teacher_layout`, or the student's; with `teachers` it runs on the last so many ranks.
    """

    student: Path
    teacher: Path | None
    directory: Path
    layout: Layout = field(default_factory=Layout)
    config: dict[str, Any] = field(default_factory=dict)
    buffer_bytes: int = 2**30
    intermediate: IntermediateConfig = field(default_factory=lambda: IntermediateConfig(pairs=[]))
    ce_weight: float | str = 0.1
    teacher_layout: Layout | None = None
    teachers: int = 0

    @property
    def teachers_own(self) -> Layout:
        return self.teacher_layout or self.layout

    def train_config(self) -> TrainConfig:
        settings: dict[str, Any] = {
            "steps": 6,
            "global_batch_size": 4,
            "lr": 1e-2,
            "min_lr": 1e-3,
            "warmup_steps": 2,
            "precision": "fp32",
            "save_interval": 100,
        }
        return TrainConfig(**{**settings, **self.config})


@dataclass(frozen=True)
class Result:
    """One rank's view of a run: `tensors` are its parameters, its shard of the optimizer and its random state."""

    outcome: str
    tensors: dict[str, Tensor]
    reports: list[Report]


def run(job: Job, events: Mapping[int, Callable[[], None]] | None = None) -> Result:
    """Build everything anew, as a fresh process would, and train. A teacher's rank returns the outcome alone."""
    if not job.teachers:
        return train_student(job, events or {})
    assert job.teacher is not None
    architectures = [Architecture.load(path) for path in (job.teacher, job.student)]
    students = launch.job_size() - job.teachers
    worlds = Worlds(Grid(job.layout, students), Grid(job.teachers_own, job.teachers, first=students))
    transfers = worlds.transfers(resolve_pairs(job.intermediate, *architectures), *architectures)
    with split(job.teachers) as side:
        if side.of_teacher:
            return Result(serve_teacher(job, side, transfers), {}, [])
        return train_student(job, events or {}, (side, transfers))


def teacher_pids(job: Job) -> list[int]:
    """Of the ranks that serve, by rank."""
    return [int(path.read_text()) for path in sorted(job.directory.glob("teacher_*.pid"))]


def serve_teacher(job: Job, side: Side, transfers: Transfers) -> Outcome:
    assert job.teacher is not None
    config = job.train_config()
    job.directory.mkdir(parents=True, exist_ok=True)
    with StopRequest() as stop, Heartbeat(job.directory / HEARTBEATS, config.hang_timeout) as heartbeat:
        launch.initialize(job.teachers_own, config.seed)
        model = build_model(Architecture.load(job.teacher), job.teachers_own, dtype=params_dtype(config))
        load_model(model, job.teacher)
        (job.directory / f"teacher_{side.rank}.pid").write_text(str(os.getpid()))
        run_segments = segments(config, SEQUENCE)
        server = Server(
            side,
            transfers,
            model,
            EventfulSampler(config, {}),
            sequence_length=max(part.sequence_length for part in run_segments),
            micro_batch_size=max(part.micro_batch_size for part in run_segments),
            buffer_bytes=job.buffer_bytes,
        )
        return server.serve(stop, heartbeat)


def train_student(
    job: Job, events: Mapping[int, Callable[[], None]], bridge: tuple[Side, Transfers] | None = None
) -> Result:
    config = job.train_config()
    launch.initialize(job.layout, config.seed)
    dtype = params_dtype(config)
    student = build_model(
        Architecture.load(job.student), job.layout, dtype=dtype, ddp=ddp_config(config), recompute=config.recompute
    )
    load_model(student, job.student)
    objective, intermediate = DistillationObjective.cross_entropy(2**20), None
    teacher: ColocatedTeacher | SeparateTeacher | None = None
    if job.teacher is not None:
        objective = DistillationObjective()
        architecture = Architecture.load(job.teacher)
        run_segments = segments(config, SEQUENCE)
        pairs = resolve_pairs(job.intermediate, architecture, student.architecture)
        if pairs:
            intermediate = IntermediateLoss(student, architecture, pairs, job.intermediate, config.seed)
    if job.teacher is not None and bridge is not None:
        last = student.output_layer is not None
        teacher = SeparateTeacher(
            *bridge,
            architecture,
            run_segments,
            dtype=dtype,
            output_weight=load_output_weight(job.teacher, job.layout, dtype) if last else None,
            buffer_bytes=job.buffer_bytes,
        )
    elif job.teacher is not None:
        model = build_model(architecture, job.teachers_own, dtype=dtype)
        load_model(model, job.teacher)
        teacher = ColocatedTeacher(
            model,
            deliveries=deliveries(pairs, model, student),
            sequence_length=max(part.sequence_length for part in run_segments),
            micro_batch_size=max(part.micro_batch_size for part in run_segments),
            buffer_bytes=job.buffer_bytes,
            student_layout=job.layout,
        )
    colocated = teacher if isinstance(teacher, ColocatedTeacher) else None
    validation = None
    if config.eval_interval:
        validation = Validation(HeldOut(DOCUMENTS, job.layout, 2), student, colocated, config.eval_interval)
    trainer = Trainer(
        config,
        objective,
        student,
        teacher,
        EventfulSampler(config, events),
        directory=job.directory / "training",
        run_dir=job.directory,
        name="distill",
        settings={"train.lr": config.lr, "train.steps": config.steps},
        intermediate=intermediate,
        ce_weight=None if job.teacher is None else job.ce_weight,
        teacher_architecture=colocated.model.architecture if colocated else None,
        validation=validation,
    )
    outcome = trainer.run()
    if isinstance(teacher, SeparateTeacher):
        teacher.close(outcome)
    tensors = {"random state": torch.get_rng_state()} | {
        f"{index}.{name}": parameter.detach().clone()
        for index, module in enumerate(student.modules)
        for name, parameter in module.named_parameters()
    }
    if intermediate is not None and intermediate.projection is not None:
        tensors["projection"] = intermediate.projection.module.weight.detach().clone()
    inner = trainer.optimizer.chained_optimizers[0].optimizer
    for number, state in inner.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value.clone() for key, value in state.items()}
    for number, group in enumerate(inner.param_groups):
        tensors |= {f"main.{number}.{i}": parameter.detach().clone() for i, parameter in enumerate(group["params"])}
    return Result(outcome, tensors, trainer.reports)


def assert_identical(first: list[Result], second: list[Result]) -> None:
    """Every parameter, main parameter, moment and step counter of every rank, bit for bit."""
    for one, other in zip(first, second, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert any(key.startswith("optimizer.") and key.endswith("exp_avg") for key in one.tensors)
        for name, tensor in one.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), name
