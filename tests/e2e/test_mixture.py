"""The chain on a mixture of experts, from Hugging Face to Hugging Face, on tensor-parallel ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.chain import Command, write_recipe
from tests.families import write_tiny
from tests.report.reading import charts, html, rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_mixture_goes_all_the_way(tmp_path: Path) -> None:
    source = write_tiny("qwen2_moe", tmp_path / "mixture")
    recipe = write_recipe(
        tmp_path,
        model={"source": str(source)},
        prune={
            "ffn_hidden_size": None,
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 64,
            "moe_shared_expert_intermediate_size": 40,
            "num_layers": 3,
        },
        parallel={"pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    )
    command = Command(tmp_path / "log", "run", str(recipe))
    assert command.wait(400) == 0, command.output
    run = tmp_path / "run"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["teacher"]["kl_to_teacher"] < 1e-6
    assert evaluation["distilled"]["delta_vs_pruned"] < -2 * evaluation["distilled"]["delta_vs_pruned_se"]
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "hf", dtype=torch.float32)
    sizes = model.config
    assert (sizes.num_hidden_layers, sizes.num_experts, sizes.moe_intermediate_size) == (3, 4, 64)
    assert sizes.shared_expert_intermediate_size == 40
    page = html(run / "report.html")
    assert rows(page, "shape")["experts of a layer"][:2] == ["5", "4"]
    drawn = charts(page, "importance", "Width")
    assert len(drawn["Experts by layer"]) == 4 * 5
    assert {"Neurons of experts by layer", "Neurons of the shared expert by layer"} <= set(drawn)
    assert "Measured before" not in page
    assert sum(parameter.numel() for parameter in model.parameters()) == evaluation["distilled"]["parameters"]
