"""What an update is predicted to communicate against what reaches the process groups while one runs, to the byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.communication import Communication, Counts, counted, randomised
from minitron_nemo.arch import Architecture
from minitron_nemo.config import TrainConfig, load_recipe
from minitron_nemo.distillation.communication import Transfer, Update, transfers, wire_bytes
from minitron_nemo.distillation.intermediate import Pair
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import ddp_config
from minitron_nemo.distillation.step import Step
from minitron_nemo.distillation.teacher import TeacherSignal
from minitron_nemo.kernels import SparseTeacher
from minitron_nemo.models.build import build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.plan_text import text
from minitron_nemo.preflight import preflight
from tests.distillation.reference import random_microbatches
from tests.models.support import architecture
from tests.pool import run_distributed

TEACHER = architecture(num_layers=6)
STUDENT = replace(architecture(), hidden_size=48, ffn_hidden_size=64)
TIED = replace(STUDENT, share_embeddings_and_output_weights=True)
THREE_GROUPS = replace(STUDENT, num_attention_heads=6, num_query_groups=3)
MIXTURE = replace(
    STUDENT,
    num_moe_experts=6,
    moe_ffn_hidden_size=64,
    moe_router_topk=2,
    family="mixtral",
    model_type="mixtral",
)
SHARED = replace(MIXTURE, moe_shared_expert_intermediate_size=32, family="qwen2_moe", model_type="qwen2_moe")
PAIRS = [Pair(-1, -1), Pair(5, 0), Pair(3, 2), Pair(0, 3)]

# Processes, layouts of student and teacher (None: the same), the student, the rest.
CASES: dict[str, tuple[int, Layout, Layout | None, Architecture, dict[str, Any]]] = {
    "TP2 SP DP2, recomputed": (4, Layout(2, sequence_parallel=True), None, STUDENT, {"recompute": True}),
    "TP2 SP DP2, experts, recomputed": (4, Layout(2, sequence_parallel=True), None, MIXTURE, {"recompute": True}),
    "TP2 SP PP2, a shared expert": (4, Layout(2, 2, sequence_parallel=True), None, SHARED, {}),
    "TP2 PP2, JSD, recomputed": (4, Layout(2, 2), None, STUDENT, {"divergence": "jsd", "recompute": True}),
    "PP2 VPP2 DP2, tied, teacher without VPP": (
        4,
        Layout(1, 2, 2),
        Layout(1, 2, num_layers_per_stage=(2, 4)),
        TIED,
        {},
    ),
    # The teacher keeps its 4 groups, the student has one of zeros.
    "TP2 SP, a group of zeros": (2, Layout(2, sequence_parallel=True), None, THREE_GROUPS, {"pairs": []}),
    "PP3, teacher VPP2, no pairs": (3, Layout(1, 3), Layout(1, 3, 2), STUDENT, {"pairs": []}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_predicted_bytes_are_those_that_an_update_communicates(case: str) -> None:
    world_size, layout, teacher_layout, student, options = CASES[case]
    outcomes = run_distributed(
        world_size, counted, layout, teacher_layout, TEACHER, student, timeout=240.0, **{"pairs": PAIRS, **options}
    )
    for measured, predicted, small in outcomes:
        assert measured
        assert measured == predicted
        assert small < 2000


class Cache:
    """Stands in for a cached teacher of five entries a token."""

    window = 8

    def step(self, microbatches: Any) -> TeacherSignal:
        count = microbatches[0]["tokens"].numel()
        teacher = SparseTeacher(torch.arange(5).expand(count, 5), torch.full((count, 5), -2.0), torch.zeros(count))
        return TeacherSignal([], None, sparse=[teacher] * len(microbatches))


def counted_with_a_cache(layout: Layout) -> tuple[Counts, Counts]:
    launch.initialize(layout, seed=1)
    config = TrainConfig(steps=1, global_batch_size=2, precision="fp32")
    student = randomised(build_model(STUDENT, layout, dtype=torch.float32, ddp=ddp_config(config)))
    step = Step(student, Cache(), DistillationObjective())
    with Communication() as communication:
        step(random_microbatches(2, sequence_length=16))
    predicted: Counts = Counter()
    update = Update(STUDENT, layout, 2, 2, 1, 16, 4, teacher=TEACHER, placement="cached", cached_entries=5)
    for transfer in transfers(update, 0):
        predicted[transfer.group, transfer.kind] += transfer.bytes
    return communication.counts, predicted


@pytest.mark.slow
def test_a_cached_teacher_is_known_by_its_entries_alone() -> None:
    for measured, predicted in run_distributed(2, counted_with_a_cache, Layout(2)):
        assert measured == predicted != {}


def test_states_of_a_separate_teacher_cross_once() -> None:
    """36 sequences of 8192 states of 4096 in bf16, an eighth for each tensor-parallel rank: 0.3 GB."""
    teacher = replace(TEACHER, hidden_size=4096, num_attention_heads=32)
    layout = Layout(8, 2, sequence_parallel=True)
    update = Update(STUDENT, layout, 512, 36, 1, 8192, 2, teacher=teacher, placement="separate", pairs=[Pair(2, 1)])
    first, last = (transfers(update, rank) for rank in (0, 1))
    assert [each for each in first if each.part == "teacher"] == []
    states = 36 * 8192 * 4096 * 2 // 8
    assert [each for each in last if each.part == "teacher"] == [Transfer("teacher", "teacher", "receive", 2, states)]
    assert Transfer("pairs", "teacher", "receive", 2, states) in last  # the norm of layer 2 is on the second stage
    assert wire_bytes(last)["teacher"] == 2 * states


def test_rings_send_every_byte_but_the_own_part() -> None:
    sent = {kind: Transfer("", "dp", kind, 4, 1000).wire_bytes for kind in ("all_reduce", "all_gather", "send")}
    assert sent == {"all_reduce": 1500, "all_gather": 750, "send": 1000}


def test_plan_says_what_an_update_communicates() -> None:
    """Llama 3.1 8B -> 4B with TP4 on 256 GPUs; the dominating terms written out."""
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "llama31_8b_to_4b_width.yaml")
    plan = preflight(recipe)
    ((*found,),) = plan.communication
    by_part = {(each.part, each.group, each.kind): each.bytes for each in found}
    student, teacher = (18 * 8192 * width * 2 for width in (3072, 4096))  # states of 18 sequences
    assert by_part["teacher", "tp", "all_gather"] == 32 * 2 * teacher
    assert by_part["teacher", "tp", "reduce_scatter"] == (32 * 2 + 1) * teacher
    assert by_part["student", "tp", "all_gather"] == (32 * 6 + 1) * student
    assert by_part["student", "tp", "reduce_scatter"] == (32 * 4 + 1) * student
    assert by_part["loss", "tp", "all_gather"] == student + teacher + 18 * 4 * 8192 * 9 * 8
    own = by_part["gradients", "dp", "reduce_scatter"]
    assert own == pytest.approx(4 * 4.513e9 / 4, rel=1e-3)
    assert by_part["parameters", "dp", "all_gather"] == own // 2
    assert f"dp {own * 1.5 * 63 / 64 / 1e9:.3g} GB" in text(plan)
    assert plan.to_dict()["communication"][0][0]["wire_bytes"] == found[0].wire_bytes
