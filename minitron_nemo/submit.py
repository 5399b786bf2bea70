"""`minitron submit`: sbatch's command lines by a recipe's `cluster` section; what the batch scripts ask of a recipe.

    launch/distill.sh                                           one job runs the whole chain, all stages of it
    launch/prune.sh --afterok--> launch/distill.sh              two, where `cluster.prune_nodes` is given

The scripts decide everything else inside the job, so that plain `sbatch launch/distill.sh RECIPE` does the same.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_nemo.config import Recipe
from minitron_nemo.errors import UserError
from minitron_nemo.preflight import preflight
from minitron_nemo.recipe_checks import absent
from minitron_nemo.stages import plans, stage_recipes

CONTAINER, MOUNTS = "MINITRON_CONTAINER", "MINITRON_CONTAINER_MOUNTS"  # read by launch/common.sh


@dataclass(frozen=True)
class Job:
    """A batch script of launch/ with the options of sbatch that the recipe gives it."""

    script: str
    options: tuple[str, ...]

    def command(self, home: Path, after: str | None, arguments: Sequence[str]) -> list[str]:
        """sbatch's command line; `after` is the job that has to end well first."""
        wait = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", "--parsable", *self.options, *wait, str(home / "launch" / self.script), *arguments]


def jobs(recipe: Recipe) -> list[Job]:
    """The jobs of a recipe in their order, after the recipe has been checked for each one's number of processes.

    Raises UserError for what is wrong with the recipe.
    """
    cluster = recipe.cluster
    plans(recipe)
    last = Job("distill.sh", _options(recipe, cluster.nodes))
    if cluster.prune_nodes is None:
        return [last]
    if recipe.stages:
        raise UserError(
            "cluster.prune_nodes: a recipe with stages trains between its prunings, which one job does; leave it out"
        )
    preflight(recipe, cluster.prune_nodes * cluster.processes_per_node, distils=False)
    return [Job("prune.sh", _options(recipe, cluster.prune_nodes)), last]


def submit(recipe: Recipe, path: Path, overrides: Sequence[str], dry_run: bool) -> str:
    """Submit the recipe at `path` with `overrides`; with `dry_run`, only say how.

    Returns what to tell the user: the commands, or the jobs and how to watch them. Raises UserError before anything is
    submitted when the recipe is wrong or what it reads is not here, and for whatever sbatch refuses.
    """
    home = repository()
    planned = jobs(recipe)
    _check_inputs(recipe, dry_run)
    arguments = [str(path), *overrides]
    if dry_run:
        commands = [job.command(home, "JOB" if number else None, arguments) for number, job in enumerate(planned)]
        exported = [f"{name}={value}" for name, value in _exports(recipe).items()]
        return "\n".join(shlex.join([*exported, *command]) for command in commands)
    lines, after = [], None
    for job in planned:
        after = _sbatch(job.command(home, after, arguments), _exports(recipe))
        lines.append(f"job {after}: {job.script}, output in {Path.cwd() / f'{recipe.name}-{after}.out'}")
    logs = Path(recipe.run_dir).absolute()
    lines += [
        f"watch:  squeue --me; tail -F {shlex.quote(f'{recipe.name}-{after}.out')}",
        f"state:  {logs / 'status.json'}; logs of every rank: {logs / 'logs'}",
        f"stop:   scancel --signal=USR1 {after}   (saves and requeues; `scancel {after}` ends it)",
    ]
    return "\n".join(lines)


def _check_inputs(recipe: Recipe, dry_run: bool) -> None:
    """Raise UserError for a model or a text that the job would look for in vain; warn where it may yet find it."""
    container = _exports(recipe).get(CONTAINER)
    missing: dict[str, str] = {}
    for own in stage_recipes(recipe).values() or [recipe]:
        missing |= absent(own)
    for key, path in missing.items():
        if container not in (None, "null"):
            print(f"minitron: warning: {key}: {path} is not here; a mount has to bring it", file=sys.stderr)
        elif dry_run:
            print(f"minitron: warning: {key}: {path} is not here; without --dry-run that is refused", file=sys.stderr)
        else:
            raise UserError(f"{key}: {path} is not here; put it there first (relative paths count from {Path.cwd()})")


def submit_script(script: str, recipe: Recipe, arguments: Sequence[str]) -> str:
    """Submit a batch script of launch/ by the recipe's `cluster` section and return the job's id.

    Raises UserError for whatever sbatch refuses.
    """
    job = Job(script, _options(recipe, recipe.cluster.nodes))
    return _sbatch(job.command(repository(), None, arguments), _exports(recipe))


def queued_names() -> set[str]:
    """Names of this user's jobs that have not ended. Waits for a controller that does not answer.

    Raises UserError where there is no Slurm.
    """
    while True:
        try:
            done = subprocess.run(
                ["squeue", "--me", "--noheader", "--format=%j"], capture_output=True, text=True, check=True
            )
        except FileNotFoundError:
            raise UserError("squeue: not found; search.launcher slurm is started where Slurm is installed") from None
        except subprocess.CalledProcessError as error:
            print(f"squeue: {' '.join(error.stderr.split())}; asked again", flush=True)
            time.sleep(30)
        else:
            return set(done.stdout.splitlines())


def shell_variables(recipe: Recipe) -> str:
    """What launch/common.sh needs to know of a recipe, as assignments that a shell can evaluate."""
    values = {
        "run_dir": str(Path(recipe.run_dir).absolute()),
        "max_requeues": str(recipe.cluster.max_requeues),
    }
    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in values.items())


def repository() -> Path:
    """The clone whose batch scripts are submitted: MINITRON_HOME, or where this package was installed from."""
    home = Path(os.environ.get("MINITRON_HOME") or Path(__file__).parents[1])
    if not (home / "launch" / "distill.sh").is_file():
        raise UserError(f"{home}: has no launch/distill.sh; set MINITRON_HOME to a clone of minitron_nemo")
    return home


def _options(recipe: Recipe, nodes: int) -> tuple[str, ...]:
    cluster = recipe.cluster
    given = {
        "gpus-per-node": cluster.gpus_per_node,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
    }
    return (
        f"--job-name={recipe.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={cluster.processes_per_node}",
        f"--signal=USR1@{cluster.signal_seconds}",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        *cluster.sbatch,
    )


def _exports(recipe: Recipe) -> dict[str, str]:
    """What goes into a job's environment: the container of this one or else the recipe's, and the mounts of both.

    The batch script reads the recipe's container by itself, too, but sees none that is written within braces.
    """
    container = os.environ.get(CONTAINER) or recipe.cluster.container
    mounts = ",".join([*recipe.cluster.container_mounts, *filter(None, [os.environ.get(MOUNTS)])])
    return {name: value for name, value in ((CONTAINER, container), (MOUNTS, mounts)) if value}


def _sbatch(command: Sequence[str], exported: Mapping[str, str]) -> str:
    """Submit a job and return its id."""
    try:
        done = subprocess.run(command, env={**os.environ, **exported}, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UserError("sbatch: not found; submit where Slurm is installed, or see --dry-run") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch: {' '.join(error.stderr.split())} (of: {shlex.join(command)})") from None
    return done.stdout.strip().split(";")[0]  # ID;CLUSTER on federations
