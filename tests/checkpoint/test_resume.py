"""A transform that is killed goes on where it was; what it writes is what an undisturbed one writes."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_nemo.checkpoint import blocks
from minitron_nemo.checkpoint.huggingface import HuggingFaceSink
from minitron_nemo.checkpoint.journal import Journal
from minitron_nemo.checkpoint.megatron_sink import MegatronSink
from minitron_nemo.checkpoint.sink import FORMATS
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.checkpoint.verify import verify
from minitron_nemo.errors import SaidByRankZero, UserError
from tests.checkpoint.threads import in_threads
from tests.checkpoint.weights import architecture_of, random_plan
from tests.tiny import write_tiny_llama


class Killed(BaseException):
    """What no handler of the package knows."""


class Writes:
    """Counts the parts that are written; raises `failure` in the midst of those with number `stop` or more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[int] = []
        self.stop: int | None = None
        self.failure: BaseException = Killed()
        for sink in (HuggingFaceSink, MegatronSink):
            monkeypatch.setattr(sink, "write", self._watched(sink.write))

    def _watched(self, write: Any) -> Any:
        def watched(sink: Any, computed: Any, part: int) -> Any:
            self.parts.append(part)
            return write(sink, self._until_stopped(computed, part), part)

        return watched

    def _until_stopped(self, computed: Any, part: int) -> Iterator[Any]:
        for number, block in enumerate(computed):
            if number and self.stop is not None and part >= self.stop:
                raise self.failure
            yield block


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(blocks, "PART_BYTES", 30_000)
    return Writes(monkeypatch)


def together(world_size: int, *arguments: Any, **options: Any) -> None:
    """`convert` in as many threads, each of which is a process to it; raises Killed if one of them does."""
    raised = [error for error in outcomes(world_size, *arguments, **options) if error is not None]
    if raised:
        raise next((error for error in raised if isinstance(error, Killed)), raised[0])


def outcomes(world_size: int, *arguments: Any, **options: Any) -> list[BaseException | None]:
    """What `convert` raises in each of as many threads."""
    options |= {"world_size": world_size, "progress": False}
    return in_threads(world_size, lambda rank, gather: convert(*arguments, rank=rank, gather=gather, **options))


def finished_parts(partial: Path) -> set[int]:
    return {int(file.stem) for file in (partial / ".parts").glob("[0-9]*.json")}


def content(directory: Path) -> dict[str, bytes]:
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files if file.name != "fingerprints.json"}


@pytest.mark.parametrize(
    ("to", "before", "after"),
    [*itertools.product(("hf", "megatron"), (1, 3), (1, 2)), ("nemo", 1, 1), ("bridge", 1, 1)],
)
@pytest.mark.fast_cases(4)
def test_what_was_finished_is_not_done_again_by_any_number_of_processes(
    tmp_path: Path, writes: Writes, to: str, before: int, after: int
) -> None:
    source = write_tiny_llama(tmp_path / "source")
    plan = random_plan(architecture_of(source))
    convert(source, tmp_path / "undisturbed", to, plan=plan, progress=False)
    parts = sorted(writes.parts)
    assert parts == list(range(len(parts))) and len(parts) > 6
    writes.parts.clear()
    writes.stop = 4
    with pytest.raises(Killed):
        together(before, source, tmp_path / "student", to, plan=plan)
    assert not (tmp_path / "student").exists()
    finished = finished_parts(tmp_path / "student.partial")
    assert {0, 1} <= finished <= set(range(4))
    writes.parts.clear()
    writes.stop = None
    together(after, source, tmp_path / "student", to, plan=plan)
    assert sorted(writes.parts) == sorted(set(parts) - finished)
    assert content(tmp_path / "student") == content(tmp_path / "undisturbed")
    assert verify(source, tmp_path / "student", progress=False) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "student", "undisturbed"]


@pytest.mark.parametrize("to", ["hf", "megatron"])
@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OSError(5, "Input/output error"), "{}: not written: Input/output error; what was there is untouched; "),
        (UserError("source: truncated: 7 bytes are missing"), "source: truncated: 7 bytes are missing"),
    ],
)
@pytest.mark.fast_cases(2)
def test_what_one_process_cannot_do_ends_the_job_in_one_line_and_costs_no_finished_part(
    tmp_path: Path, writes: Writes, to: str, failure: Exception, said: str
) -> None:
    source, student = write_tiny_llama(tmp_path / "source"), tmp_path / "student"
    convert(source, tmp_path / "undisturbed", to, progress=False)
    parts = set(writes.parts)
    convert(source, student, to, plan=random_plan(architecture_of(source)), progress=False)
    before = content(student)
    writes.stop, writes.failure = max(parts), failure
    of_last = max(parts) % 3
    for attempt in range(2):
        writes.parts.clear()
        raised = outcomes(3, source, student, to)
        assert [type(error) for error in raised] == [UserError, SaidByRankZero, SaidByRankZero]
        (text,) = {str(error) for error in raised}
        assert text.startswith((f"rank {of_last}: " if of_last else "") + said.format(student))
        assert set(writes.parts) == ({max(parts)} if attempt else parts)
        assert finished_parts(tmp_path / "student.partial") == parts - {max(parts)}
        assert content(student) == before
    writes.parts.clear()
    writes.stop = None
    together(2, source, student, to)
    assert writes.parts == [max(parts)]
    assert content(student) == content(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "student", "undisturbed"]


