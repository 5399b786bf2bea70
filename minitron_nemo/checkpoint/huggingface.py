"""Hugging Face directories: config.json, safetensors in one or several files, tokenizer files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.huggingface import architecture_from_hf, hf_config
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.checkpoint import tokenizer
from minitron_nemo.checkpoint.blocks import Chunk
from minitron_nemo.checkpoint.files import partial_path, read_json
from minitron_nemo.checkpoint.safetensors_files import StoredTensor, lay_out, read_header
from minitron_nemo.checkpoint.sink import main_dtype
from minitron_nemo.checkpoint.source import Source, check_tensors
from minitron_nemo.checkpoint.tensor_io import read_tensor, write_tensor
from minitron_nemo.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD_BYTES = 5 * 1000**3


class HuggingFaceSource:
    """Reads a Hugging Face directory; queries, keys and values, gate and up are put together row by row."""

    format = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path = path
        config_path = path / "config.json"
        config = read_json(config_path)
        if "quantization_config" in config:
            raise UserError(f"{config_path}: quantization_config: the weights are quantised; give the original model")
        self.architecture = architecture_from_hf(config, str(config_path))
        self._stored = _stored_tensors(path)
        self._tensors = {tensor.name: tensor for tensor in tensors(self.architecture)}
        wanted = hf_shapes(self.architecture)
        ignored = {name for name in self._stored if name.endswith("rotary_emb.inv_freq")}
        if self.architecture.share_embeddings_and_output_weights:
            ignored.add("lm_head.weight")  # a copy of the embedding
        found = {name: stored.shape for name, stored in self._stored.items()}
        check_tensors(path, found, wanted, set(found) - set(wanted) - ignored)
        for name, tensor in self._tensors.items():
            for piece in tensor.hf_pieces(self.architecture):
                if self._stored[piece.hf_name].dtype != self.dtype(name):
                    raise UserError(f"{path}: tensor {piece.hf_name} has another data type than its siblings in {name}")

    def dtype(self, name: str) -> torch.dtype:
        tensor = self._tensors[name]
        return self._stored[tensor.hf_pieces(self.architecture)[0].hf_name].dtype

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name]
        columns = tensor.spec.shape(self.architecture)[1:]
        out = torch.empty((stop - start, *columns), dtype=self.dtype(name))
        for piece in tensor.hf_pieces(self.architecture):
            first, last = max(start, piece.start), min(stop, piece.start + piece.length)
            if first < last:
                stored = self._stored[piece.hf_name]
                row = piece.hf_start + first - piece.start
                rows = out[first - start : last - start]
                read_tensor(stored.path, stored.offset + row * stored.row_bytes, rows)
        return out

    def weight_files(self) -> list[Path]:
        return sorted({stored.path for stored in self._stored.values()})

    def layout(self) -> str:
        return f"whole tensors in {len(self.weight_files())} file(s)"

    def tokenizer_size(self) -> int | None:
        return tokenizer.tokenizer_size(self.path)

    def copy_tokenizer(self, directory: Path) -> None:
        tokenizer.copy_files(self.path, directory)


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Where every tensor of the directory is. Raises UserError for files that are not what the index says."""
    if not (path / INDEX_FILE).is_file():
        if not (path / SINGLE_FILE).is_file():
            raise UserError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors weights are read")
        return read_header(path / SINGLE_FILE)
    index_path = path / INDEX_FILE
    files = read_json(index_path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index_path}: weight_map: expected a mapping of tensor names to file names")
    headers = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise UserError(f"{index_path}: weight_map names {file!r}, which is outside the checkpoint")
        if not (path / file).is_file():
            raise UserError(f"{path / file}: not found, but {INDEX_FILE} names it; copy it again")
        headers[file] = read_header(path / file)
    for name, file in files.items():
        if name not in headers[file]:
            raise UserError(f"{path / file}: tensor {name} is missing, but {INDEX_FILE} says it is there")
    return {name: headers[file][name] for name, file in files.items()}


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor, in the order of the forward pass."""
    rows: dict[str, int] = {}
    columns: dict[str, tuple[int, ...]] = {}
    for tensor in tensors(architecture):
        for piece in tensor.hf_pieces(architecture):
            rows[piece.hf_name] = rows.get(piece.hf_name, 0) + piece.length
            columns[piece.hf_name] = tensor.spec.shape(architecture)[1:]
    return {name: (rows[name], *columns[name]) for name in rows}


class HuggingFaceSink:
    """Writes a Hugging Face directory. The files are laid out first, so that every process writes rows in place."""

    def __init__(self, path: Path, architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> None:
        self.path = path
        self.architecture = architecture
        self.dtypes = dtypes
        shapes = hf_shapes(architecture)
        self._headers: dict[Path, bytes] = {}
        self._stored: dict[str, StoredTensor] = {}
        hf_dtypes = {
            piece.hf_name: dtypes[tensor.name]
            for tensor in tensors(architecture)
            for piece in tensor.hf_pieces(architecture)
        }
        shards = _shards({name: prod(shape) * hf_dtypes[name].itemsize for name, shape in shapes.items()})
        for number, names in enumerate(shards, start=1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            path_in_partial = partial_path(path) / file
            header, places = lay_out(path_in_partial, {name: (hf_dtypes[name], shapes[name]) for name in names})
            self._headers[path_in_partial] = header
            self._stored |= places

    def prepare(self) -> None:
        ends: dict[Path, int] = {}
        for stored in self._stored.values():
            ends[stored.path] = max(ends.get(stored.path, 0), stored.offset + stored.shape[0] * stored.row_bytes)
        for file, header in self._headers.items():
            file.write_bytes(header)
            os.truncate(file, ends[file])

    def write(self, blocks: Iterable[tuple[Chunk, torch.Tensor]], part: int) -> tuple[list[str], list[Any]]:
        touched: set[Path] = set()
        descriptors = {file: os.open(file, os.O_WRONLY) for file in self._headers}
        try:
            for chunk, block in blocks:
                touched |= self._write_chunk(chunk, block, descriptors)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        return [file.name for file in sorted(touched)], []

    def _write_chunk(self, chunk: Chunk, block: torch.Tensor, descriptors: Mapping[Path, int]) -> set[Path]:
        """Returns the files that the rows went to."""
        touched = set()
        for piece in chunk.tensor.hf_pieces(self.architecture):
            first, last = max(chunk.start, piece.start), min(chunk.stop, piece.start + piece.length)
            if first < last:
                stored = self._stored[piece.hf_name]
                row = piece.hf_start + first - piece.start
                part = block[first - chunk.start : last - chunk.start]
                write_tensor(descriptors[stored.path], stored.offset + row * stored.row_bytes, part)
                touched.add(stored.path)
        return touched

    def finish(self, source: Source, places: list[Any]) -> None:
        partial = partial_path(self.path)
        source.copy_tokenizer(partial)
        if len(self._headers) > 1:
            index = {
                "metadata": {"total_size": sum(s.shape[0] * s.row_bytes for s in self._stored.values())},
                "weight_map": {name: stored.path.name for name, stored in self._stored.items()},
            }
            (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        config = hf_config(self.architecture, main_dtype(self.architecture, self.dtypes))
        config |= tokenizer.special_ids(partial)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Tensors in order, cut so that no file exceeds SHARD_BYTES unless a single tensor does."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
