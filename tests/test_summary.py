"""What `minitron run` says at its end: figures and paths of the run directory, on 80 columns and on 120."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from minitron_nemo.summary import print_summary
from tests.report.runs import record, write_json, write_run


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_summary_has_models_places_and_times(tmp_path: Path, width: int, terminal: bool) -> None:
    run = write_run(tmp_path / "run")
    (run / "report.html").touch()
    for name in ("distilled", "export/hf", "export/nemo"):
        (run / name).mkdir(parents=True)
    seconds = {"convert": 100.0, "distill": 3600.0, "evaluate": 300.0}
    write_json(
        run / "manifest.json",
        {"schema_version": 1, "steps": {name: record() | {"seconds": s} for name, s in seconds.items()}},
    )
    stream = io.StringIO()
    print_summary(run, {None: run}, Console(file=stream, width=width, force_terminal=terminal, color_system=None))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    evaluation = json.loads((run / "evaluation.json").read_text())
    for name in ("source", "teacher", "pruned", "distilled"):
        found = next(line.split() for line in lines if line.split()[:1] == [name])
        model = evaluation[name]
        assert found[1:5] == [f"{model['parameters']:,}", f"{model['loss']:.4f}", "±", "0.0312"]
    text = "".join(line.strip() for line in lines)  # paths may be folded
    for path in ("report.html", "evaluation.json", "export/hf", "export/nemo", "training/distilled-01234567"):
        assert str(run / path) in text, path
    assert "corrected-01234567" not in text  # `correct` is not in this manifest
    assert [line.split() for line in lines if line.split()[:1] in (["convert"], ["distill"], ["all"])] == [
        ["convert", "0:01:40", "2%"],
        ["distill", "1:00:00", "90%"],
        ["all", "steps", "1:06:40"],
    ]


def test_a_model_without_a_finite_loss_is_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates=4)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["pruned"] |= {"loss": None, "loss_se": None, "perplexity": None}
    write_json(run / "evaluation.json", evaluation)
    stream = io.StringIO()
    print_summary(run, {None: run}, Console(file=stream, width=120))
    assert next(line.split()[2] for line in stream.getvalue().splitlines() if "pruned" in line) == "nan"


def test_every_stage_has_its_own(tmp_path: Path) -> None:
    stages = {name: write_run(tmp_path / "run" / "stages" / name) for name in ("half", "quarter")}
    steps = {f"{name}/distill": record() for name in stages}
    write_json(tmp_path / "run" / "manifest.json", {"schema_version": 1, "steps": steps})
    stream = io.StringIO()
    print_summary(tmp_path / "run", dict(stages), Console(file=stream, width=200))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    for name, directory in stages.items():
        assert [name] in lines
        assert ["checkpoints", str(directory / "training" / "distilled-01234567")] in lines
        assert any(line[:1] == [f"{name}/distill"] for line in lines)
    assert ["all", "stages", str(tmp_path / "run" / "report.html")] in lines
