"""A model stored in both formats, and the example task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_nemo.parallel.layout import Layout
from tests.documents import ROOT

QUESTIONS = ROOT / "recipes" / "tasks" / "opposites.jsonl"
HARNESS_TASK = ROOT / "recipes" / "tasks" / "opposites.yaml"

LAYOUTS = {
    "tp1": (1, Layout()),
    "dp2": (2, Layout()),
    "tp2": (2, Layout(tensor_model_parallel_size=2)),
    "tp2-sp": (2, Layout(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, Layout(pipeline_model_parallel_size=2)),
    "tp2-pp2": (4, Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}
# A layout of the whole, the rest where there is time for it.
SOME = ["tp1", "dp2", "tp2-pp2", *(pytest.param(name, marks=pytest.mark.soak) for name in ("tp2", "tp2-sp", "pp2"))]


def opened(directory: Path, layout: Layout) -> Any:
    """Within a job: the loaded model, fp32."""
    from minitron_nemo.evaluation.evaluate import open_model
    from minitron_nemo.parallel import launch

    launch.initialize(layout, seed=0)
    return open_model(directory, layout, torch.float32)
