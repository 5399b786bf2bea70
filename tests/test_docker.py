"""The Dockerfiles' install steps, run where no container engine is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def instructions(name: str, word: str) -> list[str]:
    """Arguments of a Dockerfile's instructions `word`, continued lines joined."""
    text = (REPOSITORY / "docker" / name).read_text().replace("\\\n", " ")
    return [line.split(None, 1)[1] for line in text.splitlines() if line.startswith(f"{word} ")]


@pytest.mark.slow
def test_what_the_gpu_image_copies_installs_without_dependencies_and_runs(tmp_path: Path) -> None:
    context = tmp_path / "opt"
    context.mkdir()
    for sources in instructions("Dockerfile", "COPY"):
        *names, destination = sources.split()
        for name in names:
            source = REPOSITORY / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, context / destination)
    # As in the container: everything the package needs is installed already, here by this environment.
    venv.create(tmp_path / "venv", with_pip=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "container.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (run,) = instructions("Dockerfile", "RUN")
    environment = {"PATH": f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    command = run.replace("/runs", str(tmp_path / "runs"))
    done = subprocess.run(
        ["bash", "-c", command], cwd=context, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where = ["python", "-c", "import minitron_nemo; print(minitron_nemo.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(site))


def test_the_cpu_image_installs_as_the_tests_do() -> None:
    assert instructions("Dockerfile.cpu", "RUN")[-1] == "make install"
    (image,) = instructions("Dockerfile.cpu", "FROM")
    version = re.match(r"python:(\d+\.\d+)\.", image)
    assert version is not None
    assert f"python_version == '{version[1]}'" in (REPOSITORY / "constraints.txt").read_text()


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_do_not_run_as_root(name: str) -> None:
    assert instructions(name, "USER")[-1] == "1000"


def test_the_pinned_gguf_is_the_tested_one() -> None:
    pinned = re.search(r"gguf==(\S+)", instructions("Dockerfile", "RUN")[0])
    assert pinned is not None
    assert f"gguf=={pinned[1]} " in (REPOSITORY / "constraints.txt").read_text()
