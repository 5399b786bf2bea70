"""The run and the page that the tests of what a page says share: drawing one takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_nemo.report.page import write_report
from tests.report.reading import html
from tests.report.runs import write_baseline, write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_baseline(tmp_path_factory.mktemp("report") / "baseline")


@pytest.fixture(scope="session")
def page(run: Path, baseline: Path) -> str:
    return html(write_report(run, baseline))
