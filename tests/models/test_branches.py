"""What is computed when different layers are left out in one pass, and that it is no more than the branches need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron_nemo.models.branches import Branch, Branches, Fork, run_branches
from minitron_nemo.parallel.layout import Layout
from tests.importance.measuring import dealt_out, loaded
from tests.models.support import TinyModel
from tests.pool import run_distributed


def each_alone(num_layers: int) -> list[Branch]:
    return [Branch(), *(Branch({layer}) for layer in range(num_layers))]


@pytest.mark.parametrize("num_layers", [1, 2, 5, 32])
def test_leaving_out_every_layer_alone_costs_half_of_what_separate_passes_do(num_layers: int) -> None:
    separate = sum(num_layers - len(branch) for branch in each_alone(num_layers))
    assert separate == num_layers**2
    assert Branches(each_alone(num_layers), num_layers).evaluations == num_layers * (num_layers + 1) // 2


def test_branches_part_where_they_differ_and_not_before() -> None:
    branches = Branches([Branch({1}), Branch({1, 2}), Branch()], 3)
    assert branches.forks == [
        Fork(run=(0,), passed=()),
        Fork(run=(0,), passed=(0,)),  # then {} and {1}
        Fork(run=(0, 1), passed=(1,)),
    ]
    assert branches.rows == [1, 2, 0]
    assert branches.evaluations == 4


def test_a_layer_that_all_leave_out_is_not_evaluated() -> None:
    branches = Branches([Branch({0, 1}), Branch({0, 2})], 3)
    assert [len(fork.run) for fork in branches.forks] == [0, 1, 1]


def test_stages_hand_on_as_many_rows_as_the_widest_border_has() -> None:
    branches = Branches(each_alone(4), 4)  # 2, 3, 4, 5 rows behind the layers
    assert branches.payload(Layout()) == 1
    assert branches.payload(Layout(pipeline_model_parallel_size=2)) == 3
    interleaved = Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert branches.payload(interleaved) == 4


def rows_evaluated(directory: Path, layout: Layout) -> tuple[int, list[int]]:
    """Sequences that this rank's layers were given, and the shapes of what comes out on the last stage."""
    model = loaded(directory, layout)
    evaluated = 0

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal evaluated
        evaluated += kwargs["hidden_states"].shape[1]

    inside = [layer for module in model.modules for layer in module.decoder.layers]
    for layer in inside:
        layer.register_forward_pre_hook(count, with_kwargs=True)
    tokens = torch.randint(259, (4, 16), generator=torch.Generator().manual_seed(0))
    batches = dealt_out(tokens, torch.ones(4, 16), micro_batch_size=2)
    branches = Branches(each_alone(4), 4)
    shapes = run_branches(model, branches, batches, 2, (2, 16), lambda output, batch: list(output.shape))
    assert [layer for module in model.modules for layer in module.decoder.layers] == inside, "left as it was"
    return evaluated, shapes


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline_model_parallel_size=2)])
def test_layers_are_given_the_rows_that_are_reported_and_no_padding(layout: Layout, tmp_path: Path) -> None:
    model = TinyModel(tmp_path)
    by_rank = run_distributed(layout.model_parallel_size, rows_evaluated, model.megatron, layout)
    assert sum(evaluated for evaluated, _ in by_rank) == 4 * 10  # four sequences, 4 * 5 / 2 evaluations of each
    assert by_rank[-1][1] == [[5, 2, 16, 384]] * 2  # logits of all branches, with the vocabulary's padding
