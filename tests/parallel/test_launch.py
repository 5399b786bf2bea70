"""Where a process finds its job."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.distributed import PrefixStore

from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.console import outlive_a_full_disk
from minitron_nemo.parallel.environment import Job, job_from_environment, launched
from minitron_nemo.parallel.launch import Rendezvous
from tests.pool import run_distributed

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "n[1-2]",
}

JOINS = """
import os
from minitron_nemo.parallel import launch
import torch
launch.join_job()
launch.join_job()
total = torch.tensor(float(launch.rank()))
torch.distributed.all_reduce(total)
print(launch.rank(), launch.world_size(), total.item(), torch.get_num_threads())
launch.shutdown()
"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for Slurm's: `scontrol show hostnames n[1-2]`."""
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def _run(environment: dict[str, str], ranks: list[dict[str, str]]) -> list[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINS],
            env=kept | {"GLOO_SOCKET_IFNAME": "lo"} | environment | rank,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in ranks
    ]
    return [process.communicate(timeout=120)[0].strip() for process in processes]


def test_torchrun_variables_are_read() -> None:
    assert job_from_environment(TORCHRUN) == Job(3, 4, 1, 2, "10.0.0.1", 29500)


def test_srun_variables_are_read_and_the_first_host_is_the_master(scontrol: None) -> None:
    job = job_from_environment(SRUN)
    assert job is not None
    assert (job.rank, job.world_size, job.local_rank, job.local_size) == (5, 8, 1, 4)
    assert job.master_address == "n1"
    assert 15000 <= job.master_port < 30000


def test_every_task_derives_the_same_port_and_another_step_another(scontrol: None) -> None:
    ports = {job_from_environment(SRUN | changed).master_port for changed in ({"SLURM_PROCID": "0"}, {})}  # type: ignore[union-attr]
    assert len(ports) == 1
    assert job_from_environment(SRUN | {"SLURM_STEP_ID": "1"}).master_port not in ports  # type: ignore[union-attr]


def test_a_master_that_is_set_is_used() -> None:
    job = job_from_environment(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert job is not None
    assert (job.master_address, job.master_port) == ("head", 1234)


def test_torchrun_inside_srun_is_torchrun() -> None:
    assert job_from_environment(SRUN | TORCHRUN) == job_from_environment(TORCHRUN)


def test_a_plain_call_in_a_batch_script_is_a_process_of_its_own() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "123"}
    assert job_from_environment(batch) is None
    assert job_from_environment({}) is None
    assert not launched(batch) and not launched({}) and not launched({"RANK": "0"})
    assert launched(TORCHRUN) and launched(SRUN) and launched(batch | TORCHRUN)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({**TORCHRUN, "RANK": "first"}, "RANK is 'first', not a whole number"),
        ({key: SRUN[key] for key in SRUN if key != "SLURM_NTASKS"}, "SLURM_NTASKS is not set"),
    ],
)
def test_an_incomplete_environment_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        job_from_environment(environment)


def test_without_scontrol_the_master_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="MASTER_ADDR is not set and scontrol cannot list"):
        job_from_environment(SRUN)


@pytest.mark.slow
def test_a_process_alone_and_two_srun_tasks_join_their_jobs() -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = SRUN | {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tasks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    assert _run(step, tasks) == ["0 2 1.0 1", "1 2 1.0 1"]
    alone = _run({"OMP_NUM_THREADS": "2"}, [{}])
    assert alone == ["0 1 0.0 2"]


def test_what_is_printed_to_a_full_disk_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        outlive_a_full_disk()
        print("x" * 100_000, flush=True)
        print("x", file=sys.stderr, flush=True)
        monkeypatch.undo()


def _joined_anew(gpu: str, seeing: set[int]) -> tuple[str, str] | None:
    """What joining a job for `gpu` raises on this rank, where the ranks `seeing` have one; None where they join."""
    rank, world_size, store = launch.job_rank(), launch.job_size(), launch._rendezvous().store
    sees = patch.object(torch.cuda, "is_available", return_value=True)
    launch.shutdown()
    try:
        with patch.object(launch, "enter_world"), sees if rank in seeing else nullcontext():
            launch.join_job(Rendezvous(PrefixStore("anew", store), rank, world_size), gpu)
        return None
    except UserError as error:
        return type(error).__name__, str(error)
    finally:
        launch.shutdown()
        launch.join_job(Rendezvous(PrefixStore("afterwards", store), rank, world_size))


@pytest.mark.slow
@pytest.mark.parametrize(("seeing", "said"), [(set(), ""), ({0, 2}, "rank 1: ")])
def test_a_job_for_gpus_ends_where_a_process_sees_none_and_rank_0_says_it(seeing: set[int], said: str) -> None:
    found = run_distributed(3, _joined_anew, "h100-80gb", seeing)
    assert [name for name, _ in found] == ["UserError", "SaidByRankZero", "SaidByRankZero"]
    (text,) = {text for _, text in found}
    assert text.startswith(f"{said}cluster.gpu: h100-80gb, but this process sees no GPU; ")


@pytest.mark.slow
def test_a_job_for_gpus_joins_where_every_process_sees_one() -> None:
    assert run_distributed(3, _joined_anew, "h100-80gb", {0, 1, 2}) == [None, None, None]
