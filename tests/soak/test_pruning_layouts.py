"""Scores, kept sets, repairs and students over layouts of up to eight processes; of every family, repairs of three."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from minitron_nemo.arch import Plan
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import PruneConfig, RepairConfig
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.plan import make_plan
from tests.families import FAMILIES, write_tiny
from tests.importance.measuring import measured
from tests.importance.test_collect import assert_same, assert_same_choices, batch, cut_mlp
from tests.pool import run_distributed
from tests.pruning.test_prune import prune_together
from tests.pruning.test_repair import folded, repair_together
from tests.pruning.test_repair_layernorm import functions

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

# processes, tensor, pipeline, virtual pipeline, sequence parallel; the rest is data parallel
LLAMA = [
    (2, 1, 1, None, False),
    (3, 1, 1, None, False),
    (4, 1, 1, None, False),
    (8, 1, 1, None, False),
    (2, 2, 1, None, False),
    (2, 2, 1, None, True),
    (4, 4, 1, None, False),
    (4, 4, 1, None, True),
    (4, 2, 1, None, True),
    (8, 4, 1, None, True),
    (2, 1, 2, None, False),
    (3, 1, 3, None, False),
    (4, 1, 4, None, False),
    (8, 1, 8, None, False),
    (2, 1, 2, 2, False),
    (2, 1, 2, 4, False),
    (4, 1, 4, 2, False),
    (4, 1, 2, 2, False),
    (4, 2, 2, None, False),
    (4, 2, 2, 2, True),
    (6, 2, 3, None, True),
    (8, 2, 4, 2, True),
    (8, 4, 2, None, True),
    (8, 2, 2, 2, True),
]
# processes, tensor, pipeline, virtual pipeline, layers of the stages, sequence parallel
UNEVEN = [
    (2, 1, 2, 2, (1, 3, 2, 2), False),
    (4, 2, 2, None, (3, 5), True),
    (8, 2, 2, 2, (3, 1, 1, 3), True),
]
OTHERS = [(2, 2, 1, None, True), (4, 1, 2, 2, False), (8, 2, 2, None, True)]
EVEN = [("llama", *layout) for layout in LLAMA] + [(family, *layout) for family in FAMILIES for layout in OTHERS]
CASES = [
    *((family, processes, Layout(tp, pp, vpp, sequence_parallel=sp)) for family, processes, tp, pp, vpp, sp in EVEN),
    *(
        ("llama", processes, Layout(tp, pp, vpp, sequence_parallel=sp, num_layers_per_stage=split))
        for processes, tp, pp, vpp, split, sp in UNEVEN
    ),
]
REPAIRED = [Layout(4, 2, sequence_parallel=True), Layout(2, 2, 2, sequence_parallel=True)]
TARGET = {"hidden_size": 40, "num_attention_heads": 4, "num_layers": 6}


@pytest.mark.parametrize(("family", "processes", "layout"), CASES, ids=str)
def test_no_layout_scores_or_keeps_or_writes_anything_else(
    family: str, processes: int, layout: Layout, tmp_path: Path
) -> None:
    hugging_face = write_tiny(family, tmp_path / "hf", num_layers=8)
    convert(hugging_face, tmp_path / "teacher", "megatron", progress=False)
    tokens = batch(sequences=8)
    alone = run_distributed(1, measured, tmp_path / "teacher", Layout(), *tokens)[0]
    scores = run_distributed(processes, measured, tmp_path / "teacher", layout, *tokens)[0]
    assert_same(scores, alone)
    mlp = cut_mlp(alone.architecture)
    assert_same_choices(scores, alone, hidden_size=40, num_layers=6, **mlp)
    plan = make_plan(alone, alone.architecture, PruneConfig(**TARGET, **mlp))
    run_distributed(1, prune_together, tmp_path / "teacher", plan, tmp_path / "alone")
    run_distributed(processes, prune_together, tmp_path / "teacher", plan, tmp_path / "together")
    assert fingerprint(tmp_path / "together") == fingerprint(tmp_path / "alone")


@pytest.mark.parametrize("layout", REPAIRED, ids=str)
@pytest.mark.parametrize(("family", "places"), [("llama", 3), ("nemotron", 2), ("qwen2_moe", 6)])
def test_no_layout_repairs_or_writes_anything_else(family: str, places: int, layout: Layout, tmp_path: Path) -> None:
    """Eight processes fit the maps that one does; students cut by them have the same bits from one and from eight."""
    convert(write_tiny(family, tmp_path / "hf", num_layers=8), tmp_path / "teacher", "megatron", progress=False)
    tokens = batch(sequences=24)  # several for each column of an expert
    scores = run_distributed(1, measured, tmp_path / "teacher", Layout(), *tokens)[0]
    plain = make_plan(scores, scores.architecture, PruneConfig(**TARGET, **cut_mlp(scores.architecture)))
    plans = []
    for processes, on in ((1, Layout()), (8, layout)):
        directory = tmp_path / f"plan-{processes}"
        run_distributed(processes, repair_together, tmp_path / "teacher", on, plain, RepairConfig(), directory, tokens)
        maps = functions(directory) if family == "nemotron" else folded(load_file(directory / "plan.safetensors"))
        plans.append((Plan.load(directory / "plan.json"), maps))
    (plan, expected), (other, matrices) = plans
    assert replace(other, matrices={}) == replace(plan, matrices={})
    assert len(expected) == places * 6 + 1 and matrices.keys() == expected.keys()
    for name, matrix in expected.items():
        # An expert sees few tokens, and its fit is the worse conditioned: 1.2e-5 on one kind of processor.
        accuracy = (3e-5 if ".experts." in name else 1e-5) * float(matrix.abs().max())
        np.testing.assert_allclose(matrices[name], matrix, rtol=0, atol=accuracy, err_msg=name)
    for processes in (1, 8):
        run_distributed(processes, prune_together, tmp_path / "teacher", other, tmp_path / f"student-{processes}")
    assert fingerprint(tmp_path / "student-1") == fingerprint(tmp_path / "student-8")
