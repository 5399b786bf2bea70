"""What a cluster does to a distillation on three nodes: each disturbance ends with the undisturbed run's weights.

A disturbance is a generator: what comes before its `yield` happens in the middle of the distillation, what comes after
it when training goes on. With -s the tests print the lines of docs/evidence/faults.md.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.distillation.records import read_metrics
from tests.e2e.chain import write_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.test_chain import ENVIRONMENT, REPOSITORY, status

pytestmark = pytest.mark.timeout(1500)

STEPS, SAVE_INTERVAL = 60, 10
PROCESS = r"\S*python\S* \S*minitron run"
# What a copy of the undisturbed run leaves out, to begin with the distillation.
RESULTS = shutil.ignore_patterns(
    "training", "distilled", "evaluation.json", "logs", "heartbeats", "status.json", ".lock"
)


@dataclass
class Run:
    """A run directory and the jobs that work on it, one after the other."""

    slurm: Cluster
    recipe: Path
    directory: Path  # of submission
    run_dir: Path
    jobs: list[int] = field(default_factory=list)

    def submit(self, *overrides: str, nodes: int = 3) -> None:
        script = REPOSITORY / "launch" / "distill.sh"
        options = ("--partition=spare", f"--nodes={nodes}", "--ntasks-per-node=1", "--time=30", "--signal=USR1@120")
        arguments = (str(self.recipe), f"run_dir={self.run_dir}", *overrides)
        self.jobs.append(self.slurm.sbatch(*options, script, *arguments, cwd=self.directory, env=ENVIRONMENT))

    @property
    def job(self) -> int:
        return self.jobs[-1]

    @property
    def files(self) -> Path:
        """The run directory, as this process reaches it."""
        return self.slurm.outside(self.run_dir)

    @property
    def console(self) -> str:
        """What rank 0 of all jobs printed, every start of them."""
        logs = (self.files / "logs" / f"{job}-0.log" for job in self.jobs)
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def wait_for(self, condition: Callable[[], Any], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{status(self.files)}\n{self.slurm.output(self.job)}\n{self.console}"
            time.sleep(0.1)

    def wait_for_update(self, update: int) -> None:
        self.wait_for(lambda: (status(self.files)["iteration"] or 0) >= update)

    def checkpoints(self) -> list[Path]:
        return sorted(self.files.glob("training/distilled-*/iter_*"))


def weights(run: Run) -> str:
    return fingerprint(run.files / "distilled")


def losses(run: Run) -> dict[int, float]:
    [path] = run.files.glob("training/distilled-*/metrics.jsonl")
    return {record["iteration"]: record["train/loss"] for record in read_metrics(path) if "train/loss" in record}


class Resumption(NamedTuple):
    """A start that went on after update `update`, when `made` were made before it and a checkpoint of `saved` said."""

    update: int
    made: int
    saved: int


def resumptions(run: Run) -> list[Resumption]:
    found, made, saved = [], 0, 0
    pattern = r"\[distill\] (?:(\d+)/\d+  |checkpoint after update (\d+):|resumed after update (\d+) )"
    for update, checkpoint, resumed in re.findall(pattern, run.console):
        if update:
            made = int(update)
        elif checkpoint:
            saved = int(checkpoint)
        else:
            found.append(Resumption(int(resumed), made, saved))
    return found


def report(run: Run, name: str, seconds: float | None) -> None:
    again = "" if seconds is None else f"{seconds:.0f}"
    state = run.slurm.job(run.job)["JobState"]
    lost = ", ".join(str(each.made - each.update) for each in resumptions(run))
    print(f"\n| {name} | {lost} | {again} | {state}, {status(run.files)['state']} |")


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(
        directory,
        teacher={"correction": {"steps": 0}},
        train={"steps": STEPS, "global_batch_size": 6, "save_interval": SAVE_INTERVAL, "eval_interval": 0},
        parallel={"pipeline_model_parallel_size": 1},
        cluster={"nodes": 3, "processes_per_node": 1},
        evaluate={"generate_tokens": 1},
        export={"formats": []},
    )
    run = Run(slurm, recipe, directory, directory / "run")
    run.submit()
    assert slurm.wait(run.job, 600)["JobState"] == "COMPLETED", slurm.output(run.job)
    assert slurm.job(run.job)["NodeList"] == "n[1-3]"
    assert resumptions(run) == []
    return run


def crash(run: Run) -> Generator[None, None, None]:
    run.slurm.crash("n2")
    try:
        yield
    finally:
        run.slurm.restart("n2")


def cut_first_node(run: Run) -> Generator[None, None, None]:
    """The node of rank 0 and of the batch script; both live on there, with the lock on the run directory."""
    return cut(run, "n1")


def cut_last_node(run: Run) -> Generator[None, None, None]:
    return cut(run, "n3")


def cut(run: Run, node: str) -> Generator[None, None, None]:
    run.slurm.cut(node)
    try:
        run.wait_for(lambda: "did not end by itself" in run.console)
        assert run.slurm.processes(node, PROCESS), "no split brain"
        yield
        assert not run.slurm.processes(node, PROCESS)
    finally:
        run.slurm.heal(node)


def signalled(run: Run) -> Generator[None, None, None]:
    run.slurm.run("scancel", "--signal=USR1", str(run.job))
    yield


def preempt(run: Run) -> Generator[None, None, None]:
    urgent = run.slurm.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", cwd=run.directory)
    assert run.slurm.wait(urgent, 120)["JobState"] == "COMPLETED"
    yield


def time_limit(run: Run) -> Generator[None, None, None]:
    hours, minutes, _ = map(int, run.slurm.job(run.job)["RunTime"].split(":"))
    # Slurm signals two minutes before the limit, which is now. It looks twice a minute, so the training waits for it.
    run.slurm.run("scancel", "--signal=STOP", str(run.job))
    run.slurm.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={60 * hours + minutes + 2}")
    time.sleep(35)
    run.slurm.run("scancel", "--signal=CONT", str(run.job))
    run.wait_for(lambda: status(run.files)["state"] == "stopped")
    run.slurm.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    yield


DISTURBANCES = [
    crash,
    signalled,
    *(pytest.param(each, marks=pytest.mark.soak) for each in (cut_first_node, cut_last_node, preempt, time_limit)),
]


def copied(undisturbed: Run, directory: Path, run_dir: Path) -> Run:
    """The undisturbed run up to the distillation."""
    run = Run(undisturbed.slurm, undisturbed.recipe, directory, run_dir)
    shutil.copytree(undisturbed.files, run.files, ignore=RESULTS)
    return run


def check_whole(run: Run, undisturbed: Run) -> None:
    """The last job ended well, with the undisturbed run's weights, and nothing is left of checkpoints that are not."""
    ended = run.slurm.wait(run.job, 600)
    assert (ended["JobState"], status(run.files)["state"]) == ("COMPLETED", "done"), run.slurm.output(run.job)
    assert weights(run) == weights(undisturbed)
    assert losses(run) == losses(undisturbed)
    assert not [*run.files.rglob("*.partial")]


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_a_disturbed_run_goes_on_by_itself_to_the_same_weights(
    undisturbed: Run, tmp_path: Path, disturbance: Callable[[Run], Generator[None, None, None]]
) -> None:
    run = copied(undisturbed, tmp_path, tmp_path / "run")
    run.submit()
    run.wait_for_update(2 * SAVE_INTERVAL + 2)
    start = time.monotonic()
    with closing(disturbance(run)) as steps:
        next(steps)
        run.wait_for(lambda: "resumed after update" in run.console)
        seconds = time.monotonic() - start
        next(steps, None)
    check_whole(run, undisturbed)
    [resumption] = resumptions(run)
    assert resumption.update >= resumption.saved
    if disturbance in (signalled, preempt, time_limit):
        assert resumption.update == resumption.made
    assert run.slurm.job(run.job)["Restarts"] == "1"
    report(run, disturbance.__name__.replace("_", " "), seconds)


