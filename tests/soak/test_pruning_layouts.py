"""Scores, kept sets and students over layouts of up to eight processes, and for every family."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import CalibrationConfig, PruneConfig
from minitron_nemo.importance.scores import AGGREGATIONS
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.plan import make_plan
from tests.families import FAMILIES, MIXTURES, write_tiny
from tests.importance.measuring import measured
from tests.importance.test_collect import assert_same, assert_same_choice, batch
from tests.pool import run_distributed
from tests.pruning.test_prune import prune_together

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
OTHERS = [(2, 2, 1, None, True), (4, 1, 2, 2, False), (8, 2, 2, None, True)]
CASES = [("llama", *layout) for layout in LLAMA] + [(family, *layout) for family in FAMILIES for layout in OTHERS]
TARGET = {"hidden_size": 40, "num_attention_heads": 4, "num_layers": 6}


@pytest.mark.parametrize(("family", "processes", "tp", "pp", "vpp", "sp"), CASES)
def test_no_layout_scores_or_keeps_or_writes_anything_else(
    family: str, processes: int, tp: int, pp: int, vpp: int | None, sp: bool, tmp_path: Path
) -> None:
    mlp = {"num_moe_experts": 3, "moe_ffn_hidden_size": 64} if family in MIXTURES else {"ffn_hidden_size": 64}
    hugging_face = write_tiny(family, tmp_path / "hf", num_layers=8)
    convert(hugging_face, tmp_path / "teacher", "megatron", progress=False)
    tokens = batch(sequences=8)
    layout = Layout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sp,
    )
    alone = run_distributed(1, measured, tmp_path / "teacher", Layout(), *tokens)[0]
    scores = run_distributed(processes, measured, tmp_path / "teacher", layout, *tokens)[0]
    # Of variances of variances in fp32: of squares, as Nemotron's, and of the few tokens that an expert sees.
    assert_same(scores, alone, {"nemotron": 1e-4}.get(family, 2e-5 if family in MIXTURES else 1e-5))
    for sequence in AGGREGATIONS:
        for over_sequences in AGGREGATIONS:
            config = PruneConfig(
                **TARGET,
                **mlp,
                calibration=CalibrationConfig(sequence_aggregation=sequence, batch_aggregation=over_sequences),
            )
            assert_same_choice(*(make_plan(s, alone.architecture, config) for s in (scores, alone)))
    plan = make_plan(alone, alone.architecture, PruneConfig(**TARGET, **mlp))
    run_distributed(1, prune_together, tmp_path / "teacher", plan, tmp_path / "alone")
    run_distributed(processes, prune_together, tmp_path / "teacher", plan, tmp_path / "together")
    assert fingerprint(tmp_path / "together") == fingerprint(tmp_path / "alone")
