"""What several end-to-end tests need: a recipe for one process, and commands that have to refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_nemo.cli import main
from tests.e2e.chain import refusal, write_recipe


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command line in this process; it has to refuse."""

    def call(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        return refusal(capsys.readouterr().err)

    return call


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of `write_recipe`, in one process; its own run directory is nobody's."""
    return write_recipe(
        tmp_path_factory.mktemp("recipe"),
        cluster={"launcher": "none", "processes_per_node": 1},
        parallel={"pipeline_model_parallel_size": 1},
    )
