"""Tensor-parallel sizes that do not divide the query groups: groups of zeros change nothing and are never stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_nemo.arch.counts import parameters
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.models.groups import padding
from minitron_nemo.parallel.layout import Layout
from tests.importance.measuring import measured
from tests.models.support import (
    TinyModel,
    cross_entropy,
    huggingface_model,
    megatron_order,
    optimizer,
    save_gradients,
    summed_nll,
    tokens,
    train_step,
    trainable,
    weights,
)
from tests.pool import run_distributed

TP = {size: Layout(tensor_model_parallel_size=size) for size in (1, 2, 3, 4)}  # on 4, the last rank has zeros alone
LAYOUTS = {
    "tp2": (2, TP[2]),
    "tp2-sp-pp2": (4, Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)),
    "tp4": (4, TP[4]),
}
FAMILIES = ("qwen2", "qwen3")  # biases of queries, keys and values; norms of queries and keys


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    """Six heads in three groups."""
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 3, "num_layers": 2}
    return {family: TinyModel(tmp_path_factory.mktemp(family), family, **shape) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases(1)
def test_loss_and_gradients_are_those_of_the_model_without_them(
    models: dict[str, TinyModel], tmp_path: Path, family: str, layout: str
) -> None:
    tiny = models[family]
    model = huggingface_model(tiny.huggingface, torch.float64)
    batch = tokens()
    expected_loss = summed_nll(model(batch[:, :-1]).logits, batch[:, 1:]) / batch[:, 1:].numel()
    expected_loss.backward()
    expected = megatron_order({name: value.grad for name, value in model.named_parameters()}, tiny.architecture)

    world_size, sizes = LAYOUTS[layout]
    losses = run_distributed(world_size, save_gradients, tiny, sizes, False, tmp_path / "gradients")
    actual = run_distributed(1, weights, tmp_path / "gradients", tiny.architecture)[0]
    assert losses[-1] == pytest.approx(expected_loss.item(), rel=1e-5)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name][: len(gradient)].double() - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: {error}"


def _padding(tiny: TinyModel, layout: Layout, updates: int) -> list[Tensor]:
    """This rank's parts of groups of zeros, of weights and of gradients, after some updates of all weights."""
    from megatron.core import parallel_state

    model = trainable(tiny, layout, use_distributed_optimizer=True)
    adam = optimizer(model)
    for _ in range(updates):
        train_step(model, lambda output, labels: cross_entropy(tiny.architecture.vocab_size, output, labels))
        adam.step()
    held = layout.padded(tiny.architecture).num_query_groups // layout.tensor_model_parallel_size
    first = parallel_state.get_tensor_model_parallel_rank() * held
    own = max(0, min(held, tiny.architecture.num_query_groups - first))
    found = []
    for name, parameter in model.modules[0].named_parameters():
        if "linear_qkv" in name or "linear_proj" in name:
            dim = 1 if "linear_proj" in name else 0
            for tensor in (parameter.detach(), parameter.main_grad):
                start = tensor.shape[dim] // held * own
                found.append(tensor.narrow(dim, start, tensor.shape[dim] - start).clone())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_training_leaves_zeros_alone(models: dict[str, TinyModel], family: str) -> None:
    """Exactly zero, after updates with a large rate and weight decay; so the scheme rests on no tolerance."""
    found = [tensor for rank in run_distributed(2, _padding, models[family], TP[2], 3) for tensor in rank]
    assert sum(tensor.numel() for tensor in found) > 0
    assert all(not tensor.any() for tensor in found)


def _through(tiny: TinyModel, layout: Layout, directory: Path) -> None:
    """Load into memory that held NaN, save."""
    from minitron_nemo.models.build import build_model
    from minitron_nemo.models.checkpoint import load_model, save_model
    from minitron_nemo.parallel import launch

    launch.initialize(layout, seed=1)
    model = build_model(tiny.architecture, layout, dtype=torch.float32)
    with torch.no_grad():
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    load_model(model, tiny.megatron)
    assert not any(parameter.isnan().any() for chunk in model.chunks for parameter in chunk.parameters())
    save_model(model, directory, tiny.huggingface)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.fast_cases(1)
def test_checkpoints_hold_no_zeros(models: dict[str, TinyModel], tmp_path: Path, family: str, size: int) -> None:
    """What is saved on TP2 or TP4 has the bytes of the source, and loads on TP1 as Megatron-core itself reads it."""
    tiny = models[family]
    run_distributed(size, _through, tiny, TP[size], tmp_path / "saved")
    assert fingerprint(tmp_path / "saved") == fingerprint(tiny.megatron)
    found = run_distributed(1, weights, tmp_path / "saved", tiny.architecture)[0]
    expected = megatron_order(load_file(tiny.huggingface / "model.safetensors"), tiny.architecture)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name][: len(weight)], weight), name


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.fast_cases(1)
def test_scores_know_no_heads_of_zeros(models: dict[str, TinyModel], size: int) -> None:
    tiny, batch = models["qwen2"], tokens()[:, :-1]
    one = run_distributed(1, measured, tiny.megatron, TP[1], batch, torch.ones(batch.shape))[0]
    for scores in run_distributed(size, measured, tiny.megatron, TP[size], batch, torch.ones(batch.shape)):
        for name in ("heads", "hidden", "ffn", "block_influence"):
            ours, theirs = (torch.from_numpy(getattr(each, name)) for each in (scores, one))
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_the_cost_of_zeros(models: dict[str, TinyModel]) -> None:
    """Three groups of qwen3, two heads of 16 each, on TP2: one group more, (2 + 2) x 16 rows and 2 x 16 columns."""
    shape = models["qwen3"].architecture
    cost = padding(shape, TP[2], 32)
    assert cost is not None
    assert (cost["num_attention_heads"], cost["num_query_groups"]) == (8, 4)
    matrices = 2 * 48 * (4 * 16 + 2 * 16)  # in two layers
    assert cost["parameters"] == pytest.approx(matrices / parameters(shape))
    assert cost["flops"] > 0
    assert padding(shape, TP[3], 32) is padding(shape, TP[1], 32) is None
