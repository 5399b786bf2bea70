"""The job that this process is in, as torchrun's or srun's variables say."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from minitron_nemo.errors import UserError


@dataclass(frozen=True)
class Job:
    """This process's place in its job. `local_size` counts the job's processes on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_address: str
    master_port: int


def launched(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or srun started this process, as one of a job.

    A batch script's own shell carries SLURM_PROCID as well, but only an srun step has SLURM_STEP_ID: a plain call in
    the script is a process of its own.
    """
    return _by_torchrun(environment) or {"SLURM_PROCID", "SLURM_STEP_ID"} <= environment.keys()


def job_from_environment(environment: Mapping[str, str]) -> Job | None:
    """Read the job from torchrun's or srun's variables; None for a process that neither `launched`.

    Raises UserError for an incomplete environment.
    """
    if not launched(environment):
        return None
    return _torchrun_job(environment) if _by_torchrun(environment) else _srun_job(environment)


def _by_torchrun(environment: Mapping[str, str]) -> bool:
    return {"RANK", "WORLD_SIZE"} <= environment.keys()


def _torchrun_job(environment: Mapping[str, str]) -> Job:
    world_size = _integer(environment, "WORLD_SIZE")
    return Job(
        rank=_integer(environment, "RANK"),
        world_size=world_size,
        local_rank=_integer(environment, "LOCAL_RANK"),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        master_address=_required(environment, "MASTER_ADDR"),
        master_port=_integer(environment, "MASTER_PORT"),
    )


def _srun_job(environment: Mapping[str, str]) -> Job:
    world_size = _integer(environment, "SLURM_NTASKS")
    nodes = int(environment.get("SLURM_NNODES", 1))
    return Job(
        rank=_integer(environment, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environment, "SLURM_LOCALID"),
        local_size=-(-world_size // nodes),
        master_address=environment.get("MASTER_ADDR") or _first_host(environment),
        master_port=int(environment.get("MASTER_PORT") or _port(environment)),
    )


def _first_host(environment: Mapping[str, str]) -> str:
    """First host of the step, which is where rank 0 runs; the job's first host where the step has no list."""
    hosts = environment.get("SLURM_STEP_NODELIST") or _required(environment, "SLURM_JOB_NODELIST")
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], check=True, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"environment: MASTER_ADDR is not set and scontrol cannot list {hosts!r}: {error}") from None
    return listing.stdout.split()[0]


def _port(environment: Mapping[str, str]) -> int:
    """A port every task derives alike, another for other jobs and steps on the machine, below the ephemeral range."""
    job, step = _integer(environment, "SLURM_JOB_ID"), _integer(environment, "SLURM_STEP_ID")
    return 15000 + (job * 17 + step) % 15000


def _required(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UserError(f"environment: {name} is not set; start the job with torchrun or srun, or without either")
    return environment[name]


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = _required(environment, name)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment: {name} is {text!r}, not a whole number") from None
