"""Writes Megatron-core torch_dist directories that load at any layout.

Every process appends torch.save blobs to a file of its own, `__RANK_0.distcp`; the last step writes `.metadata` over
all of them. torch's FileSystemWriter would write the same bytes, but it keeps the last tensor of every key alive and
needs one process group around all writers; here a process holds one chunk, and a file tells the others where it went.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.tensors import TensorSpec, table, tensors
from minitron_nemo.checkpoint import tokenizer
from minitron_nemo.checkpoint.files import fsync, partial_path
from minitron_nemo.checkpoint.safe_pickle import METADATA_FILE
from minitron_nemo.checkpoint.sink import Chunk
from minitron_nemo.checkpoint.source import Source
from minitron_nemo.checkpoint.tensor_io import AppendingFile
from minitron_nemo.errors import UserError

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class MegatronSink:
    """Keys stack the layers, without a prefix; chunks are rows of one layer, all columns."""

    def __init__(self, path: Path, architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> None:
        self.path = path
        self.architecture = architecture
        self.dtypes = dtypes
        for tensor in tensors(architecture):
            if dtypes[tensor.name] != dtypes[tensor.spec.name.format(layer=0)]:
                raise UserError(f"{path}: {tensor.name} has another data type than layer 0; give one dtype for all")

    def prepare(self) -> None:
        """Nothing is shared between the writers."""

    def write(self, blocks: Iterable[tuple[Chunk, torch.Tensor]], rank: int) -> None:
        file = partial_path(self.path) / f"__{rank}_0.distcp"
        places: list[Any] = []
        with open(file, "wb", buffering=0) as opened, _no_checksums():
            stream = AppendingFile(opened.fileno())
            for chunk, block in blocks:
                origin, sizes = self._position(chunk)
                offset = stream.end
                _write_tensor(stream, block.reshape(sizes))
                places.append((_key(chunk.tensor.spec), origin, sizes, file.name, offset, stream.end - offset))
            if rank == 0:
                places += [(key, None, None, *_write_object(stream, file.name)) for key in self._extra_states()]
        fsync(file)
        _places_file(self.path, rank).write_text(json.dumps(places))

    def _position(self, chunk: Chunk) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Origin and sizes of a chunk in its stacked key."""
        columns = chunk.tensor.spec.shape(self.architecture)[1:]
        origin = (chunk.start, *(0 for _ in columns))
        sizes = (chunk.stop - chunk.start, *columns)
        return (origin, sizes) if chunk.tensor.layer is None else ((chunk.tensor.layer, *origin), (1, *sizes))

    def _extra_states(self) -> Iterator[str]:
        """The `_extra_state` objects without which Megatron-core does not load: one per linear module and layer."""
        layers = self.architecture.num_layers
        for spec in table(self.architecture):
            if spec.per_layer and len(spec.dims) > 1:
                module = _key(spec).removesuffix(".weight")
                yield from (f"{module}._extra_state/shard_{layer}_{layers}" for layer in range(layers))

    def finish(self, source: Source) -> None:
        partial = partial_path(self.path)
        specs = {_key(spec): spec for spec in table(self.architecture)}
        places: list[Any] = []
        for file in sorted(partial.glob(".places-*.json")):
            places += json.loads(file.read_text())
            file.unlink()
        tensors: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in specs}
        metadata: dict[str, Any] = {}
        storage = {}
        for key, origin, sizes, file_name, offset, length in places:
            index = MetadataIndex(key, origin)
            storage[index] = _StorageInfo(file_name, offset, length)
            if origin is None:
                metadata[key] = BytesStorageMetadata()
            else:
                tensors[key].append(ChunkStorageMetadata(torch.Size(origin), torch.Size(sizes)))
        for key, spec in specs.items():
            shape = spec.shape(self.architecture)
            stacked = (self.architecture.num_layers, *shape) if spec.per_layer else shape
            dtype = self.dtypes[spec.name.format(layer=0)]
            metadata[key] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(stacked), tensors[key])
        complete = Metadata(metadata, None, storage, StorageMeta(), CURRENT_DCP_VERSION)
        torch.save({}, partial / "common.pt")
        (partial / "metadata.json").write_text(json.dumps(FORMAT))
        self.architecture.save(partial)
        source.copy_tokenizer(partial / tokenizer.DIRECTORY)
        (partial / METADATA_FILE).write_bytes(pickle.dumps(complete))


def _key(spec: TensorSpec) -> str:
    return spec.name.replace("{layer}.", "")


def _places_file(path: Path, rank: int) -> Path:
    return partial_path(path) / f".places-{rank}.json"


def _write_tensor(stream: AppendingFile, tensor: torch.Tensor) -> None:
    try:
        torch.save(tensor, stream)  # type: ignore[arg-type]
    except RuntimeError as error:
        # On a full disk torch still ends the zip, and what it says of that hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _write_object(stream: AppendingFile, file_name: str) -> tuple[str, int, int]:
    """Append what Megatron-core's local spec stores as an extra state: nothing, in a list."""
    offset = stream.end
    torch.save([None], stream)  # type: ignore[arg-type]
    return file_name, offset, stream.end - offset


@contextmanager
def _no_checksums() -> Iterator[None]:
    """torch.save without CRC32 sums: no torch reader looks at them, and they take as long as the writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
