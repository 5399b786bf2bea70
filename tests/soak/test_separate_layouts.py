"""A teacher in a world of its own: both losses against the fp64 formula, in pairs of layouts of up to 8 processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_nemo.parallel.layout import Layout
from tests.distillation.separate_worlds import Case
from tests.distillation.test_intermediate import (
    ALPHA,
    PAIRS,
    check,
    expected_intermediate,
    models,  # noqa: F401
    projection_of,
)
from tests.distillation.test_separate import STATE, steps_with_pairs
from tests.pool import run_distributed

# Of the student and of the teacher: (tensor, sequence parallel, pipeline, virtual, data-parallel)
Sizes = tuple[int, bool, int, int | None, int]
PAIRINGS: list[tuple[Sizes, Sizes]] = [
    ((1, False, 1, None, 1), (4, True, 1, None, 1)),
    ((1, False, 1, None, 4), (1, False, 1, None, 3)),
    ((1, False, 1, None, 2), (2, False, 2, None, 1)),
    ((2, True, 1, None, 1), (1, False, 4, None, 1)),
    ((2, False, 2, None, 1), (1, False, 2, None, 2)),
    ((2, True, 2, None, 1), (2, True, 1, None, 2)),
    ((4, True, 1, None, 1), (2, False, 1, None, 1)),
    ((4, False, 1, None, 1), (1, False, 3, None, 1)),
    ((1, False, 4, None, 1), (2, True, 2, None, 1)),
    ((1, False, 3, None, 1), (1, False, 2, 2, 1)),
    ((1, False, 2, 2, 1), (4, False, 1, None, 1)),
    ((2, True, 2, 2, 1), (1, False, 2, 2, 2)),
    ((1, False, 2, 2, 2), (1, False, 1, None, 3)),
    ((1, False, 2, None, 2), (2, True, 2, 2, 1)),
]


@pytest.mark.soak
@pytest.mark.parametrize("room", [2**30, 3 * STATE], ids=["whole batches", "windows"])
@pytest.mark.parametrize(("student", "teacher"), PAIRINGS)
def test_loss_and_gradients_match_the_fp64_formula(
    models: dict[str, Path],  # noqa: F811
    student: Sizes,
    teacher: Sizes,
    room: int,
) -> None:
    layouts, processes = [], []
    for tp, sp, pp, vpp, dp in (student, teacher):
        layouts.append(Layout(tp, pp, vpp, sequence_parallel=sp))
        processes.append(tp * pp * dp)
    case = Case(
        *(layouts[0], processes[0], layouts[1], processes[1]),
        *(models["student"], models["teacher"]),
        pairs=PAIRS,
        alpha=ALPHA,
        buffer_bytes=room,
    )
    expected = expected_intermediate(models, "student", PAIRS, "cosine")
    projection = projection_of(models, "student")
    outcomes = run_distributed(case.size, steps_with_pairs, case, projection, expected, timeout=400.0)
    tp, _, pp, _, dp = student
    # The third of four stages owns no pair, and so no copy of the map.
    check(outcomes[: case.students], expected, owners=tp * dp * min(pp, 3))
