"""A candidate's chain for some updates: its recipe, what it measured, how it ended."""

from __future__ import annotations

import hashlib
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minitron_nemo.chain import Chain, unchanged
from minitron_nemo.checkpoint.files import read_json, write_atomic
from minitron_nemo.config import recipe_yaml
from minitron_nemo.distillation.checkpoints import TRACKER
from minitron_nemo.distillation.status import FILE_NAME as STATUS
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.report import read_evaluation
from minitron_nemo.parallel import launch
from minitron_nemo.preflight import preflight
from minitron_nemo.search.candidates import candidate_recipe
from minitron_nemo.search.plan import SearchPlan
from minitron_nemo.search.results import Result, load_result, result_key, save_result
from minitron_nemo.search.shapes import Candidate


@dataclass(frozen=True)
class Trial:
    """A candidate's chain for some updates. Its `key` is None while there is nothing to cut it from."""

    candidate: Candidate
    steps: int
    chain: Chain
    key: str | None

    @property
    def directory(self) -> Path:
        return self.chain.run_dir

    @property
    def result_file(self) -> Path:
        return self.directory / f"result_{self.steps}.json"


def trial_of(plan: SearchPlan, candidate: Candidate, steps: int) -> Trial:
    """That of a candidate of `plan`. Collective. Raises UserError where its recipe cannot be run."""
    recipe = candidate_recipe(plan.recipe, candidate, steps)
    chain = Chain(launch.from_rank_0(lambda: preflight(recipe, plan.world_size)))
    return Trial(candidate, steps, chain, result_key(chain))


def known(trial: Trial) -> Result | None:
    """What it measured, if that is on record. Collective."""
    return launch.from_rank_0(lambda: load_result(trial.result_file, trial.key))


def record(trial: Trial) -> Result:
    """Keep a finished trial's result; its training checkpoints have served."""
    assert trial.key is not None, "a trial that ended well read teacher, text and Scores"
    evaluation = read_evaluation(trial.chain.evaluation)
    result = save_result(trial.result_file, trial.key, trial.steps, evaluation)
    for training in (trial.directory / "training").glob("distilled-*"):
        (training / TRACKER).unlink(missing_ok=True)
        for checkpoint in training.glob("iter_*"):
            shutil.rmtree(checkpoint)
    return result


def write_recipe(trial: Trial) -> Path:
    """The file of the trial's recipe."""
    path = trial.directory / f"{trial.steps}.yaml"
    trial.directory.mkdir(parents=True, exist_ok=True)
    write_atomic(path, recipe_yaml(trial.chain.recipe))
    return path


def ended_well(trial: Trial, patience: float) -> bool:
    """Whether nothing of its chain is left to do; for files of another machine it waits up to `patience` seconds."""
    deadline = time.monotonic() + patience
    while not unchanged(trial.chain):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def mark(directory: Path, key: str | None) -> str:
    """What tells a task from those of other run directories and other settings."""
    return hashlib.sha256(f"{directory.absolute()} {key}".encode()).hexdigest()[:8]


def reason(run_dir: Path) -> str:
    """What a run says of its end, if it says anything that can be read."""
    with suppress(UserError):
        status = read_json(run_dir / STATUS)
        if status.get("state") in ("failed", "stopped"):
            return f"{status['state']}: {status.get('reason')}"
    return "it did not come to its end"
