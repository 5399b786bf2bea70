"""A model built from an Architecture computes what Hugging Face computes, on every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.families import FAMILIES
from tests.models.support import LAYOUTS, SEQUENCE, SHAPES, TinyModel, huggingface_model, microbatches, tokens
from tests.pool import run_distributed

FAMILY_LAYOUTS = [
    *("tp1", "tp2-sp", "pp2"),
    *(pytest.param(layout, marks=pytest.mark.soak) for layout in ("tp2-pp2", "pp3-uneven", "pp2-vpp2")),
]


def _loaded(tiny: TinyModel, layout: Layout) -> Any:
    from minitron_nemo.models.build import build_model
    from minitron_nemo.models.checkpoint import load_model

    launch.initialize(layout, seed=1)
    model = build_model(tiny.architecture, layout, dtype=torch.float32)
    load_model(model, tiny.megatron)
    return model


def _logits(tiny: TinyModel, layout: Layout, count: int) -> list[Tensor]:
    from minitron_nemo.models.forward import forward_only

    model = _loaded(tiny, layout)
    return forward_only(model, microbatches(), count, SEQUENCE, 1, lambda output, _: output)


def _collected(tiny: TinyModel, layout: Layout, count: int) -> tuple[list[int], int]:
    """First tokens of the microbatches that `collect` saw, and how often it was called."""
    from minitron_nemo.models.forward import forward_only

    model = _loaded(tiny, layout)
    calls: list[int] = []

    def collect(_: Tensor, batch: dict[str, Tensor]) -> int:
        calls.append(1)
        return int(batch["tokens"][0, 0])

    return forward_only(model, microbatches(), count, SEQUENCE, 1, collect), len(calls)


def _hidden(tiny: TinyModel, layout: Layout) -> tuple[list[Tensor], list[Tensor]]:
    """Output of mode "hidden", and the projection of what a head gets by the weight that it gets."""
    from minitron_nemo.models.forward import forward_only

    model = _loaded(tiny, layout)
    layer = model.output_layer
    if layer is not None:
        layer.mode = "hidden"
    hidden = forward_only(model, microbatches(), 1, SEQUENCE, 1, lambda output, _: output)
    if layer is not None:
        layer.head = lambda states, weight: states @ weight.T
    projected = forward_only(model, microbatches(), 1, SEQUENCE, 1, lambda output, _: output)
    return hidden, projected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.fast_cases(3)
def test_logits_equal_hugging_face(tiny_models: dict[str, TinyModel], shape: str, layout: str) -> None:
    assert_logits_equal_hugging_face(tiny_models[shape], layout)


@pytest.mark.parametrize("layout", FAMILY_LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.fast_cases(1)
def test_logits_of_every_family_equal_hugging_face(
    family_models: dict[str, TinyModel], family: str, layout: str
) -> None:
    assert_logits_equal_hugging_face(family_models[family], layout)


def assert_logits_equal_hugging_face(tiny: TinyModel, layout: str) -> None:
    with torch.no_grad():
        expected = huggingface_model(tiny.huggingface, torch.float32)(tokens()[:, :-1]).logits
    world_size, sizes = LAYOUTS[layout]
    if tiny.architecture.num_moe_experts and sizes.tensor_model_parallel_size > 1:
        sizes = replace(sizes, sequence_parallel=True)
    by_rank = run_distributed(world_size, _logits, tiny, sizes, 4)
    last_stage = [torch.cat(results) for results in by_rank if results]
    assert len(last_stage) == sizes.tensor_model_parallel_size
    actual = torch.cat(last_stage, dim=-1)[..., : tiny.architecture.vocab_size]
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_virtual_stages_of_unequal_depth_equal_hugging_face(tmp_path: Path) -> None:
    tiny = TinyModel(tmp_path, num_layers=6)
    with torch.no_grad():
        expected = huggingface_model(tiny.huggingface, torch.float32)(tokens()[:, :-1]).logits
    world_size, layout = LAYOUTS["pp2-vpp2"]
    assert layout.layers_per_stage(6) == [1, 2, 2, 1]
    actual = torch.cat(run_distributed(world_size, _logits, tiny, layout, 4)[-1])
    torch.testing.assert_close(actual[..., : tiny.architecture.vocab_size], expected, atol=1e-4, rtol=0)


def test_an_interleaved_schedule_takes_any_number_of_microbatches(tiny_models: dict[str, TinyModel]) -> None:
    tiny = tiny_models["tied"]
    world_size, layout = LAYOUTS["pp2-vpp2"]
    expected = run_distributed(1, _logits, tiny, Layout(), 3)[0]
    actual = run_distributed(world_size, _logits, tiny, layout, 3)[-1]
    assert len(actual) == 3
    torch.testing.assert_close(torch.cat(actual), torch.cat(expected), atol=1e-5, rtol=0)
    firsts, calls = run_distributed(world_size, _collected, tiny, layout, 3)[-1]
    assert firsts == tokens()[:3, 0].tolist()
    assert calls == 3


@pytest.mark.parametrize("layout", ["tp1", "tp2-sp", "pp2-vpp2"])
@pytest.mark.parametrize("shape", ["tied", "untied"])
@pytest.mark.fast_cases(3)
def test_a_head_gets_the_states_and_the_weight_that_make_the_logits(
    tiny_models: dict[str, TinyModel], shape: str, layout: str
) -> None:
    tiny = tiny_models[shape]
    model = huggingface_model(tiny.huggingface, torch.float32)
    with torch.no_grad():
        states = model.model(tokens()[:1, :-1]).last_hidden_state  # [1, s, h]
        logits = model(tokens()[:1, :-1]).logits
    world_size, sizes = LAYOUTS[layout]
    by_rank = run_distributed(world_size, _hidden, tiny, sizes)
    found = [(hidden[0], projected[0]) for hidden, projected in by_rank if hidden]
    tp = sizes.tensor_model_parallel_size
    assert len(found) == tp
    if sizes.sequence_parallel:
        # Each rank has its part of the sequence, times its part of the vocabulary.
        hidden = torch.cat([part for part, _ in found], dim=1)
        rows = found[0][1].shape[-1]
        for rank, (_, projected) in enumerate(found):
            part = logits.chunk(tp, dim=1)[rank][..., rank * rows : (rank + 1) * rows]
            torch.testing.assert_close(projected[..., : part.shape[-1]], part, atol=1e-4, rtol=0)
    else:
        hidden = found[0][0]
        torch.testing.assert_close(found[0][1][..., : logits.shape[-1]], logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(hidden, states, atol=1e-4, rtol=0)
