"""Everything that a plan predicts of a job, gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from minitron_nemo.parallel.device import has_transformer_engine
from minitron_nemo.planning.devices import USABLE, Device
from minitron_nemo.planning.disk import Kept, disk
from minitron_nemo.planning.job import Job
from minitron_nemo.planning.layouts import Candidate, candidates
from minitron_nemo.planning.memory import RankMemory, memory, worst
from minitron_nemo.planning.steps import untimed, whole
from minitron_nemo.planning.time import UpdateTime, distillation, efficiency


@dataclass(frozen=True)
class Estimate:
    """Memory, time and disk of `job` on `device`; `flops` are the plan's, by step. What is not known is None."""

    job: Job
    device: Device
    flops: Mapping[str, int]

    @cached_property
    def memory(self) -> list[RankMemory]:
        return memory(self.job, self.device)

    @cached_property
    def fullest(self) -> list[RankMemory]:
        """The fullest pipeline rank of every step, the fullest step first."""
        by_step: dict[str, RankMemory] = {}
        for each in self.memory:
            by_step[each.step] = max(by_step.get(each.step, each), each, key=lambda one: one.total)
        return sorted(by_step.values(), key=lambda each: -each.total)

    @cached_property
    def without_transformer_engine(self) -> int | None:
        """Bytes of the fullest rank if the job's environment lacks what the plan takes for granted; else None."""
        granted = self.device.transformer_engine and not has_transformer_engine()
        if not self.memory or not granted or self.job.recipe.cluster.container is not None:
            return None
        return worst(memory(self.job, replace(self.device, transformer_engine=False))).total

    @cached_property
    def other_recompute(self) -> RankMemory | None:
        """The fullest rank of all steps with the other `train.recompute`; None without a training."""
        recipe = self.job.recipe
        if not self.job.segments and self.job.correction is None:
            return None
        other = replace(recipe, train=replace(recipe.train, recompute=not recipe.train.recompute))
        return worst(memory(replace(self.job, recipe=other), self.device))

    @cached_property
    def efficiency(self) -> float:
        return efficiency(self.job, self.device)

    @cached_property
    def update(self) -> UpdateTime | None:
        """An update of the distillation's last phase."""
        if self.device.peak_flops is None or not self.job.segments:
            return None
        return distillation(self.job, self.job.segments[-1], self.device, self.efficiency)

    @cached_property
    def seconds(self) -> dict[str, float] | None:
        """Of every step that runs the model and is timed."""
        return whole(self.job, self.device, self.flops)

    @cached_property
    def untimed(self) -> dict[str, str]:
        """Steps that `seconds` lacks, each with the reason."""
        return untimed(self.job, self.device)

    @cached_property
    def disk(self) -> list[Kept]:
        return disk(self.job)

    @cached_property
    def layouts(self) -> list[Candidate]:
        """Layouts ranked by the time of an update; none without a distillation or a known peak."""
        if self.update is None:
            return []
        return candidates(self.job, self.device, self.efficiency)

    def to_dict(self) -> dict[str, Any]:
        device, update, seconds, other = self.device, self.update, self.seconds, self.other_recompute
        hours = None if seconds is None else sum(seconds.values()) / 3600
        return {
            "device": {**asdict(device), "usable": USABLE},
            "memory": [{**asdict(each), "total": each.total} for each in self.memory],
            "memory_without_transformer_engine": self.without_transformer_engine,
            "memory_other_recompute": None if other is None else {**asdict(other), "total": other.total},
            "fits": device.fits(self.fullest[0].total) if self.fullest else None,
            "update": None
            if update is None or device.peak_flops is None
            else {
                **asdict(update),
                "seconds": update.seconds,
                "mfu": update.mfu(device.peak_flops),
                "efficiency": self.efficiency,
            },
            "seconds": seconds,
            "untimed": self.untimed,
            "device_hours": None if hours is None else hours * self.job.world_size,
            "disk": [{**asdict(each), "total": each.total} for each in self.disk],
            "layouts": [each.to_dict() for each in self.layouts],
        }
