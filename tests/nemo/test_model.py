"""What DistillationModel refuses before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from nemo.collections import llm

from minitron_nemo.config import DistillConfig, IntermediateConfig
from minitron_nemo.errors import UserError
from minitron_nemo.nemo import DistillationModel


def model(**sizes: Any) -> llm.LlamaModel:
    shape = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "vocab_size": 256,
        "apply_rope_fusion": False,
    }
    return llm.LlamaModel(llm.LlamaConfig(**{**shape, **sizes}))


@pytest.mark.parametrize(
    ("student", "objective", "key"),
    [
        # auto means a pair where depth is cut
        ({"num_layers": 2, "hidden_size": 32}, {}, "distill.intermediate.pairs: 'auto' .* sizes 32 and 64"),
        ({}, {"intermediate": IntermediateConfig(pairs=[[2, 4]])}, "distill.intermediate.pairs: the student has no"),
        ({}, {"intermediate": IntermediateConfig(alpha="high")}, "distill.intermediate.alpha"),
        ({}, {"ce_weight": "high"}, "distill.ce_weight"),
        ({"vocab_size": 128}, {}, "teacher-path: vocab_size 256"),
    ],
)
def test_what_it_cannot_do_is_said_with_the_key(student: dict, objective: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        DistillationModel(model(**student), model(), "teacher-path", DistillConfig(**objective))


def test_depth_and_width_are_cut_without_intermediate_losses_where_the_pairs_are_empty() -> None:
    objective = DistillConfig(temperature=2.0, intermediate=IntermediateConfig(pairs=[]))
    student = model(num_layers=2, hidden_size=32)
    distilled = DistillationModel(student, model(), "teacher-path", objective)
    assert distilled.objective.temperature == 2.0
    assert distilled.__io__.__fn_or_cls__ is llm.LlamaModel  # what a checkpoint will name
