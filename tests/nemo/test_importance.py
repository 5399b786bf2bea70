"""Scores collected during llm.validate, compared with hooks on Hugging Face's model in fp64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_nemo.arch import Axis
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.config import PruneConfig
from minitron_nemo.importance.scores import Scores
from minitron_nemo.pruning.plan import make_plan
from tests.distillation.reference import random_microbatches
from tests.importance.hugging_face import reference_scores
from tests.nemo.jobs import nemo, run_job, write_models, write_samples

AXES = {Axis.HIDDEN: "norms", Axis.FFN: "ffn", Axis.HEADS: "heads"}


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(1, {}), (2, {"pipeline_model_parallel_size": 2, "pipeline_dtype": None})],
    ids=["one process", "pp=2"],
)
def test_scores_are_those_of_hugging_faces_model(processes: int, layout: dict, tmp_path: Path) -> None:
    student, _ = write_models(tmp_path)
    batches = random_microbatches(4)
    write_samples(tmp_path / "samples.pt", batches)
    run_job("score", tmp_path / "job", student, tmp_path / "samples.pt", processes=processes, layout=layout)
    scores = Scores.load(tmp_path / "job" / "scores.npz")
    tokens, weights = (torch.cat([batch[name] for batch in batches]) for name in ("tokens", "token_weights"))
    expected = reference_scores(student, tokens, weights)
    for axis, name in AXES.items():
        for sequence, batch in (("mean", "l2"), ("l2", "mean"), ("var", "mean")):
            np.testing.assert_allclose(scores.get(axis, sequence, batch), expected[name, sequence, batch], rtol=1e-4)
    np.testing.assert_allclose(scores.block_influence, expected["layers"], rtol=1e-4, atol=1e-6)
    assert scores.model_fingerprint == fingerprint(nemo(student))
    assert (scores.sequences, scores.tokens) == (4, int((weights != 0).sum()))
    assert make_plan(scores, scores.architecture, PruneConfig(ffn_hidden_size=32)).target.ffn_hidden_size == 32
