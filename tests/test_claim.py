"""One start of one job at a time on a run directory; the start that Slurm has given up ends when the next one comes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from minitron_nemo import claim
from minitron_nemo.errors import UserError

HOLD = """
import sys
from pathlib import Path
from minitron_nemo import claim
from minitron_nemo.parallel import launch

claim.INTERVAL = 0.2
launch.join_job()
with claim.claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(run_dir: Path, job: str, restarts: int = 0) -> subprocess.Popen[str]:
    """A process that holds `run_dir` until its standard input is closed."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restarts)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(run_dir)]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


@pytest.mark.slow
def test_only_a_later_start_of_the_same_job_takes_a_run_directory_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(tmp_path, "7", restarts=1)
    assert first.stdout.readline() == "held\n"
    for job, restarts in ((None, "0"), ("8", "2"), ("7", "1"), ("7", "0")):
        with monkeypatch.context() as environment, ExitStack() as held:
            environment.setenv("SLURM_RESTART_COUNT", restarts)
            environment.setenv("SLURM_JOB_ID", job) if job else environment.delenv("SLURM_JOB_ID", raising=False)
            with pytest.raises(UserError, match=rf"in use by another minitron \(job 7, start 2, pid {first.pid} on "):
                claim._claim(tmp_path, held)
    later = start(tmp_path, "7", restarts=2)
    assert first.wait(200) == 1
    assert first.stderr.read() == f"rank 0: a later start has taken {tmp_path} over\n"
    code, out, _ = end(later)
    assert code == 0
    assert out.startswith(f"job 7, start 2, pid {first.pid} on ")
    assert out.endswith("did not end by itself: waiting until it must have noticed\nheld\n")


@pytest.mark.slow
def test_an_earlier_start_that_was_killed_may_have_left_ranks_and_one_that_ended_has_not(tmp_path: Path) -> None:
    first = start(tmp_path, "7")
    assert first.stdout.readline() == "held\n"
    first.kill()
    end(first)
    assert json.loads((tmp_path / ".lock").read_text())["job"] == "7"
    code, out, _ = end(start(tmp_path, "7", restarts=1))
    assert code == 0
    assert "did not end by itself" in out
    assert (tmp_path / ".lock").read_text() == ""
    assert end(start(tmp_path, "7", restarts=2)) == (0, "held\n", "")


def test_what_killed_processes_left_half_written_goes(tmp_path: Path) -> None:
    left = tmp_path / ".status.json.n1.17.partial"
    left.write_text('{"state": "run')
    with ExitStack() as held:
        claim._claim(tmp_path, held)
    assert not left.exists()
