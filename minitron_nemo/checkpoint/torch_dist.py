"""The torch_dist format, read by rows: which chunks a key has, where their bytes are, and how to get some of them.

A chunk is a torch.save blob inside a `.distcp` file: an uncompressed zip whose `data/0` holds the tensor's bytes. The
zip's directory says where they start, so rows are read without the rest of the chunk.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path

import torch

from minitron_nemo.checkpoint.safe_pickle import MALFORMED, Record, TensorUnpickler
from minitron_nemo.checkpoint.tensor_io import read_tensor
from minitron_nemo.checkpoint.torch_zip import STORAGES, Window, check_byte_order, content, entries_of, rows_offset
from minitron_nemo.errors import UserError


@dataclass(frozen=True)
class StoredChunk:
    """Part of a global tensor: entries from `origin`, `sizes` of them along each dim, in a blob of a file."""

    path: Path
    offset: int
    length: int
    origin: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredKey:
    """A global tensor of the checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]

    @cached_property
    def _by_place(self) -> dict[int, dict[tuple[int, ...], list[StoredChunk]]]:
        """Chunks per entry of the first dims, for each number of those that was asked for so far."""
        return {}

    def of_place(self, place: tuple[int, ...]) -> list[StoredChunk]:
        """Chunks that hold some of a tensor of the stack, at `place` in its first dims; all for ()."""
        depth = len(place)
        if depth not in self._by_place:
            found: dict[tuple[int, ...], list[StoredChunk]] = {}
            for chunk in self.chunks:
                spans = zip(chunk.origin[:depth], chunk.sizes[:depth], strict=True)
                for entry in product(*(range(first, first + size) for first, size in spans)):
                    found.setdefault(entry, []).append(chunk)
            self._by_place[depth] = found
        return self._by_place[depth][place]

    @cached_property
    def _payloads(self) -> dict[StoredChunk, int]:
        """Where the bytes of the chunks read so far start."""
        return {}

    def check_complete(self, directory: Path, key: str, file_sizes: Mapping[Path, int]) -> None:
        """Raise UserError when chunks are missing or reach beyond the end of their files."""
        stored = sum(prod(chunk.sizes) for chunk in self.chunks)
        if stored != prod(self.shape):
            raise UserError(
                f"{directory}: tensor {key} is incomplete: {stored} of {prod(self.shape)} entries are stored"
            )
        for chunk in self.chunks:
            if chunk.path not in file_sizes:
                raise UserError(f"{chunk.path}: not found, but .metadata names it; copy it again")
            size = file_sizes[chunk.path]
            if chunk.offset + chunk.length > size:
                raise UserError(f"{chunk.path}: truncated: {key} ends at {chunk.offset + chunk.length} of {size} bytes")

    def read_into(self, out: torch.Tensor, place: tuple[int, ...], start: int) -> None:
        """Fill `out` ([rows, columns] or [rows]) with rows from `start` of the tensor at `place` of the stack."""
        depth = len(place)
        stop = start + out.shape[0]
        for chunk in self.of_place(place):
            origin, sizes = chunk.origin[depth:], chunk.sizes[depth:]
            first, last = max(start, origin[0]), min(stop, origin[0] + sizes[0])
            if first >= last:
                continue
            row_bytes = prod(sizes[1:]) * self.dtype.itemsize
            before = 0  # tensors of the stack that the chunk has before this one
            for index, begin, size in zip(place, chunk.origin[:depth], chunk.sizes[:depth], strict=True):
                before = before * size + index - begin
            skipped = first - origin[0] + before * sizes[0]
            if chunk not in self._payloads:
                self._payloads[chunk] = payload_offset(chunk, self.dtype)
            offset = self._payloads[chunk] + skipped * row_bytes
            target = out[first - start : last - start]
            if sizes[1:] == target.shape[1:]:
                read_tensor(chunk.path, offset, target)
            else:  # the columns are cut: a tensor-parallel rank's share
                part = torch.empty((last - first, sizes[1]), dtype=self.dtype)
                read_tensor(chunk.path, offset, part)
                target[:, origin[1] : origin[1] + sizes[1]] = part


def stored_keys(directory: Path, metadata: Record) -> dict[str, StoredKey]:
    """Every tensor of a checkpoint's `.metadata`. Raises UserError where it is inconsistent."""
    try:
        places = {
            (index.fqn, index.offset): place
            for index, place in metadata.storage_data.items()  # type: ignore[attr-defined]
            if index.offset is not None
        }
        return {
            key: StoredKey(
                entry.properties.state[0],
                tuple(entry.size),
                tuple(_chunk(directory, key, chunk, places) for chunk in entry.chunks),
            )
            for key, entry in metadata.state_dict_metadata.items()  # type: ignore[attr-defined]
            if type(entry).__name__ == "TensorStorageMetadata"
        }
    except MALFORMED as error:
        raise UserError(f"{directory}/.metadata: inconsistent: {type(error).__name__}: {error}") from None


def _chunk(directory: Path, key: str, chunk: Record, places: dict) -> StoredChunk:
    origin, sizes = tuple(chunk.offsets), tuple(chunk.sizes)  # type: ignore[attr-defined]
    place = places[key, origin]
    if vars(place).get("transform_descriptors"):
        raise UserError(f"{directory}: {key} is stored through {place.transform_descriptors}; only plain is supported")
    return StoredChunk(directory / place.relative_path, place.offset, place.length, origin, sizes)


def payload_offset(chunk: StoredChunk, dtype: torch.dtype) -> int:
    """Where in its file a chunk's first byte is.

    Raises UserError unless the chunk is one contiguous little-endian tensor of its declared shape and `dtype`, stored
    uncompressed.
    """
    try:
        with open(chunk.path, "rb", buffering=0) as file:
            window = Window(file.fileno(), chunk.offset, chunk.length)
            with zipfile.ZipFile(window) as blob:
                return chunk.offset + _payload_in_blob(blob, window, chunk, dtype)
    except (*MALFORMED, zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{chunk.path}: refused: the blob at offset {chunk.offset}: {error}") from None


def _payload_in_blob(blob: zipfile.ZipFile, window: Window, chunk: StoredChunk, dtype: torch.dtype) -> int:
    entries = entries_of(blob)
    storage, first, shape, stride = TensorUnpickler(io.BytesIO(content(window, entries["data.pkl"]))).load()
    if storage[0] != STORAGES[dtype] or shape != chunk.sizes:
        raise ValueError(f"holds {storage[0]} {list(shape)}, .metadata says {dtype} {list(chunk.sizes)}")
    check_byte_order(window, entries)
    return rows_offset(window, entries, (storage, first, shape, stride), dtype)
