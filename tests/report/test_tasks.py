"""What was measured on tasks stands below the models' other figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_nemo.errors import UserError
from minitron_nemo.report.read import read_run
from minitron_nemo.report.results import table
from tests.report.runs import write_run


def test_tasks_are_rows_of_the_models_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    plain = table(read_run(run).evaluation, read_run(run).tasks)
    assert read_run(run).tasks == {}
    record = {"questions": 20, "metrics": {"acc": {"value": 0.45, "se": 0.11}}, "by_question": {}}
    models = {"distilled": {"tasks": {"opposites": record}}}
    (run / "tasks.json").write_text(json.dumps({"schema_version": 1, "models": models}))
    found = table(read_run(run).evaluation, read_run(run).tasks)
    assert found.rows[:-1] == plain.rows
    label, cells = found.rows[-1]
    assert label == "opposites, acc"
    shown = {name: (cell.text, cell.error) for name, cell in zip(found.head, cells, strict=True)}
    assert shown.pop("distilled") == ("0.4500", "± 0.1100")
    assert set(shown.values()) == {("", "")}
    (run / "tasks.json").write_text("{}")
    with pytest.raises(UserError, match="not a file of measured tasks"):
        read_run(run)
