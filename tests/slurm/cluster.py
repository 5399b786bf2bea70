"""A real Slurm cluster on this machine: one controller and several nodes, each with its own network, hostname,
processes and shared memory.

Everything lives inside namespaces of one process: when it is killed, the kernel takes the rest along, bridge and
jobs included, so nothing can be left behind. Needs root and the packages that install.sh installs.

    python -m tests.slurm.cluster      a cluster and a shell on its head node; leave the shell and it is gone
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).parent
FREEZER = Path("/sys/fs/cgroup/freezer")
# Plain nodes, the third and the fourth spares, and two that claim two GPUs each. More processors than there are, so
# that whole jobs fit.
NODES = {f"n{number}": f"10.77.0.1{number}" for number in (1, 2, 3, 4)} | {"g1": "10.77.0.21", "g2": "10.77.0.22"}
DISK_MEGABYTES = 24
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "ip", "unshare", "nsenter", "setpriv")
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
UP = {"idle", "mixed", "allocated", "completing"}  # and answers: else there is a star behind it

SLURM_CONF = """\
ClusterName=minitron
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/log/slurmctld
SlurmdLogFile={directory}/log/slurmd-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
JobRequeue=1
KillWait=10
SlurmdTimeout={slurmd_timeout}
ReturnToService=2
UnkillableStepTimeout=20
MinJobAge=3600
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=cpu Nodes=n[1-2] Default=YES State=UP PriorityTier=1 GraceTime=20
PartitionName=spare Nodes=n[1-4] State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n[1-4] State=UP PriorityTier=9 PreemptMode=OFF
PartitionName=gpu Nodes=g[1-2] State=UP
"""


class Cluster:
    """Started on entering the context, gone on leaving it. `directory` holds its configuration and logs.

    A node that does not answer for `slurmd_timeout` seconds is down to Slurm, which then requeues its jobs.
    `directory`/disk is a file system of DISK_MEGABYTES that only the nodes see; `outside` gives its paths here.
    """

    directory: Path

    def __init__(self, slurmd_timeout: int = 15) -> None:
        self.slurmd_timeout = slurmd_timeout

    def __enter__(self) -> Cluster:
        missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
        if missing or os.geteuid() != 0:
            raise RuntimeError(
                f"the Slurm cluster needs root and {missing or 'nothing else'}; see tests/slurm/install.sh"
            )
        # munged wants every directory above its socket passable, which pytest's temporary directories are not.
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.directory.chmod(0o755)
        self._write_configuration()
        # The death of this process ends the cluster too, however it dies.
        unshare = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
        addresses = [f"{name}={address}" for name, address in NODES.items()]
        head = [str(self.directory), str(DISK_MEGABYTES), *addresses]
        with (self.directory / "log" / "head.out").open("w") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *unshare, "bash", HERE / "head.sh", *head],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_for_nodes(seconds=60)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop()

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a user who is logged in on the head node."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {
            **kept,
            "PATH": PATH,
            "SLURM_CONF": str(self.directory / "slurm.conf"),
            **(extra or {}),
        }

    def command(self, arguments: Sequence[str | Path], cwd: Path) -> list[str]:
        """The command line that runs `arguments` on the head node, in the directory `cwd`."""
        namespaces = f"/proc/{self._process.pid}/ns"
        enter = [f"--{kind}={namespaces}/{kind}" for kind in ("net", "uts", "ipc")]
        enter += [f"--mount={namespaces}/mnt", f"--pid={namespaces}/pid_for_children"]
        return ["nsenter", *enter, "env", f"--chdir={cwd}", *map(str, arguments)]

    def run(
        self,
        *arguments: str | Path,
        cwd: Path = Path("/"),
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> str:
        """Run a command on the head node and return what it printed; AssertionError with all of it when it fails."""
        done = subprocess.run(
            self.command(arguments, cwd),
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise AssertionError(f"{arguments[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def sbatch(self, *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> int:
        """Submit a batch job from `cwd` and return its id."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env))

    def job(self, job: int) -> dict[str, str]:
        """What the controller says of a job, finished or not: JobState, ExitCode, Restarts, ..."""
        line = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait(self, job: int, seconds: float) -> dict[str, str]:
        """Wait until a job has ended, however it did; cancel it and raise AssertionError when that takes longer."""
        deadline = time.monotonic() + seconds
        while (state := self.job(job))["JobState"] not in FINISHED:
            if time.monotonic() > deadline:
                self.run("scancel", str(job))
                raise AssertionError(f"job {job} is {state['JobState']} after {seconds:.0f} s:\n{self.output(job)}")
            time.sleep(0.5)
        return state

    def crash(self, node: str) -> None:
        """Kill a node with all its processes, as a power cut does; it stays down until `restart`."""
        (self.directory / f"{node}.down").touch()
        self.run("kill", "-KILL", str(self._first_process(node)))

    def restart(self, node: str) -> None:
        """Start a crashed node again, and wait until Slurm sees it."""
        (self.directory / f"{node}.down").unlink()
        self._wait_for_node(node)

    def cut(self, node: str) -> None:
        """Pull a node's network cable: its processes and its disks work on, nobody reaches it until `heal`."""
        self.run("ip", "link", "set", f"to-{node}", "down")

    def heal(self, node: str) -> None:
        """Put the cable back, and wait until Slurm has the node again."""
        self.run("ip", "link", "set", f"to-{node}", "up")
        self._wait_for_node(node)

    def processes(self, node: str, pattern: str) -> list[str]:
        """Command lines of a node's processes that begin with `pattern`."""
        namespaces = f"/proc/{self._first_process(node)}/ns"
        enter = ("nsenter", f"--mount={namespaces}/mnt", f"--pid={namespaces}/pid_for_children")
        return [line for line in self.run(*enter, "ps", "-eo", "args=").splitlines() if re.match(pattern, line)]

    def outside(self, path: Path) -> Path:
        """Where this process finds a path of the nodes."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def output(self, job: int) -> str:
        """What a batch job printed so far."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait_for_output(self, job: int, text: str, seconds: float) -> None:
        """Wait until a job has printed `text`; AssertionError when that takes longer."""
        deadline = time.monotonic() + seconds
        while text not in (output := self.output(job)):
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} did not print {text!r}:\n{output}")
            time.sleep(0.2)

    def _write_configuration(self) -> None:
        for name in ("disk", "log", "munge", "spool", "state"):
            (self.directory / name).mkdir(mode=0o755)
        key = self.directory / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        (self.directory / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        hosts = {"localhost": "127.0.0.1", "head": "10.77.0.1", **NODES}
        (self.directory / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        if FREEZER.is_dir():  # with control groups a job's processes cannot escape its end by leaving its session
            cgroup = FREEZER / self.directory.name
            cgroup.mkdir()
            (self.directory / "cgroup").symlink_to(cgroup)
        nodes = [
            f"NodeName={name} NodeHostname={name} NodeAddr={address} Port=6818 CPUs=4 RealMemory=4000 State=UNKNOWN"
            + (" Gres=gpu:2" if name.startswith("g") else "")
            for name, address in NODES.items()
        ]
        proctrack = "cgroup" if FREEZER.is_dir() else "linuxproc"
        (self.directory / "slurm.conf").write_text(
            SLURM_CONF.format(
                directory=self.directory,
                nodes="\n".join(nodes),
                proctrack=proctrack,
                slurmd_timeout=self.slurmd_timeout,
            )
        )
        (self.directory / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        for index in range(2):  # Slurm wants a character device, and follows links
            (self.directory / f"gpu{index}").symlink_to("/dev/null")
        (self.directory / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=g[1-2] Name=gpu File={self.directory}/gpu[0-1]\n"
        )

    def _first_process(self, node: str) -> int:
        return int((self.directory / f"{node}.pid").read_text())

    def _wait_for_node(self, node: str) -> None:
        deadline = time.monotonic() + 120
        while (state := self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T").split()[0]) not in UP:
            if time.monotonic() > deadline:
                raise AssertionError(f"{node} is {state}")
            time.sleep(0.2)

    def _wait_for_nodes(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                # A line for every partition that a node is in.
                states = set(self.run("sinfo", "--noheader", "--Node", "--format=%N=%T").split())
            except AssertionError as error:
                states = {str(error)}
            if states == {f"{name}=idle" for name in NODES}:
                return
            if time.monotonic() > deadline or self._process.poll() is not None:
                logs = "\n".join(
                    f"== {path.name}\n{path.read_text()[-2000:]}" for path in (self.directory / "log").iterdir()
                )
                raise AssertionError(f"the Slurm cluster did not come up: {states}\n{logs}")
            time.sleep(0.2)

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if (self.directory / "cgroup").is_symlink():
            self._remove_cgroup((self.directory / "cgroup").resolve())
        shutil.rmtree(self.directory)

    def _remove_cgroup(self, cgroup: Path) -> None:
        # The kernel ends the namespaces' processes one by one; a control group can go when its last one has.
        deadline = time.monotonic() + 30
        for path, _, _ in os.walk(cgroup, topdown=False):
            while True:
                try:
                    os.rmdir(path)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)


if __name__ == "__main__":
    with Cluster() as cluster:
        shell = cluster.command([os.environ.get("SHELL", "bash")], Path.cwd())
        subprocess.run(shell, env=cluster.environment({"PS1": "head$ "}), check=False)
