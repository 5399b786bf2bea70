"""The whole chain over every layout of up to four processes, and through kills at random moments."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.checkpoint.fingerprint import fingerprint
from tests.e2e.chain import Command, write_recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

# tensor, pipeline, virtual pipeline, sequence parallel; the rest of the processes is data parallel.
LAYOUTS = [
    (2, 1, 1, None, False),
    (4, 1, 1, None, False),
    (2, 2, 1, None, False),
    (2, 2, 1, None, True),
    (2, 1, 2, None, False),
    (2, 1, 2, 2, False),
    (4, 2, 2, None, False),
    (4, 2, 2, None, True),
    (4, 2, 2, 2, True),
    (4, 2, 1, None, True),
    (4, 1, 2, None, False),
    (4, 4, 1, None, True),
    (4, 1, 4, None, False),
]


def chain(directory: Path, processes: int, tp: int, pp: int, vpp: int | None, sp: bool) -> Path:
    """Run the tiny chain, without depth pruning so that four stages divide; the run directory."""
    directory.mkdir()
    parallel: dict[str, Any] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    parallel |= {"virtual_pipeline_model_parallel_size": vpp, "sequence_parallel": sp}
    recipe = write_recipe(
        directory,
        parallel=parallel,
        prune={"num_layers": None, "num_attention_heads": 4, "hidden_size": 48},
        cluster={"processes_per_node": processes},
    )
    command = Command(directory / "log", "run", str(recipe))
    assert command.wait(600) == 0, command.output
    return directory / "run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain(tmp_path_factory.mktemp("alone") / "chain", 1, 1, 1, None, False)


@pytest.mark.parametrize(("processes", "tp", "pp", "vpp", "sp"), LAYOUTS)
def test_every_layout_takes_the_same_model_to_the_same_place(
    alone: Path, tmp_path: Path, processes: int, tp: int, pp: int, vpp: int | None, sp: bool
) -> None:
    run = chain(tmp_path / "chain", processes, tp, pp, vpp, sp)
    assert fingerprint(run / "teacher") == fingerprint(alone / "teacher")
    prepared = [json.loads((directory / "data" / "prepared.json").read_text()) for directory in (run, alone)]
    assert prepared[0]["fingerprint"] == prepared[1]["fingerprint"]
    plans = [json.loads((directory / "pruned" / "plan.json").read_text()) for directory in (run, alone)]
    assert min(plans[1]["gaps"].values()) > 1e-4, "the cut is closer than layouts agree: choose another seed"
    for cut in ("kept_layers", "kept_hidden", "kept_ffn", "kept_heads"):
        assert plans[0][cut] == plans[1][cut], cut
    here, there = (json.loads((directory / "evaluation.json").read_text()) for directory in (run, alone))
    for model in ("source", "teacher", "pruned", "distilled"):
        for figure in ("loss", "kl_to_teacher"):
            assert here[model][figure] == pytest.approx(there[model][figure], rel=1e-5, abs=1e-6), (model, figure)


def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    command = Command(undisturbed / "log", "run", str(write_recipe(undisturbed, train={"steps": 40})))
    assert command.wait() == 0, command.output
    disturbed = tmp_path / "disturbed"
    disturbed.mkdir()
    recipe = write_recipe(disturbed, train={"steps": 40})
    moments = random.Random(5)
    code, kills = None, 0
    while code != 0:
        command = Command(disturbed / f"log{kills}", "run", str(recipe))
        # Longer and longer, since a run that is always killed early gets nowhere.
        code = command.wait_at_most(moments.uniform(4.0, 10.0 + 2.0 * kills))
        assert code in (None, 0), command.output
        kills += code is None
    assert kills >= 3
    for model in ("teacher", "corrected", "pruned", "distilled"):
        assert fingerprint(disturbed / "run" / model) == fingerprint(undisturbed / "run" / model), model
