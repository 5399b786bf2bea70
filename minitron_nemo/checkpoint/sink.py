"""`Sink`: the one view of a checkpoint that is written; `open_sink` makes one for a format."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.bridge import bridge_model
from minitron_nemo.arch.nemo import nemo_config
from minitron_nemo.arch.tensors import NamedTensor, tensors
from minitron_nemo.checkpoint.blocks import Chunk
from minitron_nemo.checkpoint.files import disk_bytes, partial_path
from minitron_nemo.checkpoint.iterations import iteration_name
from minitron_nemo.checkpoint.nemo_context import FILE_NAME as IO_FILE
from minitron_nemo.checkpoint.safe_pickle import METADATA_FILE
from minitron_nemo.checkpoint.source import Source
from minitron_nemo.errors import UserError

FORMATS = ("hf", "megatron", "nemo", "bridge")


class Sink(Protocol):
    """A checkpoint being written to `partial_path(path)` by any number of processes; `transform` drives it.

    `dtypes` gives the data type of every canonical tensor of `architecture`.
    """

    path: Path
    architecture: Architecture
    dtypes: Mapping[str, torch.dtype]

    def prepare(self) -> None:
        """Lay the files out in the empty partial directory; one process, before any writes."""

    def write(self, blocks: Iterable[tuple[Chunk, torch.Tensor]], part: int) -> tuple[list[str], list[Any]]:
        """Write the chunks of a part with their rows, as they come; from the start if an earlier attempt left some.

        Returns the names, in the partial directory, of the files that they are in, for the caller to bring to the disk,
        and what `finish` needs to know of the part: values that JSON has.
        """

    def finish(self, source: Source, places: list[Any]) -> None:
        """Write what is not weights, over what an earlier attempt left; `places` are those of all parts in order."""


def open_sink(path: Path, to: str, architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> Sink:
    """A Sink for format `to` (one of FORMATS) that will take the place of directory `path`.

    Nothing is looked for on the disk. Raises UserError for another format.
    """
    from minitron_nemo.checkpoint.bridge import BridgeSink
    from minitron_nemo.checkpoint.huggingface import HuggingFaceSink
    from minitron_nemo.checkpoint.megatron_sink import MegatronSink
    from minitron_nemo.checkpoint.nemo import NemoSink

    if to not in FORMATS:
        raise UserError(f"format {to!r} is not known; choose one of {', '.join(FORMATS)}")
    sinks: tuple[Callable[..., Sink], ...] = (HuggingFaceSink, MegatronSink, NemoSink, BridgeSink)
    return dict(zip(FORMATS, sinks, strict=True))[to](Path(path).absolute(), architecture, dtypes)


def check_formats(formats: Sequence[str], architecture: Architecture) -> None:
    """Raise UserError, naming `export.formats`, for a format that an architecture cannot be written in."""
    for to, configured in (("nemo", nemo_config), ("bridge", bridge_model)):  # the others have every architecture
        if to in formats:
            try:
                configured(architecture, "bfloat16")
            except UserError as error:
                raise UserError(f"export.formats: {to}: {error}") from None


def check_destination(sink: Sink, source: Path) -> None:
    """Raise UserError where a checkpoint must not be written, or cannot.

    That is when its path is the source's or holds something that is not a checkpoint, and when the disk has no room for
    it beside what is there.
    """
    path = sink.path
    if path.exists() and path.samefile(source):
        raise UserError(f"{path}: is the source itself; give another destination")
    if path.exists() and not _is_checkpoint_or_empty(path):
        raise UserError(f"{path}: exists and is not a checkpoint; it would be replaced: give another destination")
    _check_room(
        path, sum(tensor_bytes(tensor, sink.architecture, sink.dtypes) for tensor in tensors(sink.architecture))
    )


def tensor_bytes(tensor: NamedTensor, architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> int:
    """Size of one canonical tensor as it will be written."""
    return prod(tensor.spec.shape(architecture)) * dtypes[tensor.name].itemsize


def main_dtype(architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> str:
    """The data type that most of the weights have, as torch spells it."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors(architecture):
        dtype = dtypes[tensor.name]
        counts[dtype] = counts.get(dtype, 0) + prod(tensor.spec.shape(architecture))
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")


def _is_checkpoint_or_empty(path: Path) -> bool:
    """Whether a directory may be replaced: a training's directory of several iterations may not."""
    if not path.is_dir():
        return False
    iterations = [entry.name for entry in path.glob("iter_*")]
    marks = (METADATA_FILE, "config.json", f"context/{IO_FILE}", f"{iteration_name(0)}/{METADATA_FILE}")
    is_checkpoint = any((path / mark).exists() for mark in marks) and iterations in ([], [iteration_name(0)])
    return is_checkpoint or not any(path.iterdir())


def _check_room(path: Path, needed: int) -> None:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    # What an interrupted attempt has written is gone on with, or goes.
    free = shutil.disk_usage(parent).free + disk_bytes(partial_path(path))
    if free < needed:
        raise UserError(f"{path}: {needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free on its disk; make room")
