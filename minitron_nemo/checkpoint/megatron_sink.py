"""Writes Megatron-core torch_dist directories that load at any layout.

Every part is a file of torch.save blobs, `__0_PART.distcp`; the last step writes `.metadata` over all of them. torch's
FileSystemWriter would write the same bytes, but it keeps the last tensor of every key alive, needs one process group
around all writers, and knows nothing of what an earlier attempt wrote; here a process holds one chunk.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.tensors import TensorSpec, table, tensors
from minitron_nemo.checkpoint import tokenizer
from minitron_nemo.checkpoint.blocks import Chunk
from minitron_nemo.checkpoint.files import partial_path
from minitron_nemo.checkpoint.safe_pickle import METADATA_FILE
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
    """Keys stack layers and experts; chunks are rows of one of them, all columns.

    What NeMo and Megatron-Bridge do otherwise: the prefix of the keys, the subdirectory that the weights are in, and
    what else is in the checkpoint.
    """

    prefix = ""
    subdirectory = ""
    common: Mapping[str, Any] = MappingProxyType({})  # the content of common.pt

    def __init__(self, path: Path, architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> None:
        self.path = path
        self.architecture = architecture
        self.dtypes = dtypes
        for tensor in tensors(architecture):
            if dtypes[tensor.name] != dtypes[_first(tensor.spec)]:
                raise UserError(f"{path}: {tensor.name} has another data type than layer 0; give one dtype for all")

    @property
    def _weights(self) -> Path:
        return partial_path(self.path) / self.subdirectory

    def prepare(self) -> None:
        self._weights.mkdir(exist_ok=True)

    def write(self, blocks: Iterable[tuple[Chunk, torch.Tensor]], part: int) -> tuple[list[str], list[Any]]:
        file = self._weights / f"__0_{part}.distcp"
        places: list[Any] = []
        with open(file, "wb", buffering=0) as opened, _no_checksums():
            stream = AppendingFile(opened.fileno())
            for chunk, block in blocks:
                origin, sizes = self._position(chunk)
                offset = stream.end
                _write_tensor(stream, block.reshape(sizes))
                places.append((self._key(chunk.tensor.spec), origin, sizes, file.name, offset, stream.end - offset))
            if part == 0:
                places += [(key, None, None, *_write_object(stream, file.name)) for key in self._extra_states()]
        return [str(file.relative_to(partial_path(self.path)))], places

    def _key(self, spec: TensorSpec) -> str:
        return self.prefix + spec.stacked_name

    def _position(self, chunk: Chunk) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Origin and sizes of a chunk in its stacked key."""
        columns = chunk.tensor.spec.shape(self.architecture)[1:]
        place = chunk.tensor.place
        return (*place, chunk.start, *(0 for _ in columns)), (*(1 for _ in place), chunk.stop - chunk.start, *columns)

    def _extra_states(self) -> Iterator[str]:
        """The `_extra_state` objects without which Megatron-core does not load: one per linear module of the layers."""
        for spec in table(self.architecture):
            if spec.per_layer and len(spec.dims) > 1 and spec.part != "router":
                module = self._key(spec).removesuffix(".weight")
                stack = spec.stacked_shape(self.architecture)[: -len(spec.dims)]
                for place in product(*map(range, stack)):
                    yield f"{module}._extra_state/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, stack))}"

    def finish(self, source: Source, places: list[Any]) -> None:
        # A second of CPU, since DTensor and sympy come along: only what ends a checkpoint needs it.
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

        specs = {self._key(spec): spec for spec in table(self.architecture)}
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
            shape = torch.Size(spec.stacked_shape(self.architecture))
            metadata[key] = TensorStorageMetadata(TensorProperties(self.dtypes[_first(spec)]), shape, tensors[key])
        complete = Metadata(metadata, None, storage, StorageMeta(), CURRENT_DCP_VERSION)
        torch.save(dict(self.common), self._weights / "common.pt")
        (self._weights / "metadata.json").write_text(json.dumps(FORMAT))
        self.describe(partial_path(self.path), source)
        (self._weights / METADATA_FILE).write_bytes(pickle.dumps(complete))

    def describe(self, partial: Path, source: Source) -> None:
        """Write what the weights do not tell into the directory of the checkpoint."""
        self.architecture.save(partial)
        source.copy_tokenizer(partial / tokenizer.DIRECTORY)


def _first(spec: TensorSpec) -> str:
    """The canonical name of the first tensor of a stack."""
    return spec.name.format(layer=0, expert=0)


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
