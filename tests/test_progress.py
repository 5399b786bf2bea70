"""The one manner of progress: lines in a log that come now and then, a bar with an ETA on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from minitron_nemo.progress import LINE_SECONDS, Progress, track


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def log() -> tuple[io.StringIO, Console]:
    stream = io.StringIO()
    return stream, Console(file=stream, soft_wrap=True, highlight=False)


def test_a_log_gets_a_line_now_and_then_with_the_time_that_is_left() -> None:
    now, (stream, console) = Clock(), log()
    with Progress("calibrate", 1200, "microbatches", console=console, now=now) as bar:
        bar.skip(200)
        for _ in range(1000):
            now.seconds += 0.125
            bar.advance()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "[calibrate] 440/1,200 microbatches, 0:00:30 so far, ETA 0:01:35",  # 240 took 30 s, 760 are left
        "[calibrate] 680/1,200 microbatches, 0:01:00 so far, ETA 0:01:05",
        "[calibrate] 920/1,200 microbatches, 0:01:30 so far, ETA 0:00:35",
        "[calibrate] 1,160/1,200 microbatches, 0:02:00 so far, ETA 0:00:05",
        "[calibrate] 1,200/1,200 microbatches in 0:02:05",
    ]


def test_short_work_is_one_line_and_an_error_is_none() -> None:
    stream, console = log()
    with Progress("write teacher", 1_500_000, "bytes", console=console) as bar:
        bar.advance(1_000_000)  # what is left counts at the end
    assert stream.getvalue() == "[write teacher] 1.5 MB/1.5 MB in 0:00:00\n"
    stream, console = log()
    with pytest.raises(RuntimeError), Progress("write teacher", 10, "parts", console=console):
        raise RuntimeError
    assert stream.getvalue() == ""


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("abc", "evaluate", "models", shown=False)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
    assert list(track("abc", "evaluate", "models")) == ["a", "b", "c"]
    assert capsys.readouterr().out == "[evaluate] 3/3 models in 0:00:00\n"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_has_a_bar_of_one_row_with_the_time_that_is_left(width: int) -> None:
    stream, now = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=width, height=24)
    with Progress("score-depth, 120 models", 1200, "microbatches", console=console, now=now) as bar:
        now.seconds = LINE_SECONDS * 2
        bar.advance(400)
        bar._bar.refresh()
        during = rows(stream)
        bar.advance(800)
    after = rows(stream)
    assert all(len(row) <= width for row in after)
    assert "[score-depth" not in stream.getvalue()
    if width >= 80:
        assert during[-1].endswith("400/1,200 microbatches  ETA 0:02:00")
        assert after[-1].endswith("1,200/1,200 microbatches in 0:01:00")
        assert during[-1].startswith("score-depth, 120 models ━")


def rows(stream: io.StringIO) -> list[str]:
    """All rows that were drawn, over each other or not, without colours and movements of the cursor."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    return [row.rstrip() for row in re.split(r"[\r\n]+", plain) if row.strip()]
