"""Starts tests.nemo.nemo_job under torchrun and gives what it logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.checkpoint.transform import convert
from tests.tiny import write_tiny_llama

ROOT = Path(__file__).parents[2]


def write_models(directory: Path, depth: bool = False) -> tuple[Path, Path]:
    """Student and teacher of two widths (or depths), Hugging Face and (in SAME-nemo) NeMo checkpoints.

    260 tokens: NeMo takes the vocabulary as it is, and it has to divide by the tensor-parallel size.
    """
    sizes = (
        ({"num_layers": 2}, {"num_layers": 4}) if depth else ({"num_layers": 2, "hidden_size": 48}, {"num_layers": 2})
    )
    student = write_tiny_llama(directory / "student", ffn_hidden_size=64, vocab_size=260, seed=1, **sizes[0])
    teacher = write_tiny_llama(directory / "teacher", vocab_size=260, seed=2, **sizes[1])
    for model in (student, teacher):
        convert(model, nemo(model), "nemo", progress=False)
    return student, teacher


def nemo(model: Path) -> Path:
    return model.with_name(f"{model.name}-nemo")


def write_samples(path: Path, batches: list[dict[str, Any]]) -> None:
    """Microbatches of one row, as `tests.distillation.reference` makes them, as samples of a NeMo dataset."""
    samples = []
    for batch in batches:
        sample = {name: batch[name][0] for name in ("tokens", "labels", "position_ids")}
        samples.append({**sample, "loss_mask": batch["token_weights"][0]})
    torch.save(samples, path)


def run_job(job: str, directory: Path, student: Path, samples: Path, **settings: Any) -> dict[str, float]:
    """Run a job in its processes and return what Lightning logged. Everything it writes is under `directory`."""
    directory.mkdir()
    given = {
        "student": str(nemo(student)),
        "samples": str(samples),
        "log_dir": str(directory / "log"),
        "metrics": str(directory / "metrics.json"),
        "scores": str(directory / "scores.npz"),
        "processes": 1,
        "precision": "32",
        "layout": {},
        "intermediate": {"pairs": []},
        **settings,
    }
    path = directory / "settings.json"
    path.write_text(json.dumps(given))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given['processes']}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, "-m", "tests.nemo.nemo_job", job, str(path)]
    done = subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    logged: dict[str, float] = json.loads((directory / "metrics.json").read_text())
    return logged
