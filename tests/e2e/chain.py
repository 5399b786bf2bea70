"""What the end-to-end tests share: a recipe that takes seconds, and the command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from tests.text import write_documents
from tests.tiny import write_tiny_llama


def write_recipe(directory: Path, **sections: dict) -> Path:
    """A tiny model, real English, every step of the chain, two processes with PP=2."""
    model = write_tiny_llama(directory / "model", num_layers=4, tied=True)
    recipe = {
        "name": "tiny",
        "run_dir": str(directory / "run"),
        "model": {"source": str(model)},
        "data": {
            "train": [{"path": str(write_documents(directory / "text"))}],
            "heldout_fraction": 0.2,
            "sequence_length": 64,
        },
        "prune": {
            "ffn_hidden_size": 64,
            "num_layers": 2,
            "depth_method": "greedy",
            "depth": {"samples": 8},
            "calibration": {"samples": 8, "save_interval": 3},
            "repair": {"samples": 16},
        },
        "teacher": {"correction": {"steps": 4, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1}},
        "train": {
            "steps": 6,
            "global_batch_size": 4,
            "lr": 1e-3,
            "min_lr": 1e-4,
            "warmup_steps": 1,
            "precision": "fp32",
            "save_interval": 2,
            "eval_interval": 3,
        },
        "parallel": {"pipeline_model_parallel_size": 2},
        "evaluate": {"documents": 6, "generate_tokens": 4},
        "cluster": {"launcher": "local", "processes_per_node": 2},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}  # type: ignore[dict-item]
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def refusal(stderr: str) -> str:
    """The one line that a refused command prints."""
    lines = [line for line in stderr.splitlines() if line.startswith("minitron: error: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


class Command:
    """A `minitron` process, its output in a file, killed with all it started when the test ends."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "minitron_nemo.cli", *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = 240) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def wait_at_most(self, seconds: float) -> int | None:
        """The exit code, or None for a process that had to be killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def wait_for(self, condition, timeout: float = 120) -> None:  # type: ignore[no-untyped-def]
        """Poll until `condition()` holds; fails with the output when the process ends first."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"timed out:\n{self.output}"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL to the process and to everything it started, workers in their own sessions included."""
        try:
            parent = psutil.Process(self.process.pid)
        except psutil.NoSuchProcess:
            return
        family = [*parent.children(recursive=True), parent]
        for member in family:
            member.suspend() if member.is_running() else None
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=20)
        self.process.wait()
