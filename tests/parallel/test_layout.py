"""Layouts that a model cannot run on are refused in one line that names the key."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minitron_nemo.arch import Architecture
from minitron_nemo.config import ParallelConfig
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.pool import run_distributed

SMOLLM2 = Architecture(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    max_position_embeddings=8192,
)


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        (Layout(), 1),
        (Layout(), 5),
        (Layout(tensor_model_parallel_size=3, sequence_parallel=True), 6),
        (Layout(tensor_model_parallel_size=2), 2),
        (Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=5), 2),
        (Layout(tensor_model_parallel_size=3, pipeline_model_parallel_size=2), 6),
    ],
)
def test_a_layout_that_fits_is_accepted(layout: Layout, world_size: int) -> None:
    layout.check(SMOLLM2, world_size)


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        (
            Layout(tensor_model_parallel_size=5),
            5,
            r"parallel.tensor_model_parallel_size: 5 does not divide the model's ffn_hidden_size 1536; use one of "
            r"\[1, 2, 3, 4\]",
        ),
        (
            Layout(pipeline_model_parallel_size=31),
            31,
            r"parallel.pipeline_model_parallel_size: 30 layers are too few for 31 stages",
        ),
        (
            Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=16),
            2,
            r"parallel.virtual_pipeline_model_parallel_size: 30 layers are too few for 32 stages",
        ),
        (
            Layout(virtual_pipeline_model_parallel_size=2),
            1,
            r"parallel.virtual_pipeline_model_parallel_size: virtual stages need pipeline_model_parallel_size",
        ),
        (Layout(sequence_parallel=True), 1, r"parallel.sequence_parallel: .* set it to false"),
        (Layout(context_parallel_size=2), 2, r"parallel.context_parallel_size: 2 needs TransformerEngine"),
        (Layout(tensor_model_parallel_size=0), 1, r"parallel.tensor_model_parallel_size: 0 is not a size"),
        (
            Layout(pipeline_model_parallel_size=2, num_layers_per_stage=(10, 10, 10)),
            2,
            r"parallel.num_layers_per_stage: \[10, 10, 10\] must give each of the 2 stages",
        ),
        (
            Layout(pipeline_model_parallel_size=2, num_layers_per_stage=(30, 0)),
            2,
            r"parallel.num_layers_per_stage: \[30, 0\] must give each of the 2 stages .* a layer or more",
        ),
        (Layout(pipeline_model_parallel_size=2), 3, r"tp=1 pp=2 needs a multiple of 2 processes, and this job has 3"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: Layout, world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        layout.check(SMOLLM2, world_size)
    assert "\n" not in str(caught.value)


def test_ffn_neurons_are_split_evenly() -> None:
    with pytest.raises(UserError, match="does not divide the model's ffn_hidden_size 1535"):
        Layout(tensor_model_parallel_size=3).check(replace(SMOLLM2, ffn_hidden_size=1535), 3)


def test_query_groups_fill_up_to_a_multiple() -> None:
    sizes = {}
    for tp in (1, 2, 3, 4, 8):
        padded = Layout(tensor_model_parallel_size=tp).padded(SMOLLM2)
        sizes[tp] = (padded.num_attention_heads, padded.num_query_groups)
    assert sizes == {1: (9, 3), 2: (12, 4), 3: (9, 3), 4: (12, 4), 8: (24, 8)}


def test_one_virtual_stage_is_no_interleaving() -> None:
    config = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=1)
    assert Layout.from_config(config) == Layout(pipeline_model_parallel_size=2)


def _remade(layouts: list[Layout]) -> list[tuple[int, int, int]]:
    from megatron.core import parallel_state

    sizes = []
    for layout in layouts:
        launch.initialize(layout, seed=1)
        sizes.append(
            (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_pipeline_model_parallel_world_size(),
                parallel_state.get_data_parallel_world_size(),
            )
        )
    return sizes


def test_groups_are_remade_when_the_layout_changes_within_a_job() -> None:
    layouts = [Layout(tensor_model_parallel_size=2), Layout(), Layout(), Layout(pipeline_model_parallel_size=2)]
    assert run_distributed(2, _remade, layouts)[0] == [(2, 1, 1), (1, 1, 2), (1, 1, 2), (1, 2, 1)]


@pytest.mark.parametrize(
    ("pipeline", "virtual", "layers"),
    [(2, None, [15, 15]), (4, None, [7, 8, 8, 7]), (2, 4, [3, 4, 4, 4, 4, 4, 4, 3]), (7, None, [4, 4, 5, 5, 4, 4, 4])],
)
def test_layers_that_are_left_over_go_to_the_middle_stages(
    pipeline: int, virtual: int | None, layers: list[int]
) -> None:
    layout = Layout(pipeline_model_parallel_size=pipeline, virtual_pipeline_model_parallel_size=virtual)
    assert layout.layers_per_stage(30) == layers


def test_an_explicit_split_is_of_one_model_and_others_are_split_evenly() -> None:
    config = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_stage=[10, 20])
    layout = Layout.from_config(config)
    assert layout.layers_per_stage(30) == [10, 20]
    assert layout.layers_per_stage(32) == [16, 16]
    layout.check_split("student", 30)
    with pytest.raises(UserError, match=r"parallel.num_layers_per_stage: \[10, 20\] are 30 layers, .* student has 32"):
        layout.check_split("student", 32)
