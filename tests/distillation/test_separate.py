"""`teacher.placement: separate`: the fp64 formula over pairs of layouts, bounded buffers, samples that must agree."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.distillation.separate import SeparateTeacher
from minitron_nemo.distillation.serving import Server
from minitron_nemo.distillation.step import SUMS
from minitron_nemo.parallel.layout import Layout
from tests.distillation.reference import Expected as ExpectedStep
from tests.distillation.reference import expected_step, random_microbatches
from tests.distillation.separate_worlds import Case, student_step
from tests.distillation.test_intermediate import (
    ALPHA,
    PAIRS,
    Expected,
    check,
    expected_intermediate,
    models,  # noqa: F401
    projection_gradient,
    projection_of,
)
from tests.distillation.test_step import SEQUENCE, whole_gradients, worst_gradient
from tests.pool import run_distributed

ONE = Layout()
TP2 = Layout(tensor_model_parallel_size=2)
SP2 = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = Layout(pipeline_model_parallel_size=2)
VPP2 = Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
STATE = SEQUENCE * 64 * 4  # bytes of one state of one microbatch of the teacher

# student, its processes, teacher, its processes
COVERING: dict[str, tuple[Layout, int, Layout, int]] = {
    "TP2 | PP2": (TP2, 2, PP2, 2),
    "PP2 | TP2 SP": (PP2, 2, SP2, 2),
    "DP2 | one process": (ONE, 2, ONE, 1),
    "TP2 SP | DP2": (SP2, 2, ONE, 2),
    "PP2 VPP2 | PP2 VPP2": (VPP2, 2, VPP2, 2),
}


def case_of(models: dict[str, Path], name: str, **changes: Any) -> Case:  # noqa: F811
    student, students, teacher, teachers = COVERING[name]
    settings = {"pairs": [], **changes}
    return Case(student, students, teacher, teachers, models["student"], models["teacher"], **settings)


def steps_with_pairs(case: Case, projection: Tensor | None, expected: Expected) -> tuple[Any, ...] | None:
    """On a rank: of the last of three steps of the same samples, what `check` of the intermediate losses takes."""
    with student_step(case, projection) as student:
        if student is None:
            return None
        step, share = student
        for _ in range(3):
            sums = step(share())
        for group in (parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
            torch.distributed.all_reduce(sums, group=group)
        assert sums[SUMS.index("nonfinite")] == 0
        worst = worst_gradient(whole_gradients(step.student), expected.gradients, groups=4)
        found = sums[SUMS.index("hidden")].item(), worst, projection_gradient(step)
    return found


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.slow
def test_loss_and_gradients_match_the_fp64_formula(models: dict[str, Path], name: str) -> None:  # noqa: F811
    """Pairs from every stage of the teacher to every stage of the student; batches asked for ahead."""
    case = case_of(models, name, pairs=PAIRS, alpha=ALPHA)
    expected = expected_intermediate(models, "student", PAIRS, "cosine")
    outcomes = run_distributed(case.size, steps_with_pairs, case, projection_of(models, "student"), expected)
    assert outcomes[case.students :] == [None] * case.teachers
    check(outcomes[: case.students], expected, owners=case.students)


def last_of_steps(case: Case, expected: ExpectedStep) -> tuple[list[float], tuple[float, str]] | None:
    with student_step(case) as student:
        if student is None:
            return None
        step, share = student
        for _ in range(3):
            sums = step(share())
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        found = sums.tolist(), worst_gradient(whole_gradients(step.student), expected.gradients, groups=4)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["teacher", "tied"])
def test_a_teacher_with_another_head_on_a_student_of_two_parts(models: dict[str, Path], teacher: str) -> None:  # noqa: F811
    """The output weight is cut for the student: tied or not, with the padding of the student's layout."""
    case = replace(case_of(models, "TP2 | PP2"), teacher_dir=models[teacher])
    expected = expected_step(models["student_hf"], models[f"{teacher}_hf"], random_microbatches(4))
    for found in run_distributed(case.size, last_of_steps, case, expected)[: case.students]:
        sums, (error, name) = found
        assert sums[SUMS.index("logits")] == pytest.approx(expected.logits, rel=1e-5)
        assert error < 1e-5, name


def bytes_held(case: Case) -> tuple[int, int]:
    """On a rank: the most bytes of states that were alive at once, and the window."""
    alive: dict[int, int] = {}
    peak = 0

    def count(tensor: Tensor) -> None:
        nonlocal peak
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        peak = max(peak, sum(alive.values()))

    def watch(one: SeparateTeacher | Server) -> None:
        if isinstance(one, SeparateTeacher):
            make = one._buffer

            def counted(window: Any) -> Tensor:
                tensor = make(window)
                count(tensor)
                return tensor

            one._buffer = counted  # type: ignore[method-assign]
            return
        send = one._send

        def counting(item: Any, microbatch: Any, states: dict[int, Tensor]) -> None:
            for state in states.values():
                count(state)
            send(item, microbatch, states)

        one._send = counting  # type: ignore[method-assign]

    with student_step(case, projection=torch.randn(64, 48), watch=watch) as student:
        if student is not None:
            step, share = student
            for _ in range(3):
                step(share())
    if student is None:
        return peak, 0
    assert isinstance(step.teacher, SeparateTeacher)
    return peak, step.teacher.window


@pytest.mark.slow
@pytest.mark.parametrize(("room", "window", "most"), [(1, 1, 1), (2, 1, 2), (5, 2, 4), (100, 50, 3 * 8)])
def test_no_more_is_held_than_fits_the_buffer(
    models: dict[str, Path],  # noqa: F811
    room: int,
    window: int,
    most: int,
) -> None:
    """Of 8 microbatches an update, each a final state and that of a pair: a window in use and two under way."""
    case = case_of(
        models, "DP2 | one process", pairs=[[1, 2]], alpha="dynamic", samples=16, buffer_bytes=room * 2 * STATE
    )
    outcomes = run_distributed(case.size, bytes_held, case)
    for peak, found in outcomes[: case.students]:
        assert found == window
        assert peak == most * 2 * STATE <= case.buffer_bytes
    assert 0 < outcomes[-1][0] <= max(case.buffer_bytes, 2 * STATE)


@pytest.mark.slow
def test_samples_that_the_teacher_reads_otherwise_are_an_error(models: dict[str, Path]) -> None:  # noqa: F811
    case = case_of(models, "TP2 | PP2", teacher_seed=2)
    with pytest.raises(RuntimeError, match="computed other samples than the student's are training on .*1: "):
        run_distributed(case.size, bytes_held, case)