def stopped(run: Run) -> None:
    """End the job after some updates with its state saved."""
    run.submit("cluster.max_requeues=0")
    run.wait_for_update(2 * SAVE_INTERVAL + 2)
    run.slurm.run("scancel", "--signal=USR1", str(run.job))
    assert run.slurm.wait(run.job, 120)["ExitCode"] == "75:0", run.slurm.output(run.job)
    assert status(run.files)["state"] == "stopped"


def test_a_truncated_newest_checkpoint_costs_the_updates_since_the_one_before(undisturbed: Run, tmp_path: Path) -> None:
    run = copied(undisturbed, tmp_path, tmp_path / "run")
    stopped(run)
    *_, before, newest = run.checkpoints()
    damaged = newest / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    run.submit()
    check_whole(run, undisturbed)
    where = damaged.relative_to(run.files)
    assert f"CHECKPOINT DAMAGED, falling back to the one before: {run.run_dir / where}: " in run.console
    assert [each.update for each in resumptions(run)] == [int(before.name.removeprefix("iter_"))]
    report(run, "newest checkpoint truncated", None)


@pytest.mark.soak
def test_a_run_goes_on_with_two_nodes_instead_of_three(undisturbed: Run, tmp_path: Path) -> None:
    run = copied(undisturbed, tmp_path, tmp_path / "run")
    stopped(run)
    first = 1 + status(run.files)["iteration"]
    run.submit(nodes=2)
    assert run.slurm.wait(run.job, 600)["JobState"] == "COMPLETED", run.slurm.output(run.job)
    assert [each.update for each in resumptions(run)] == [first - 1]
    here, there = losses(run), losses(undisturbed)
    for update in range(first, first + 5):
        assert here[update] == pytest.approx(there[update], rel=1e-5)
    held_out = [json.loads((each.files / "evaluation.json").read_text())["distilled"] for each in (run, undisturbed)]
    assert abs(held_out[0]["loss"] - held_out[1]["loss"]) < 2 * held_out[1]["loss_se"]
    report(run, "two nodes instead of three", None)


