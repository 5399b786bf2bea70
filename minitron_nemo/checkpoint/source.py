"""`Source`: the one view of a checkpoint that is read, whatever its format; `open_source` finds the format out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.checkpoint.safe_pickle import METADATA_FILE
from minitron_nemo.errors import UserError


class Source(Protocol):
    """A checkpoint on disk, read by rows of canonical per-layer tensors (`arch.tensors`)."""

    path: Path
    format: str  # "huggingface" | "megatron" | "nemo" | "bridge" | "legacy" | "gguf"
    architecture: Architecture

    def dtype(self, name: str) -> torch.dtype:
        """Stored data type of a canonical tensor; float32 where it is stored quantised."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a canonical tensor, `dtype(name)`, contiguous, on the CPU, in memory of its own."""

    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""

    def layout(self) -> str:
        """How the tensors are cut on disk, and where that shows it, the parallel layout that wrote them."""

    def tokenizer_size(self) -> int | None:
        """Highest token id of the tokenizer + 1; None where there is no tokenizer that tells."""

    def copy_tokenizer(self, directory: Path) -> None:
        """Put the Hugging Face tokenizer files and generation_config.json into a directory."""


def open_source(path: Path) -> Source:
    """Open a checkpoint of any known format and check it whole, without reading weights.

    Raises UserError for an unknown format, a truncated file, a missing, unknown or wrongly shaped tensor, and a
    tokenizer with more entries than the vocabulary.
    """
    source = _open(Path(path))
    size = source.tokenizer_size()
    if size is not None and size > source.architecture.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {size} entries, vocab_size is {source.architecture.vocab_size}: "
            f"wrong tokenizer size; use the tokenizer the model was trained with"
        )
    return source


def _open(path: Path) -> Source:
    from minitron_nemo.checkpoint.gguf import GGUFSource

    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: not a checkpoint; give a directory or a .gguf file")
        return GGUFSource(path)
    if (reader := directory_reader(path)) is not None:
        return reader(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GGUFSource(ggufs[0])
    raise UserError(
        f"{path}: not a checkpoint; expected config.json (Hugging Face), .metadata (Megatron torch_dist), context/ "
        "(NeMo 2), iter_*/run_config.yaml (Megatron-Bridge), mp_rank_*/ (legacy Megatron-LM) or one .gguf"
    )


def directory_reader(path: Path) -> Callable[[Path], Source] | None:
    """What reads the format of a directory; None where it has the marks of none."""
    from minitron_nemo.checkpoint.bridge import BridgeSource, bridge_directory
    from minitron_nemo.checkpoint.huggingface import HuggingFaceSource
    from minitron_nemo.checkpoint.legacy import LegacySource, legacy_directory
    from minitron_nemo.checkpoint.megatron import MegatronSource
    from minitron_nemo.checkpoint.nemo import NemoSource, is_nemo

    if is_nemo(path):
        return NemoSource
    if bridge_directory(path) is not None:
        return BridgeSource
    if (path / METADATA_FILE).exists():
        return MegatronSource
    if (path / "config.json").exists():
        return HuggingFaceSource
    return LegacySource if legacy_directory(path) is not None else None


def file_state(root: Path, files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and modification time in nanoseconds of weight files, by their names below `root`."""
    return {os.path.relpath(file, root): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def check_tensors(
    path: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], extra: set[str]
) -> None:
    """Raise UserError for the first tensor that is missing, of another shape, or not known to the architecture.

    `found` and `wanted` map stored names to shapes; `extra` are found names that the family has no tensor for.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{path}: tensor {name} is missing")
        if found[name] != shape:
            raise UserError(f"{path}: tensor {name} has shape {list(found[name])}, the architecture says {list(shape)}")
    if extra:
        raise UserError(f"{path}: tensor {min(extra)} is not part of this architecture; converting would lose it")


def shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every canonical tensor."""
    return {tensor.name: tensor.spec.shape(architecture) for tensor in tensors(architecture)}
