"""Checkpoints of any format, where a model is built from: a Megatron one with its Architecture in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minitron_nemo.arch.architecture import FILE_NAME as ARCHITECTURE_FILE
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.parallel import launch


@contextmanager
def buildable(checkpoints: Sequence[Path], workspace: Path) -> Iterator[dict[str, Path]]:
    """The directory that each is built from, by its name. Collective.

    What is of another format is converted into a temporary directory in `workspace`, which all ranks see and which
    needs the size of the models. Raises UserError for what is no checkpoint.
    """
    found = {str(path): path for path in checkpoints if (path / ARCHITECTURE_FILE).is_file()}
    others = [path for path in checkpoints if str(path) not in found]
    if not others:
        yield found
        return

    def make() -> Path:
        workspace.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".converted-", dir=workspace))

    directory = launch.from_rank_0(make)
    try:
        for number, path in enumerate(others):
            found[str(path)] = directory / str(number)
            convert(
                path,
                found[str(path)],
                "megatron",
                rank=launch.rank(),
                world_size=launch.world_size(),
                gather=launch.gather,
            )
        yield {str(path): found[str(path)] for path in checkpoints}  # in the order that was asked for
        launch.barrier()
    finally:
        if launch.rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)
