"""What is in flight and how long passes take, against Megatron-core's schedules and a simulation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.communication import randomised
from minitron_nemo.config import TrainConfig
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import ddp_config
from minitron_nemo.distillation.step import Step
from minitron_nemo.models.build import build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.schedule import most_in_flight, pass_time
from tests.distillation.reference import random_microbatches
from tests.distillation.test_communication import STUDENT
from tests.pool import run_distributed

MICROBATCHES = 6


def most_layers_in_flight(layout: Layout) -> int:
    """Layers whose forward has no backward yet, on this rank, at most while an update runs."""
    launch.initialize(layout, seed=1)
    config = TrainConfig(steps=1, global_batch_size=MICROBATCHES, precision="fp32")
    model = replace(STUDENT, num_layers=8)
    student = randomised(build_model(model, layout, dtype=torch.float32, ddp=ddp_config(config)))
    held = [0, 0]  # now, at most

    def count(layers: int, *_: Any) -> None:
        held[0] += layers
        held[1] = max(held)

    def watch(layers: int, module: Any, arguments: Any, output: torch.Tensor) -> None:
        count(layers)
        output.register_hook(partial(count, -layers))

    for module in student.modules:
        module.decoder.register_forward_hook(partial(watch, len(module.decoder.layers)))
    Step(student, None, DistillationObjective.cross_entropy(2**20))(random_microbatches(MICROBATCHES))
    return held[1]


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, Layout(1, 2, num_layers_per_stage=(5, 3))),
        (2, Layout(1, 2, 2, num_layers_per_stage=(1, 2, 2, 3))),
        (3, Layout(1, 3)),
        (2, Layout(1, 2, 4)),
    ],
    ids=str,
)
@pytest.mark.fast_cases(2)
def test_microbatches_in_flight_are_those_of_megatrons_schedules(size: int, layout: Layout) -> None:
    layers = layout.layers_per_stage(8)
    for rank, measured in enumerate(run_distributed(size, most_layers_in_flight, layout)):
        chunks = layers[rank::size]
        assert measured == most_in_flight(size, len(chunks), rank, MICROBATCHES, chunks)


def simulated(stages: list[float], microbatches: int) -> float:
    """1F1B, event by event; a forward takes a third of a stage's time, a backward two thirds."""
    size = len(stages)
    orders = []
    for rank in range(size):
        warm_up = min(size - rank - 1, microbatches)
        order = [("F", index) for index in range(warm_up)]
        for index in range(microbatches - warm_up):
            order += [("F", warm_up + index), ("B", index)]
        orders.append(order + [("B", index) for index in range(microbatches - warm_up, microbatches)])
    done: dict[tuple[str, int, int], float] = {}
    clocks, places = [0.0] * size, [0] * size
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for rank in range(size):
            if places[rank] == len(orders[rank]):
                continue
            kind, index = orders[rank][places[rank]]
            before = rank - 1 if kind == "F" else rank + 1
            needed = (kind, index, before)
            if 0 <= before < size and needed not in done:
                continue
            start = max(clocks[rank], done.get(needed, 0.0))
            clocks[rank] = start + stages[rank] * (1 if kind == "F" else 2) / 3
            done[kind, index, rank] = clocks[rank]
            places[rank] += 1
    return max(clocks)


@pytest.mark.parametrize("microbatches", [4, 9])
def test_a_pass_takes_what_its_events_take(microbatches: int) -> None:
    assert pass_time([3.0] * 4, 1, microbatches) == pytest.approx(simulated([3.0] * 4, microbatches))
    # Where one stage is slower, filling and draining take the others' time once: exact with the slow one last. A slow
    # first one works ahead while the others fill, for which the formula has too much.
    assert pass_time([3.0, 3.0, 4.5], 1, microbatches) == pytest.approx(simulated([3.0, 3.0, 4.5], microbatches))
    exact = simulated([4.5, 3.0, 3.0], microbatches)
    assert exact <= pass_time([4.5, 3.0, 3.0], 1, microbatches) <= exact + 3.001
