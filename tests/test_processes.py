"""When `cluster.launcher: local` starts processes, and what becomes of them when one of them ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from minitron_nemo import cli
from tests.e2e.chain import write_recipe

LAUNCHING = """
import sys
from minitron_nemo import processes
processes.WAIT = 1.0
sys.executable = sys.argv[1]
sys.exit(processes.launch_locally(2, ["run"], stopped=75))
"""


def ended(directory: Path, second: str) -> tuple[int, float]:
    """Exit code and seconds of a job whose first process hears no signal and whose second one runs `second`."""
    worker = directory / "worker"
    worker.write_text(f"#!/bin/bash\nif [ $RANK = 1 ]; then {second}; fi\ntrap '' TERM\nexec sleep 100\n")
    worker.chmod(0o755)
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-c", LAUNCHING, str(worker)], check=False, timeout=60).returncode
    return code, time.monotonic() - start


@pytest.mark.slow
def test_one_that_does_not_stop_with_the_others_is_killed_in_time(tmp_path: Path) -> None:
    code, seconds = ended(tmp_path, "exit 75")
    assert code == 75
    assert seconds > 1


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    assert ended(tmp_path, "exit 3")[0] == 3


def test_a_batch_script_s_own_shell_starts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "launch_locally", start := Mock(return_value=0))
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["prune", str(write_recipe(tmp_path))]) == 0
    assert start.call_args.args[0] == 2
