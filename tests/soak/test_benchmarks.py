"""Every benchmark whole, as small as its options make it: it ends well, and prints its figures."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
# What is printed at the end, and the command line.
ALONE = {
    "calibration": ("ratio", "benchmarks/calibration.py --layers 1 --hidden-size 64 --sequence-length 32 --repeat 1"),
    "kd_loss": (
        "linear_kd_loss",
        "benchmarks/kd_loss.py --tokens 32 --vocab 64 --student-width 16 --teacher-width 16 --repetitions 1",
    ),
    "plan": ("share of the peak", "benchmarks/plan.py --layers 4 --vocab-size 256 --sequence-length 32 --repeat 1"),
    "step": ("step", "benchmarks/step.py --layers 1 --sequence-length 32 --microbatches 1 --repeat 1"),
    "transform": (
        "copy",
        "benchmarks/transform.py --layers 1 --vocab-size 1000 --repeat 1 --processes 2 --passes 'prune HF -> Megatron'",
    ),
    "norms": ("readers", "-m benchmarks.norms --teacher-steps 2 --steps 1 --seeds 1"),
    "kernels": ("sm_90", "-m tests.kernels.aot"),
    "mixtures": ("both 2/3", "-m benchmarks.mixtures --teaching 1 --steps 0 --shapes 'both 2/3'"),
}
TOGETHER = {
    "calibration": ("ratio", "benchmarks/calibration.py --layers 2 --hidden-size 64 --pipeline 2 --repeat 1"),
    "checkpoint": ("save", "benchmarks/checkpoint.py --pipeline 2 --layers 2 --saves 1 --microbatches 1"),
    "communication": ("all-reduce", "benchmarks/communication.py"),
    "overlap": ("waits", "benchmarks/overlap.py --updates 8 --sequence-length 16 --ffn 64"),
}
OF_A_RUN = {
    "cuts": (
        "ffn 960",
        "benchmarks/cuts.py --shapes 'ffn 960' --arms ours --samples 2 --documents 2 --seeds 1 --steps 1",
    ),
    "depth": (
        "block_influence",
        "benchmarks/depth.py --methods block_influence --samples 1 --documents 2 --questions 4 --judge-questions 4",
    ),
}


def run(place: Path, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = tuple(str(ROOT / word) if word.startswith("benchmarks/") else word for word in words)
    done = subprocess.run(
        [sys.executable, *words], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ALONE)
def test_a_benchmark_of_one_process_runs(name: str, tmp_path: Path) -> None:
    printed, command = ALONE[name]
    assert printed in run(tmp_path, *shlex.split(command))


@pytest.mark.parametrize("name", TOGETHER)
def test_a_benchmark_of_two_processes_runs(name: str, tmp_path: Path) -> None:
    printed, command = TOGETHER[name]
    assert printed in run(tmp_path, *TORCHRUN, *shlex.split(command))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's teacher and data."""
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    for step in ("convert", "prepare"):
        run(ROOT, "-m", "minitron_nemo.cli", step, "recipes/quickstart.yaml", f"run_dir={directory}")
    return directory


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_benchmark_of_the_quickstart_runs(name: str, base: Path, tmp_path: Path) -> None:
    printed, command = OF_A_RUN[name]
    assert printed in run(tmp_path, *shlex.split(command), "--base", str(base), "--place", str(tmp_path / "place"))
