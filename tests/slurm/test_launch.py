"""launch/distill.sh: which processes it starts, where, with what. `minitron` is a script that tells, in these tests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.slurm.cluster import PATH, Cluster

SCRIPT = Path(__file__).parents[2] / "launch" / "distill.sh"


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A repository with the launch script and a virtual environment whose `minitron` prints its place and arguments."""
    home = tmp_path / "a clone"  # with a space, as home directories have them
    (home / "recipes").mkdir(parents=True)
    (home / "pyproject.toml").touch()
    (home / "recipes" / "small.yaml").write_text("name: small\n")
    (home / "launch").mkdir()
    shutil.copy(SCRIPT, home / "launch")
    executable(
        home / ".venv" / "bin" / "minitron",
        'echo "place $(hostname) $SLURM_PROCID/$SLURM_NTASKS $SLURM_LOCALID gpus=$CUDA_VISIBLE_DEVICES"'
        ' "master=$MASTER_ADDR threads=$OMP_NUM_THREADS"\nprintf "argument %s\\n" "$PWD" "$@"\n',
    )
    return home


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The directory a user submits from."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def submit(
    slurm: Cluster,
    home: Path,
    work: Path,
    *arguments: str,
    sbatch: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> int:
    return slurm.sbatch(*sbatch, home / "launch" / "distill.sh", *arguments, cwd=work, env=env)


def lines(slurm: Cluster, job: int, word: str) -> list[str]:
    """Lines of a job's output that start with `word`, without srun's labels, by rank."""
    return [line.split(": ", 1)[1] for line in sorted(slurm.output(job).splitlines()) if f": {word} " in line]


def test_every_gpu_of_every_node_gets_a_process(slurm: Cluster, home: Path, work: Path) -> None:
    job = submit(slurm, home, work, "recipes/small.yaml", sbatch=("--partition=gpu",), env={"OMP_NUM_THREADS": "3"})
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    assert lines(slurm, job, "place") == [
        f"place g{1 + rank // 2} {rank}/4 {rank % 2} gpus=0,1 master=g1 threads=3" for rank in range(4)
    ]


def test_a_node_without_gpus_gets_the_processes_asked_for(slurm: Cluster, home: Path, work: Path) -> None:
    job = submit(slurm, home, work, "recipes/small.yaml", sbatch=("--ntasks-per-node=2",), env={"OMP_NUM_THREADS": ""})
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    # Each node claims 4 processors: 2 for each process.
    assert lines(slurm, job, "place") == [
        f"place n{1 + rank // 2} {rank}/4 {rank % 2} gpus= master=n1 threads=2" for rank in range(4)
    ]


def test_recipe_and_overrides_arrive_whole(slurm: Cluster, home: Path, work: Path) -> None:
    (work / "mine.yaml").write_text("name: mine\n")
    job = submit(slurm, home, work, "mine.yaml", "name=two words", "data.train=[{path: a*b}]", sbatch=("--nodes=1",))
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    expected = [str(work), "run", "mine.yaml", "name=two words", "data.train=[{path: a*b}]", "cluster.launcher=none"]
    printed = [line.split(": ", 1)[1] for line in slurm.output(job).splitlines() if ": argument " in line]
    assert printed == [f"argument {word}" for word in expected]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "no recipe given"),
        (("absent.yaml",), {}, "absent.yaml: no such recipe"),
        (("recipes/small.yaml",), {"MINITRON_HOME": "/nowhere"}, "no repository in '/nowhere'; set MINITRON_HOME"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    slurm: Cluster, home: Path, work: Path, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    job = submit(slurm, home, work, *arguments, env=environment)
    assert slurm.wait(job, 30)["ExitCode"] == "2:0"
    assert slurm.output(job).startswith("distill.sh: error: ")
    assert message in slurm.output(job)
    assert slurm.output(job).count("\n") == 1


@pytest.mark.parametrize(
    ("section", "override", "environment", "image"),
    [
        ("", None, "", None),
        ("cluster:\n  nodes: 2\n  container: null\n", None, "", None),
        ("cluster:\n  nodes: 2\n  container: 'site#recipe:1'  # pinned\n", None, "", "site#recipe:1"),
        ("cluster:\n  container: site#recipe:1\nnext:\n  container: x\n", "site#override:2", "", "site#override:2"),
        ("", "site#override:2", "site#environment:3", "site#environment:3"),
    ],
)
def test_the_container_is_given_to_pyxis(
    slurm: Cluster,
    home: Path,
    work: Path,
    section: str,
    override: str | None,
    environment: str,
    image: str | None,
) -> None:
    # The test cluster has no pyxis: an `srun` that prints its options stands in for one.
    commands = executable(work / "bin" / "srun", 'printf "option %s\\n" "$@"\n').parent
    (work / "mine.yaml").write_text("name: mine\n" + section)
    env = {
        "PATH": f"{commands}:{PATH}",
        "MINITRON_CONTAINER": environment,
        "MINITRON_CONTAINER_MOUNTS": "/data:/data",
    }
    overrides = [] if override is None else [f"cluster.container={override}"]
    job = submit(slurm, home, work, "mine.yaml", *overrides, env=env)
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    options = [line.removeprefix("option ") for line in slurm.output(job).splitlines() if line.startswith("option ")]
    container = [option for option in options if option.startswith("--container")]
    if image is None:
        assert container == []
        assert str(home / ".venv" / "bin" / "minitron") in options
    else:
        assert container == [
            f"--container-image={image}",
            f"--container-mounts={home}:{home},{work}:{work},/data:/data",
            f"--container-workdir={work}",
        ]
        assert "minitron" in options


def test_the_time_limit_signals_every_process_and_the_job_says_75(slurm: Cluster, home: Path, work: Path) -> None:
    executable(
        home / ".venv" / "bin" / "minitron",
        'trap "echo saved $SLURM_PROCID; exit 75" USR1\nwhile true; do sleep 0.1; done\n',
    )
    # The lead is longer than the limit, so the signal comes as soon as the job runs.
    job = submit(slurm, home, work, "recipes/small.yaml", sbatch=("--time=4",))
    state = slurm.wait(job, 90)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "75:0"), slurm.output(job)
    assert lines(slurm, job, "saved") == ["saved 0", "saved 1"]


@pytest.mark.soak
def test_a_process_that_dies_takes_the_job_along(slurm: Cluster, home: Path, work: Path) -> None:
    executable(home / ".venv" / "bin" / "minitron", "[[ $SLURM_PROCID == 0 ]] && exec sleep 600\nkill -KILL $$\n")
    job = submit(slurm, home, work, "recipes/small.yaml")
    assert slurm.wait(job, 120)["JobState"] == "FAILED"
