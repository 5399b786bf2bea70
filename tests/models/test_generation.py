"""Rows of a batch are continued by the tokens that Hugging Face generates for each alone, on every layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.models.support import LAYOUTS, TinyModel, huggingface_model, tokens
from tests.pool import run_distributed

PROMPTS = [tokens()[row, :length].tolist() for row, length in enumerate((9, 5, 5, 1))]
NEW = 6


def _generated(tiny: TinyModel, layout: Layout, calls: Sequence[tuple[Any, ...]]) -> list[list[list[int]]]:
    from minitron_nemo.models.build import build_model
    from minitron_nemo.models.checkpoint import load_model
    from minitron_nemo.models.generation import generate

    launch.initialize(layout, seed=1)
    model = build_model(tiny.architecture, layout, dtype=torch.float32)
    load_model(model, tiny.megatron)
    return [generate(model, *call) for call in calls]


def _alone(tiny: TinyModel, prompt: list[int]) -> list[int]:
    """Hugging Face's, each token from a pass over the whole sequence."""
    model = huggingface_model(tiny.huggingface, torch.float32)
    row = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases(1)
def test_rows_are_continued_as_hugging_face_continues_each(tiny_models: dict[str, TinyModel], layout: str) -> None:
    tiny = tiny_models["untied"]
    expected = [_alone(tiny, prompt) for prompt in PROMPTS]
    world_size, sizes = LAYOUTS[layout]
    # The second call finds the model as the first did.
    calls = [(PROMPTS, NEW), (PROMPTS[:1], NEW)]
    for batch, single in run_distributed(world_size, _generated, tiny, sizes, calls):
        assert batch == expected
        assert single == expected[:1]


@pytest.mark.parametrize("layout", ["tp1", "tp2-sp"])
@pytest.mark.parametrize("family", ["phi3", "qwen2_moe"])
@pytest.mark.fast_cases(1)
def test_windows_and_experts(family_models: dict[str, TinyModel], family: str, layout: str) -> None:
    tiny = family_models[family]
    world_size, sizes = LAYOUTS[layout]
    for (batch,) in run_distributed(world_size, _generated, tiny, sizes, [(PROMPTS, NEW)]):
        assert batch == [_alone(tiny, prompt) for prompt in PROMPTS]


def test_a_row_ends_by_itself(tiny_models: dict[str, TinyModel]) -> None:
    tiny = tiny_models["untied"]
    whole = [_alone(tiny, prompt) for prompt in PROMPTS]
    (found,) = run_distributed(1, _generated_until, tiny, whole[0][2])
    ended = [row[: row.index(whole[0][2]) + 1] if whole[0][2] in row else row for row in whole]
    assert found == ended
    assert len(found[0]) == 3 and max(map(len, found)) == NEW


def _generated_until(tiny: TinyModel, last: int) -> list[list[int]]:
    return _generated(tiny, Layout(), [(PROMPTS, NEW, lambda new: new[-1] == last)])[0]
