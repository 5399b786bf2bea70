"""A transform that is killed goes on where it was; what it writes is what an undisturbed one writes."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_nemo.checkpoint import blocks
from minitron_nemo.checkpoint.huggingface import HuggingFaceSink
from minitron_nemo.checkpoint.megatron_sink import MegatronSink
from minitron_nemo.checkpoint.sink import FORMATS
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.checkpoint.verify import verify
from tests.checkpoint.weights import architecture_of, random_plan
from tests.tiny import write_tiny_llama


class Killed(BaseException):
    """What no handler of the package knows."""


class Writes:
    """Counts the parts that are written; raises Killed in the midst of the first with number `stop` or more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[int] = []
        self.stop: int | None = None
        for sink in (HuggingFaceSink, MegatronSink):
            monkeypatch.setattr(sink, "write", self._watched(sink.write))

    def _watched(self, write: Any) -> Any:
        def watched(sink: Any, computed: Any, part: int) -> Any:
            self.parts.append(part)
            return write(sink, self._until_killed(computed, part), part)

        return watched

    def _until_killed(self, computed: Any, part: int) -> Iterator[Any]:
        for number, block in enumerate(computed):
            if number and self.stop is not None and part >= self.stop:
                raise Killed
            yield block


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(blocks, "PART_BYTES", 30_000)
    return Writes(monkeypatch)


def together(world_size: int, *arguments: Any, **options: Any) -> None:
    """`convert` in as many threads, each of which is a process to it; raises what the first of them raises."""
    barrier = threading.Barrier(world_size)
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            convert(*arguments, rank=rank, world_size=world_size, barrier=barrier.wait, progress=False, **options)
        except BaseException as error:
            errors.append(error)
            barrier.abort()  # as a process group does when one of its processes is gone

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def content(directory: Path) -> dict[str, bytes]:
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files if file.name != "fingerprints.json"}


@pytest.mark.parametrize(
    ("to", "before", "after"),
    [*itertools.product(("hf", "megatron"), (1, 3), (1, 2)), ("nemo", 1, 1), ("bridge", 1, 1)],
)
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
    finished = {int(file.stem) for file in (tmp_path / "student.partial" / ".parts").glob("[0-9]*.json")}
    assert {0, 1} <= finished <= set(range(4))
    writes.parts.clear()
    writes.stop = None
    together(after, source, tmp_path / "student", to, plan=plan)
    assert sorted(writes.parts) == sorted(set(parts) - finished)
    assert content(tmp_path / "student") == content(tmp_path / "undisturbed")
    assert verify(source, tmp_path / "student", progress=False) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "student", "undisturbed"]


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
