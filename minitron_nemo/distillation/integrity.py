"""Whether a checkpoint's files are what was written: sizes and checksums, kept beside them.

    checksums.json   {"schema_version": 1, "files": {"__0_0.distcp": {"size": 8123, "crc32": 1234567890}, ...}}

It is written last, before the directory gets its final name. Damage is what a disk or a copy does (truncated, missing,
changed); a CRC finds it at the speed of reading. It is no protection against people.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_nemo.checkpoint.files import write_atomic

FILE_NAME = "checksums.json"
SCHEMA_VERSION = 1
BLOCK = 16 * 2**20

# File name -> size and CRC.
Checksums = dict[str, dict[str, int]]


def checksum(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of a file. Raises OSError."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return {"size": size, "crc32": crc}


def write_checksums(directory: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """Record what the files of `directory` are."""
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "files": dict(files)}
    write_atomic(directory / FILE_NAME, json.dumps(content, indent=1) + "\n")


def find_damage(directory: Path, part: int, parts: int) -> str | None:
    """The first damage in this part of the files: which file and what is wrong; None if they are as written.

    Files are shared out over `parts` readers; each checks that all of them are there with the right size, too.
    """
    record = directory / FILE_NAME
    try:
        files: Checksums = json.loads(record.read_text())["files"]
        expected = [(directory / name, files[name]["size"], files[name]["crc32"]) for name in sorted(files)]
    except FileNotFoundError:
        return f"{directory}: {'has no ' + FILE_NAME if directory.is_dir() else 'is missing'}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{record}: not readable: {type(error).__name__}: {error}"
    try:
        for path, size, _ in expected:
            if (found := path.stat().st_size) != size:
                return f"{path}: {found} bytes, {size} were written"
        for path, _, crc in expected[part::parts]:
            if checksum(path)["crc32"] != crc:
                return f"{path}: its bytes are not those that were written (CRC-32)"
    except FileNotFoundError as error:
        return f"{error.filename}: is missing"
    except OSError as error:
        return f"{error.filename or directory}: not readable: {error}"
    return None
