"""Files and directories that are never half-written under their final name; what is wrong with one, in one line."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron_nemo.errors import Failed, UserError

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, fsync, rename over `path`, fsync the directory."""
    # Processes of one job may share a pid: they run on several nodes.
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    fsync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError for what the file system has against the body's writing of `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; give another path") from None


@contextmanager
def needing_room(directory: Path) -> Iterator[None]:
    """Raise Failed where a full disk ends the body, which writes in `directory`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or directory
        raise Failed(f"{where}: {error.strerror}; make room and start again, and it goes on") from error


@contextmanager
def reading(path: Path, mend: str = "copy it again") -> Iterator[None]:
    """Raise UserError, with how to `mend` it, for what the file system has against the body's reading of `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; {mend}") from None


def read_json(path: Path, mend: str = "copy it again") -> dict[str, Any]:
    """A JSON object from a file. Raises UserError, naming the file and how to `mend` it, for anything else."""
    try:
        with reading(path, mend):
            data = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of UTF-8
        raise UserError(f"{path}: not valid JSON: {error}; {mend}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object; {mend}")
    return data


def to_json(content: Any) -> str:
    """Text for a file. JSON has neither NaN nor infinity: what is not finite becomes null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def fsync(path: Path) -> None:
    """Bring a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_below(root: Path) -> None:
    """Bring a directory to the disk, with all that is in it."""
    for directory, _, names in os.walk(root):
        for name in names:
            fsync(Path(directory) / name)
        fsync(Path(directory))


def partial_path(path: Path) -> Path:
    """Where the next content of directory `path` is written: beside it, so that a rename brings it in place."""
    return path.with_name(path.name + ".partial")


def disk_bytes(directory: Path) -> int:
    """What the files below a directory take on the disk; nothing if it is not there."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total


def make_partial(path: Path) -> Path:
    """An empty `partial_path(path)`; what an interrupted run left there goes."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit_partial(path: Path) -> None:
    """Bring everything under `partial_path(path)` to the disk, then put it in the place of `path`.

    An existing directory is exchanged with the new one in one system call where the file system can, otherwise by two
    renames; its content is removed afterwards.
    """
    partial = partial_path(path)
    fsync_below(partial)
    if not path.exists():
        os.rename(partial, path)
        fsync(path.parent)
        return
    if not _exchange(partial, path):
        old = path.with_name(path.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        os.rename(partial, path)
        partial = old
    fsync(path.parent)
    shutil.rmtree(partial)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directory entries atomically (Linux renameat2); False where kernel or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `path` when the block ends; after an error it is removed."""
    partial = make_partial(path)
    try:
        yield partial
        commit_partial(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
