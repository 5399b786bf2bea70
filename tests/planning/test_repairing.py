"""Predicted bytes of `repair` against what torch allocates in it, on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.communication import randomised
from minitron_nemo.arch import Architecture
from minitron_nemo.config import PruneConfig, RepairConfig, recipe_of
from minitron_nemo.models.build import build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.job import Job
from minitron_nemo.planning.memory import memory
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.repair import repair_plan
from minitron_nemo.pruning.target import target_architecture
from tests.distillation.reference import random_microbatches
from tests.distillation.test_communication import STUDENT
from tests.importance.synthetic import random_values, scores_from
from tests.planning.test_memory import most_allocated
from tests.pool import run_distributed

SEQUENCE = 64
SOURCE = replace(STUDENT, num_layers=3, hidden_size=256, ffn_hidden_size=768)
LAYER_NORMED = replace(SOURCE, family="nemotron", model_type="nemotron", rotary_percent=0.5)
DEEP = replace(SOURCE, num_layers=12)
MIXTURE = replace(
    SOURCE,
    num_moe_experts=4,
    moe_ffn_hidden_size=768,
    moe_router_topk=2,
    family="mixtral",
    model_type="mixtral",
)
# Processes, the source, its cut, the fullest moment.
CUTS: dict[str, tuple[int, Architecture, dict[str, Any], dict[str, Any], str]] = {
    "neurons": (1, SOURCE, {"ffn_hidden_size": 640}, {}, "solve"),
    "neurons, TP2": (2, SOURCE, {"ffn_hidden_size": 640}, {}, "solve"),
    "neurons, a place a pass": (1, SOURCE, {"ffn_hidden_size": 640}, {"statistics_bytes": 1}, "solve"),
    "experts": (1, MIXTURE, {"num_moe_experts": 3, "moe_ffn_hidden_size": 640}, {}, "solve"),
    "channels": (1, SOURCE, {"hidden_size": 192}, {}, "solve"),
    "channels behind LayerNorms": (1, LAYER_NORMED, {"hidden_size": 192}, {}, "pass"),
    "most channels behind LayerNorms": (1, LAYER_NORMED, {"hidden_size": 248}, {}, "solve"),
    "few of many places": (1, DEEP, {"hidden_size": 16, "ffn_hidden_size": 32}, {}, "pass"),
    "rotation": (1, SOURCE, {"hidden_size": 32, "hidden_method": "rotate", "untie": True}, {}, "rotate"),
}


def job_of(world_size: int, source: Architecture, cut: dict[str, Any], repair: dict[str, Any]) -> Job:
    recipe = recipe_of([f"data.sequence_length={SEQUENCE}"])
    recipe.prune = PruneConfig(**cut, repair=RepairConfig(samples=2, **repair))
    recipe.prune.calibration.precision = "fp32"
    student = target_architecture(source, recipe.prune)
    return Job(recipe, source, source, source, student, Layout(world_size), Layout(world_size), world_size)


def allocated(job: Job, directory: Path) -> int:
    """The most bytes that a repair takes on this rank, beside the model."""
    launch.initialize(job.layout, seed=1)
    model = randomised(build_model(job.source, job.layout, dtype=torch.float32))
    config = job.recipe.prune
    plan = make_plan(scores_from(random_values(job.source), job.source), job.source, config)
    batches = random_microbatches(2, sequence_length=SEQUENCE)
    return most_allocated(lambda: repair_plan(model, batches, plan, config.repair, directory, "key"))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.slow
def test_repairs_allocate_what_is_predicted_for_the_fullest_moment(cut: str, tmp_path: Path) -> None:
    world_size, source, sizes, repair, moment = CUTS[cut]
    job = job_of(world_size, source, sizes, repair)
    (predicted,) = [each for each in memory(job, Device(cpu=True)) if each.step == "repair"]
    assert predicted.moment == moment
    expected = predicted.total - predicted.parts["weights"]
    assert max(run_distributed(world_size, allocated, job, tmp_path / "plan")) == pytest.approx(expected, rel=0.07)
