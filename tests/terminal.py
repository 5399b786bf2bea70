"""A pseudo-terminal to run something on, and what stands on a terminal's screen after some output."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

ROWS = 40
_PARTS = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


def resize(columns: int) -> None:
    """Of the terminal that standard output is."""
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))


def on_terminal(columns: int, work: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What `work` returns when standard output is a terminal so wide, and what it writes there."""
    ours, theirs = pty.openpty()
    kept, said = os.dup(1), bytearray()

    def read() -> None:
        with suppress(OSError):  # nobody has the other end any more
            while part := os.read(ours, 65536):
                said.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    os.dup2(theirs, 1)
    os.close(theirs)
    resize(columns)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    try:
        with (
            patch.dict(os.environ, {**environment, "TERM": "xterm-256color"}, clear=True),
            os.fdopen(1, "w", closefd=False) as stream,
            patch.object(sys, "stdout", stream),
        ):
            result = work(*arguments)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        reader.join()
        os.close(ours)
    return result, said.decode()


def screen(output: str, columns: int) -> list[str]:
    """The rows that a terminal shows, all that were ever scrolled away included, after `output`."""
    rows, row, column = [""], 0, 0
    for part in _PARTS.finditer(output):
        text, number, command = part[0], part[1], part[2]
        if text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
        elif command == "A":
            row = max(0, row - int(number or 1))
        elif command == "K" and number == "2":
            rows[row] = ""
        elif command is None:
            for letter in text:
                if column == columns:
                    row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
                rows[row] = rows[row][:column].ljust(column) + letter + rows[row][column + 1 :]
                column += 1
        else:
            assert command in "mhl", f"a command that this screen does not know: {text!r}"
        rows += [""] * (row + 1 - len(rows))
    return [each.rstrip() for each in rows]
