"""Intermediate losses and the logits' loss together, against the fp64 formula, in layouts of up to 8 processes.

26 with the teacher's stages where the student's are, 12 with other ones, each of these with windows and without.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_nemo.config import IntermediateConfig
from minitron_nemo.parallel.layout import Layout
from tests.distillation.test_intermediate import (
    ALPHA,
    PAIRS,
    check,
    check_other_split,
    expected_intermediate,
    models,  # noqa: F401
    one_step,
    projection_of,
    train_config,
)
from tests.pool import run_distributed

# (tensor, sequence parallel, pipeline, virtual, data-parallel)
LAYOUTS = [
    *((tp, sp, 1, None, dp) for tp, sp in ((1, False), (2, False), (2, True), (4, False), (4, True)) for dp in (1, 2)),
    (1, False, 1, None, 4),
    *((1, False, pp, vpp, dp) for pp, vpp in ((2, None), (3, None), (4, None), (2, 2)) for dp in (1, 2)),
    *((2, sp, 2, vpp, 1) for sp in (False, True) for vpp in (None, 2)),
    *((2, True, pp, vpp, dp) for pp, vpp, dp in ((2, None, 2), (2, 2, 2), (4, None, 1))),
]


@pytest.mark.soak
@pytest.mark.parametrize(("tp", "sp", "pp", "vpp", "dp"), LAYOUTS)
def test_loss_and_gradients_match_the_fp64_formula(
    models: dict[str, Path],  # noqa: F811
    tp: int,
    sp: bool,
    pp: int,
    vpp: int | None,
    dp: int,
) -> None:
    expected = expected_intermediate(models, "student", PAIRS, "cosine")
    outcomes = run_distributed(
        tp * pp * dp,
        one_step,
        Layout(tp, pp, vpp, sequence_parallel=sp),
        (models["student"], models["teacher"]),
        IntermediateConfig(pairs=PAIRS, alpha=ALPHA),
        train_config(),
        projection_of(models, "student"),
        expected=expected,
        timeout=400.0,
    )
    # The third of four stages owns no pair, and so no copy of the map.
    check(outcomes, expected, owners=tp * dp * min(pp, 3))


def split(tp: int, sp: bool, pp: int, vpp: int | None, *layers: int) -> Layout:
    return Layout(tp, pp, vpp, sequence_parallel=sp, num_layers_per_stage=layers or None)


# Processes, the layout of the student of four layers, that of the teacher of six.
OTHER_SPLITS = [
    (2, split(1, False, 2, None), split(1, False, 2, 2)),
    (2, split(1, False, 2, None, 3, 1), split(1, False, 2, 3)),
    (2, split(1, False, 2, 2), split(1, False, 2, None)),
    (2, split(1, False, 2, 2), split(1, False, 2, 2, 2, 1, 1, 2)),
    (3, split(1, False, 3, None), split(1, False, 3, 2)),
    (4, split(1, False, 2, 2), split(1, False, 2, None, 5, 1)),
    (4, split(2, False, 2, None), split(2, False, 2, 2, 1, 1, 1, 3)),
    (4, split(2, True, 2, 2), split(2, True, 2, None, 1, 5)),
    (4, split(1, False, 4, None), split(1, False, 4, None, 3, 1, 1, 1)),
    (8, split(2, True, 2, 2), split(2, True, 2, 3)),
    (8, split(2, True, 4, None), split(2, True, 4, None, 1, 1, 1, 3)),
    (8, split(4, True, 2, None, 1, 3), split(4, True, 2, 2)),
]


@pytest.mark.soak
@pytest.mark.parametrize("buffer_bytes", [2**30, 1])
@pytest.mark.parametrize(("world_size", "student", "teacher"), OTHER_SPLITS, ids=str)
def test_loss_and_gradients_with_other_stages_of_the_teacher(
    models: dict[str, Path],  # noqa: F811
    world_size: int,
    student: Layout,
    teacher: Layout,
    buffer_bytes: int,
) -> None:
    without_pairs = world_size // 4 if student.pipeline_model_parallel_size == 4 else 0  # the third stage
    check_other_split(models, world_size, student, teacher, world_size - without_pairs, buffer_bytes)