def test_where_no_part_was_finished_nothing_stays(tmp_path: Path, writes: Writes) -> None:
    source = write_tiny_llama(tmp_path / "source")
    writes.stop, writes.failure = 0, OSError(28, "No space left on device")
    raised = outcomes(2, source, tmp_path / "student", "megatron")
    assert str(raised[1]).startswith(f"{tmp_path}/student: not written: No space left on device; ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("step", ["record_fingerprints", "fsync_below"])
def test_a_failure_at_the_very_end_costs_no_part(
    tmp_path: Path, writes: Writes, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source = write_tiny_llama(tmp_path / "source")

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"minitron_nemo.checkpoint.transform.{step}", refuse)
        raised = outcomes(3, source, tmp_path / "student", "megatron")
    assert [type(error) for error in raised] == [UserError, SaidByRankZero, SaidByRankZero]
    assert finished_parts(tmp_path / "student.partial") == set(writes.parts)
    writes.parts.clear()
    together(3, source, tmp_path / "student", "megatron")
    assert not writes.parts
    assert verify(source, tmp_path / "student", progress=False) is None


def test_a_record_that_another_node_has_written_need_not_be_seen(
    tmp_path: Path, writes: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may answer for half a minute what it answered before the file was there."""
    source = write_tiny_llama(tmp_path / "source")
    monkeypatch.setattr(Journal, "finished", lambda self, part: None)
    together(3, source, tmp_path / "student", "megatron")
    assert verify(source, tmp_path / "student", progress=False) is None


@pytest.mark.parametrize("change", ["source", "plan", "dtype", "format"])
def test_what_was_finished_of_something_else_is_done_again(tmp_path: Path, writes: Writes, change: str) -> None:
    source = write_tiny_llama(tmp_path / "source")
    plan, to, dtype = random_plan(architecture_of(source)), "megatron", torch.float32
    writes.stop = 4
    with pytest.raises(Killed):
        convert(source, tmp_path / "student", to, plan=plan, dtype=dtype, progress=False)
    writes.parts.clear()
    writes.stop = None
    if change == "source":
        write_tiny_llama(source, seed=1)
    plan = random_plan(plan.source, seed=1) if change == "plan" else plan
    dtype = torch.bfloat16 if change == "dtype" else dtype
    to = "nemo" if change == "format" else to
    convert(source, tmp_path / "student", to, plan=plan, dtype=dtype, progress=False)
    assert sorted(writes.parts) == list(range(len(writes.parts)))
    assert verify(source, tmp_path / "student", plan, progress=False) is None


@pytest.mark.slow
def test_what_was_half_put_in_place_is_put_in_place(
    tmp_path: Path, writes: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is written, and the process ends before the directory has its name."""
    source = write_tiny_llama(tmp_path / "source")
    for to in FORMATS:

        def killed(*_: Any) -> None:
            raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr("minitron_nemo.checkpoint.journal.Journal.end", killed)
            convert(source, tmp_path / to, to, progress=False)
        writes.parts.clear()
        convert(source, tmp_path / to, to, progress=False)
        assert not writes.parts
        assert verify(source, tmp_path / to, progress=False) is None
        convert(source, tmp_path / f"{to}-undisturbed", to, progress=False)
        assert content(tmp_path / to) == content(tmp_path / f"{to}-undisturbed")


_KILLED = """
import os, signal, sys
from pathlib import Path
from minitron_nemo.checkpoint import blocks
from minitron_nemo.checkpoint.journal import Journal
from minitron_nemo.checkpoint.transform import convert
blocks.BLOCK_BYTES, blocks.PART_BYTES = 3000, 30_000
record = Journal.record
def counted(self, part, finished):
    record(self, part, finished)
    if part == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.record = counted
convert(Path(sys.argv[1]), Path(sys.argv[2]), "megatron", progress=False)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_next_one_goes_on_with(tmp_path: Path, writes: Writes) -> None:
    source = write_tiny_llama(tmp_path / "source")
    killed = subprocess.run([sys.executable, "-c", _KILLED, source, tmp_path / "student"], check=False)
    assert killed.returncode == -signal.SIGKILL
    convert(source, tmp_path / "student", "megatron", progress=False)
    assert min(writes.parts) == 6
    assert verify(source, tmp_path / "student", progress=False) is None


def test_room_that_the_interrupted_attempt_takes_is_room(
    tmp_path: Path, writes: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_llama(tmp_path / "source")
    writes.stop = 9
    with pytest.raises(Killed):
        convert(source, tmp_path / "student", "megatron", progress=False)
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)  # the whole is 650 kB
    monkeypatch.setattr("minitron_nemo.checkpoint.sink.shutil.disk_usage", lambda _: usage)
    writes.stop = None
    convert(source, tmp_path / "student", "megatron", progress=False)
    assert min(writes.parts) == 0
