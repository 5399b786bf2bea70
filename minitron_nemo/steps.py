"""A step of the chain: what it reads, what decides its result, what it writes; run once, recorded in the manifest."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import minitron_nemo
from minitron_nemo.checkpoint.fingerprint import checkpoint_identity
from minitron_nemo.distillation.status import write_status
from minitron_nemo.errors import UserError
from minitron_nemo.manifest import Manifest, file_fingerprint, step_key
from minitron_nemo.parallel import launch


class Stopped(Exception):
    """A signal stopped the run with its state saved; the CLI exits with 75."""


@dataclass(frozen=True)
class Step:
    """One arrow of the chain. `inputs` are paths it reads; `settings` decide its result; `output` is what it writes."""

    name: str
    inputs: Mapping[str, Path]
    settings: Mapping[str, Any]
    output: Path
    work: Callable[[str], None]  # called on every rank with the step's key
    finds_out: bool = False  # whether `work` itself knows what is left to do, and is called each time
    stage: str | None = None  # of the recipe, that the step belongs to
    borrowed_from: Path | None = None  # the run directory of another recipe that it belongs to; then it is not run here

    @property
    def label(self) -> str:
        """What the console and status.json call it."""
        return self.name if self.stage is None else f"{self.stage}/{self.name}"

    @property
    def record(self) -> str:
        """Its name in the manifest."""
        return f"{self.label}/{self.output.name}" if self.name == "export" else self.label


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end a step; trainings have handlers of their own, which save first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def inputs_of(step: Step, steps: Sequence[Step]) -> dict[str, str]:
    """Fingerprints of what it reads. Raises UserError for what is not there, naming which of `steps` makes it."""
    return {name: _input_fingerprint(step, name, path, steps) for name, path in step.inputs.items()}


def is_done(step: Step, inputs: Mapping[str, str], run_dir: Path) -> bool:
    """Whether the manifest of the run that the step belongs to says that its result is there."""
    manifest = Manifest(step.borrowed_from or run_dir)
    return manifest.done(step.record, step_key(inputs, step.settings), fingerprint_of(step.output))


def outdated(step: Step, run_dir: Path) -> str | None:
    """What tells the step's result from what it would be now, by the manifest, in a few words; None for nothing."""
    inputs = {name: fingerprint_of(path) or "nothing" for name, path in step.inputs.items()}
    entry = Manifest(run_dir).steps.get(step.record)
    if entry is None:
        return f"no record of {step.label} says what it is"
    if entry["key"] != step_key(inputs, step.settings):
        return _difference(entry, inputs, step.settings)
    return None if entry["output"] == fingerprint_of(step.output) else f"not what {step.label} wrote"


def _difference(entry: Mapping[str, Any], inputs: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Between a record of another key and what decides the result now: the first one."""
    before, now = _by_key(entry["settings"]), _by_key(json.loads(json.dumps(settings)))
    for key in {**now, **before}:
        if before.get(key, "unset") != now.get(key, "unset"):
            return f"made with {key} {before.get(key, 'unset')}, which now is {now.get(key, 'unset')}"
    other = next(name for name in {**inputs, **entry["inputs"]} if entry["inputs"].get(name) != inputs.get(name))
    return f"made of another {other} than is there now"


def _by_key(settings: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Nested settings as one mapping, with dots in its keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _by_key(value, f"{within}{key}.") if value and isinstance(value, dict) else {within + key: value}
    return found


def run_step(step: Step, run_dir: Path, steps: Sequence[Step]) -> None:
    """Run the step, one of `steps`, on every rank of the job, unless the manifest says that its result is there.

    Raises UserError.
    """
    inputs = launch.from_rank_0(lambda: inputs_of(step, steps))
    key = step_key(inputs, step.settings)
    label = f"[{step.label}]"
    if not step.finds_out and launch.from_rank_0(lambda: is_done(step, inputs, run_dir)):
        _say(f"{label} unchanged, not run again: {step.output}")
        return
    if step.borrowed_from is not None:
        raise UserError(
            f"from_run {step.borrowed_from}: {step.output.name} is not there, or is not what {step.name} makes of this "
            "recipe; run it there first"
        )
    _say(f"{label} -> {step.output}")
    launch.from_rank_0(lambda: write_status(run_dir, "running", step=step.label))
    start = time.time()
    step.work(key)
    launch.barrier()

    def finish() -> None:
        entry = {
            "key": key,
            "inputs": inputs,
            "settings": dict(step.settings),
            "output": fingerprint_of(step.output),
            "seconds": round(time.time() - start, 3),
            "processes": launch.world_size(),
            "versions": {"minitron_nemo": minitron_nemo.__version__, "torch": torch.__version__},
        }
        Manifest(run_dir).record(step.record, entry)

    launch.from_rank_0(finish)
    _say(f"{label} done in {time.time() - start:.1f} s")


def fingerprint_of(path: Path) -> str | None:
    """A checkpoint's layout-free identity, hash of the bytes of anything else, None for what is not there."""
    if not path.exists():
        return None
    is_checkpoint = (path / "architecture.json").exists() or (path / "config.json").exists()
    return checkpoint_identity(path) if is_checkpoint else file_fingerprint(path)


def _input_fingerprint(step: Step, name: str, path: Path, steps: Sequence[Step]) -> str:
    found = fingerprint_of(path)
    if found is None:
        makers = [f"run {other.label}" for other in steps if other.output in (path, *path.parents)]
        first = makers[0] if makers else "put it there"
        raise UserError(f"{path}: not there, but {step.label} reads it as its {name}; {first} first")
    return found


def _say(message: str) -> None:
    if launch.rank() == 0:
        print(message, flush=True)
