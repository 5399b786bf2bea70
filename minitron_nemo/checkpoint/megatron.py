"""Megatron-core torch_dist directories, written at any layout, read by rows: also those of NeMo and Megatron-Bridge.

A key of `.metadata` is a global tensor cut into chunks. A canonical tensor is found as the two halves `_w` (gate) and
`_v` (up) that `singleton_local_shards` makes of a gated matrix, under its own name, or as one entry of a key that
stacks experts, layers, or the experts of layers; each with or without the prefix `module.`. Rows beyond `vocab_size`
are padding and are not read; optimizer and random states are passed over.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.axes import AxisDim
from minitron_nemo.arch.tensors import NamedTensor, tensors
from minitron_nemo.checkpoint import tokenizer
from minitron_nemo.checkpoint.safe_pickle import load_metadata
from minitron_nemo.checkpoint.source import check_tensors
from minitron_nemo.checkpoint.torch_dist import StoredChunk, stored_keys
from minitron_nemo.errors import UserError

PREFIXES = ("", "module.")
MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")


class Segment(NamedTuple):
    """A canonical tensor's rows from `start` are rows of `key`, of the tensor at `place` where it stacks several."""

    key: str
    place: tuple[int, ...]
    start: int
    length: int


class TorchDistSource:
    """Reads the torch_dist directory `weights` of checkpoint `path`, a model of `architecture`.

    `tokenizer_files` is the directory of the Hugging Face tokenizer files, which need not exist.
    """

    format: str

    def __init__(self, path: Path, weights: Path, architecture: Architecture, tokenizer_files: Path) -> None:
        self.path = path
        self.architecture = architecture
        self.tokenizer_files = tokenizer_files
        self._keys = stored_keys(weights, load_metadata(weights))
        self._tensors = {tensor.name: tensor for tensor in tensors(self.architecture)}
        self._segments = {name: self._find(tensor) for name, tensor in self._tensors.items()}
        used = {segment.key for segments in self._segments.values() for segment in segments}
        known_parts = tuple(prefix + part for prefix in PREFIXES for part in MODEL_PARTS)
        extra = {key for key in self._keys if key.startswith(known_parts)} - used
        check_tensors(path, {}, {}, extra)
        file_sizes = {file: file.stat().st_size for file in weights.glob("*") if file.is_file()}
        for key in used:
            self._keys[key].check_complete(path, key, file_sizes)

    def _find(self, tensor: NamedTensor) -> list[Segment]:
        """Where a canonical tensor is stored. Raises UserError when it is nowhere or has another shape."""
        shape = tensor.spec.shape(self.architecture)
        for prefix in PREFIXES:
            name = prefix + tensor.name
            if name + "_w" in self._keys and name + "_v" in self._keys:
                half = shape[0] // 2
                for part in ("_w", "_v"):
                    self._check_shape(name + part, (half, *shape[1:]), tensor)
                return [Segment(name + "_w", (), 0, half), Segment(name + "_v", (), half, half)]
            for key, place, sizes in self._stacks(tensor):
                if prefix + key in self._keys:
                    self._check_shape(prefix + key, (*sizes, *shape), tensor)
                    return [Segment(prefix + key, place, 0, shape[0])]
        raise UserError(f"{self.path}: tensor {tensor.name} is missing")

    def _stacks(self, tensor: NamedTensor) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Keys that may hold a tensor, its own first; its place in each and the sizes of the dims that stack."""
        counts = {"layer": self.architecture.num_layers, "expert": self.architecture.size(Axis.EXPERTS)}
        indices = {"layer": tensor.layer, "expert": tensor.expert}
        present = [name for name, index in indices.items() if index is not None]
        for stacked in ((), ("expert",), ("layer",), ("layer", "expert")):
            if set(stacked) <= set(present):
                key = tensor.spec.name
                for name in stacked:
                    key = key.replace(f"{{{name}}}.", "")
                place = tuple(index for name in stacked if (index := indices[name]) is not None)
                yield key.format(**indices), place, tuple(counts[name] for name in stacked)

    def _check_shape(self, key: str, wanted: tuple[int, ...], tensor: NamedTensor) -> None:
        found = self._keys[key].shape
        # Megatron pads the vocabulary to a multiple of the tensor-parallel size.
        padded = tensor.spec.dims[0] == AxisDim(Axis.VOCAB) and found[0] > wanted[0] and found[1:] == wanted[1:]
        if not padded:
            check_tensors(self.path, {key: found}, {key: wanted}, set())

    def dtype(self, name: str) -> torch.dtype:
        return self._keys[self._segments[name][0].key].dtype

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        columns = self._tensors[name].spec.shape(self.architecture)[1:]
        out = torch.empty((stop - start, *columns), dtype=self.dtype(name))
        for segment in self._segments[name]:
            first, last = max(start, segment.start), min(stop, segment.start + segment.length)
            if first < last:
                rows = out[first - start : last - start]
                self._keys[segment.key].read_into(rows, segment.place, first - segment.start)
        return out

    def weight_files(self) -> list[Path]:
        used = {segment.key for segments in self._segments.values() for segment in segments}
        return sorted({chunk.path for key in used for chunk in self._keys[key].chunks})

    def layout(self) -> str:
        """Tensor-parallel size from the cuts in the columns it splits, pipeline stages from who wrote which layer."""
        widths = [1]
        writers: dict[int, set[int]] = defaultdict(set)
        for tensor in self._tensors.values():
            for segment in self._segments[tensor.name]:
                chunks = self._keys[segment.key].of_place(segment.place)
                if tensor.spec.tp_dim == 1:
                    widths.append(len({chunk.origin[-1] for chunk in chunks}))
                if tensor.layer is not None:
                    writers[tensor.layer] |= {_writer(chunk) for chunk in chunks}
        stages = {frozenset(ranks) for ranks in writers.values()}
        disjoint = sum(map(len, stages)) == len(frozenset().union(*stages))
        pipeline = f"{len(stages)}" if disjoint else "not to be told from the files"
        of_layers = [self._segments[name] for name, tensor in self._tensors.items() if tensor.expert is None]
        stacking = "stacked" if any(segment.place for segments in of_layers for segment in segments) else "per layer"
        return (
            f"tensor_model_parallel_size {max(widths)}, pipeline_model_parallel_size {pipeline}, "
            f"layers {stacking}, {len(self.weight_files())} file(s)"
        )

    def tokenizer_size(self) -> int | None:
        return tokenizer.tokenizer_size(self.tokenizer_files)

    def copy_tokenizer(self, directory: Path) -> None:
        tokenizer.copy_files(self.tokenizer_files, directory)


class MegatronSource(TorchDistSource):
    """Reads a torch_dist directory that carries its architecture.json."""

    format = "megatron"

    def __init__(self, path: Path) -> None:
        super().__init__(path, path, Architecture.load(path), path / tokenizer.DIRECTORY)


def _writer(chunk: StoredChunk) -> int:
    """Rank of the process that wrote a chunk: torch names its files `__RANK_NUMBER.distcp`."""
    match = re.match(r"__(\d+)_", chunk.path.name)
    return int(match.group(1)) if match else -1