@pytest.mark.soak
def test_a_disk_that_is_full_for_a_while_costs_the_saves_of_that_time(
    slurm: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    run = copied(undisturbed, tmp_path, slurm.directory / "disk" / "while")
    (tmp_path / "logs").mkdir()
    (run.files / "logs").symlink_to(tmp_path / "logs")
    run.submit()
    run.wait_for_update(SAVE_INTERVAL + 2)
    with full(slurm):
        run.wait_for(lambda: "training goes on, the previous checkpoint is as it was" in run.console)
    check_whole(run, undisturbed)
    assert f"{run.run_dir}/status.json: No space left on device; training goes on" in run.console
    assert f"checkpoint after update {STEPS - SAVE_INTERVAL}: " in run.console
    report(run, "disk full, then not", None)


@pytest.mark.soak
def test_a_disk_that_stays_full_fails_the_job_and_the_next_one_goes_on(
    slurm: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    run = copied(undisturbed, tmp_path, slurm.directory / "disk" / "for good")
    run.submit()
    run.wait_for_update(SAVE_INTERVAL + 2)
    with full(slurm):
        assert slurm.wait(run.job, 600)["JobState"] == "FAILED", slurm.output(run.job)
    saved = [path.name for path in run.checkpoints()]
    assert saved[-1] == f"iter_{SAVE_INTERVAL:07d}"
    run.submit()
    check_whole(run, undisturbed)
    assert [each.update for each in resumptions(run)] == [SAVE_INTERVAL]
    report(run, "disk full for good", None)


@contextmanager
def full(slurm: Cluster) -> Iterator[None]:
    """The nodes' small disk has no byte left."""
    ballast = slurm.outside(slurm.directory / "disk") / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()
