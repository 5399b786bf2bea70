"""The batch scripts of launch/: which processes they start, where, with what; when they requeue their job.

`minitron` is a script that tells, in these tests.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.documents import Shown, commands
from tests.slurm.cluster import PATH, Cluster

LAUNCH = Path(__file__).parents[2] / "launch"
# What launch/common.sh asks of a recipe.
PLAN = """
if [[ $1 == plan ]]; then
    if grep -q wrong "$2"; then echo "minitron: error: $2: wrong" >&2; exit 2; fi
    printf 'run_dir=%q\\nmax_requeues=3\\n' "$PWD/run 100%"
    exit
fi
"""
PLACE = """
echo "place $(hostname) $SLURM_PROCID/$SLURM_NTASKS $SLURM_LOCALID gpus=$CUDA_VISIBLE_DEVICES" \\
    "master=$MASTER_ADDR threads=$OMP_NUM_THREADS"
printf "argument %s\\n" "$PWD" "$@"
"""
# What a run writes: replaced, one key on a line.
STATUS = """
say() {
    [[ $SLURM_PROCID == 0 ]] || return 0
    printf '{\\n  "state": "%s",\\n  "reason": %s\\n}\\n' "$1" "$2" >"run 100%/.new"
    mv "run 100%/.new" "run 100%/status.json"
}
"""


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
    for script in LAUNCH.iterdir():
        shutil.copy(script, home / "launch")
    executable(home / ".venv" / "bin" / "minitron", PLAN + PLACE)
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
    script: str = "distill.sh",
) -> int:
    return slurm.sbatch(*sbatch, home / "launch" / script, *arguments, cwd=work, env=env)


def lines(work: Path, job: int, word: str) -> list[str]:
    """Lines that start with `word`, of the logs of all ranks, by rank."""
    logs = sorted((work / "run 100%" / "logs").glob(f"{job}-*.log"), key=lambda path: int(path.stem.split("-")[1]))
    return [line for log in logs for line in log.read_text().splitlines() if line.startswith(f"{word} ")]


def test_every_gpu_of_every_node_gets_a_process(slurm: Cluster, home: Path, work: Path) -> None:
    job = submit(slurm, home, work, "recipes/small.yaml", sbatch=("--partition=gpu",), env={"OMP_NUM_THREADS": "3"})
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    assert lines(work, job, "place") == [
        f"place g{1 + rank // 2} {rank}/4 {rank % 2} gpus=0,1 master=g1 threads=3" for rank in range(4)
    ]


def test_a_node_without_gpus_gets_the_processes_asked_for(slurm: Cluster, home: Path, work: Path) -> None:
    job = submit(slurm, home, work, "recipes/small.yaml", sbatch=("--ntasks-per-node=2",), env={"OMP_NUM_THREADS": ""})
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    # Each node claims 4 processors: 2 for each process.
    assert lines(work, job, "place") == [
        f"place n{1 + rank // 2} {rank}/4 {rank % 2} gpus= master=n1 threads=2" for rank in range(4)
    ]


def test_recipe_and_overrides_arrive_whole(slurm: Cluster, home: Path, work: Path) -> None:
    (work / "mine.yaml").write_text("name: mine\n")
    job = submit(slurm, home, work, "mine.yaml", "name=two words", "data.train=[{path: a*b}]", sbatch=("--nodes=1",))
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    expected = [str(work), "run", "mine.yaml", "name=two words", "data.train=[{path: a*b}]", "cluster.launcher=none"]
    assert lines(work, job, "argument") == [f"argument {word}" for word in expected]


@pytest.mark.parametrize("shown", commands("sbatch"), ids=str)
def test_what_the_documents_tell_sbatch_runs(slurm: Cluster, home: Path, work: Path, shown: Shown) -> None:
    """As it stands there but for the nodes, of which there are two."""
    words = ["recipes/small.yaml" if word == "RECIPE" else word for word in shown.words[1:]]
    recipe = next(word for word in words if word.startswith("recipes/"))
    shutil.copytree(home / "recipes", work / "recipes")
    (work / recipe).write_text("name: shown\n")
    at = words.index(recipe)
    options, script, rest = words[: at - 1], words[at - 1], words[at:]
    options = [re.sub(r"^--nodes=\d+$", "--nodes=2", option) for option in options]
    job = submit(slurm, home, work, *rest, sbatch=options, script=script.removeprefix("launch/"))
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    verb = {"launch/distill.sh": "run", "launch/search.sh": "search"}[script]
    assert lines(work, job, "argument")[: len(rest) + 2] == [f"argument {word}" for word in (str(work), verb, *rest)]


def test_every_rank_has_a_log_and_rank_0_is_on_the_console(slurm: Cluster, home: Path, work: Path) -> None:
    job = submit(slurm, home, work, "recipes/small.yaml", sbatch=("--ntasks-per-node=2",))
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    places = lines(work, job, "place")
    assert len(places) == 4
    assert [line for line in slurm.output(job).splitlines() if line.startswith("place ")] == places[:1]


def test_pruning_ends_before_the_distillation(slurm: Cluster, home: Path, work: Path) -> None:
    job = submit(slurm, home, work, "recipes/small.yaml", script="prune.sh")
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", slurm.output(job)
    words = [str(work), "run", "--until", "prune", f"{home}/recipes/small.yaml", "cluster.launcher=none"]
    assert lines(work, job, "argument") == [f"argument {word}" for word in words]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "usage, as a Slurm job: sbatch launch/distill.sh RECIPE"),
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
    asked = f"[[ $* == *--shell ]] && exec {home}/.venv/bin/minitron plan {work}/mine.yaml\n".replace(
        "a clone", "'a clone'"
    )
    commands = executable(work / "bin" / "srun", asked + 'printf "option %s\\n" "$@"\n').parent
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


SAVE = 'trap "say stopped \\"SIGUSR1\\"; exit 75" USR1\nwhile true; do sleep 0.1; done\n'


def test_the_time_limit_signals_every_process_and_the_job_goes_on_by_itself(
    slurm: Cluster, home: Path, work: Path
) -> None:
    program = PLAN + STATUS + '[[ $SLURM_RESTART_COUNT != 1 ]] || { echo "place again"; say done null; exit; }\n' + SAVE
    executable(home / ".venv" / "bin" / "minitron", program)
    # The lead is longer than the limit, so the signal comes as soon as the job runs.
    job = submit(slurm, home, work, "recipes/small.yaml", sbatch=("--time=4",))
    # A job that waits for it does not start before it has ended well.
    after = submit(slurm, home, work, "recipes/small.yaml", sbatch=(f"--dependency=afterok:{job}",))
    state = slurm.wait(job, 90)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), slurm.output(job)
    assert "stopped (SIGUSR1), its state is saved; requeued (1 of at most 3)" in slurm.output(job)
    waited = slurm.job(after)
    slurm.run("scancel", str(after))
    assert waited["JobState"] == "PENDING" or waited["StartTime"] >= state["EndTime"]


@pytest.mark.parametrize(
    ("status", "code", "state", "message"),
    [
        ("say failed '\"no finite loss\"'; exit 1", "1:0", "FAILED", "not requeued: no finite loss; see "),
        ("exit 75", "75:0", "FAILED", "not requeued: srun ended with 75"),  # what an earlier job left is not asked
        ("say running null; exit 9", "9:0", "FAILED", "not requeued: srun ended with 9"),
        ("say done null; exit 1", "0:0", "COMPLETED", "start 1"),
    ],
)
def test_a_job_that_failed_is_not_requeued(
    slurm: Cluster, home: Path, work: Path, status: str, code: str, state: str, message: str
) -> None:
    (work / "run 100%").mkdir()
    (work / "run 100%" / "status.json").write_text('{\n  "state": "stopped",\n  "reason": "SIGUSR1"\n}\n')
    executable(home / ".venv" / "bin" / "minitron", PLAN + STATUS + status + "\n")
    job = submit(slurm, home, work, "recipes/small.yaml")
    ended = slurm.wait(job, 60)
    assert (ended["ExitCode"], ended["JobState"], ended["Restarts"]) == (code, state, "0"), slurm.output(job)
    assert message in slurm.output(job)


def test_a_wrong_recipe_ends_the_job_with_one_line(slurm: Cluster, home: Path, work: Path) -> None:
    (work / "mine.yaml").write_text("wrong\n")
    job = submit(slurm, home, work, "mine.yaml")
    ended = slurm.wait(job, 30)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    assert slurm.output(job) == "minitron: error: mine.yaml: wrong\n"


def test_a_run_directory_that_cannot_be_made_ends_the_job_with_one_line(slurm: Cluster, home: Path, work: Path) -> None:
    (work / "run 100%").touch()
    job = submit(slurm, home, work, "recipes/small.yaml")
    ended = slurm.wait(job, 30)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    expected = f"distill.sh: error: {work}/run 100%/logs: cannot be created; choose another run_dir\n"
    assert slurm.output(job) == expected


def test_requeues_are_bounded_and_a_cancelled_job_stays_cancelled(slurm: Cluster, home: Path, work: Path) -> None:
    program = PLAN.replace("=3", "=0") + STATUS + "echo begun\n" + SAVE
    executable(home / ".venv" / "bin" / "minitron", program)
    job = submit(slurm, home, work, "recipes/small.yaml")
    slurm.wait_for_output(job, "begun", 30)
    (shown,) = {each.words for each in commands("scancel")}
    slurm.run(*(str(job) if word == "JOB" else word for word in shown))
    ended = slurm.wait(job, 60)
    assert (ended["ExitCode"], ended["Restarts"]) == ("75:0", "0"), slurm.output(job)
    assert "not requeued, cluster.max_requeues is 0; submit again to go on" in slurm.output(job)

    executable(home / ".venv" / "bin" / "minitron", PLAN + STATUS + "echo begun\n" + SAVE.replace(" USR1", " TERM"))
    job = submit(slurm, home, work, "recipes/small.yaml")
    slurm.wait_for_output(job, "begun", 30)
    slurm.run("scancel", str(job))
    slurm.wait_for_output(job, "its state is saved; the rest is left to Slurm, which has the job as ", 60)
    ended = slurm.wait(job, 60)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), slurm.output(job)


@pytest.mark.soak
def test_a_preempted_job_saves_and_goes_on_when_the_other_is_done(slurm: Cluster, home: Path, work: Path) -> None:
    again = '[[ $SLURM_RESTART_COUNT != 1 ]] || { echo "place again"; say done null; exit; }\n'
    save = SAVE.replace(" USR1", " TERM").replace("SIGUSR1", "SIGTERM")
    executable(home / ".venv" / "bin" / "minitron", PLAN + STATUS + again + "echo begun\n" + save)
    job = submit(slurm, home, work, "recipes/small.yaml")
    slurm.wait_for_output(job, "begun", 30)
    urgent = slurm.sbatch("--partition=urgent", "--nodelist=n[1-2]", "--exclusive", "--wrap=sleep 2", cwd=work)
    assert slurm.wait(urgent, 120)["JobState"] == "COMPLETED"
    state = slurm.wait(job, 300)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), slurm.output(job)
    assert "stopped (SIGTERM), its state is saved; " in slurm.output(job)


@pytest.mark.soak
def test_a_process_that_dies_takes_the_job_along(slurm: Cluster, home: Path, work: Path) -> None:
    program = PLAN + "[[ $SLURM_PROCID == 0 ]] && exec sleep 600\nkill -KILL $$\n"
    executable(home / ".venv" / "bin" / "minitron", program)
    job = submit(slurm, home, work, "recipes/small.yaml")
    assert slurm.wait(job, 120)["JobState"] == "FAILED"
