"""Checkpoints of Megatron-LM before torch_dist, read only: `mp_rank_TT[_PPP]/model_optim_rng.pt`, arguments inside.

Each file holds what one rank had: a tensor-parallel slice of the layers of its pipeline stage, numbered from 0, in one
model per virtual stage. Names are Megatron-core's or those of the models that Megatron-LM had before it.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitron_nemo.arch import Axis
from minitron_nemo.arch.axes import AxisDim, GatedDim
from minitron_nemo.arch.megatron_args import architecture_from_args
from minitron_nemo.arch.tensors import NamedTensor, tensors
from minitron_nemo.checkpoint import tokenizer
from minitron_nemo.checkpoint.iterations import newest_iteration
from minitron_nemo.checkpoint.safe_pickle import MALFORMED, ShardUnpickler
from minitron_nemo.checkpoint.safetensors_files import StoredTensor
from minitron_nemo.checkpoint.source import check_tensors
from minitron_nemo.checkpoint.tensor_io import read_tensor
from minitron_nemo.checkpoint.torch_zip import STORAGES, Window, check_byte_order, content, entries_of, rows_offset
from minitron_nemo.errors import UserError

FILE_NAME = "model_optim_rng.pt"
OLDEST_VERSION = 3.0  # of the checkpoint: before it, queries, keys and values were interleaved otherwise
_DTYPES = {name: dtype for dtype, name in STORAGES.items()}
_RENAMED = (  # what the canonical table calls otherwise, as patterns
    (r"^(module\.)?language_model\.", ""),
    (r"^module\.", ""),
    (r"^encoder\.", "decoder."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    (r"\.(input_norm|input_layernorm)\.weight$", ".self_attention.linear_qkv.layer_norm_weight"),
    (
        r"\.(post_attention_norm|post_attention_layernorm|pre_mlp_layernorm)\.weight$",
        ".mlp.linear_fc1.layer_norm_weight",
    ),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
)


def legacy_directory(path: Path) -> Path | None:
    """The directory of `path`, or of its newest iteration, that has ranks' directories; None without."""
    for directory in (path, newest_iteration(path)):
        if directory is not None and any(directory.glob("mp_rank_*")):
            return directory
    return None


class Part(NamedTuple):
    """`length` rows from `start` of a canonical tensor are rows of `stored` from `row`; a column where they are cut."""

    stored: StoredTensor
    row: int
    start: int
    length: int
    column: int | None


class LegacySource:
    """Reads the directory of all iterations or of one. The tokenizer is taken from `tokenizer/` in either, if there."""

    format = "legacy"

    def __init__(self, path: Path) -> None:
        self.path = path
        directory = legacy_directory(path) or path
        self._grid = _grid(directory)
        self._tokenizer = next(
            (found for found in (directory / tokenizer.DIRECTORY, path / tokenizer.DIRECTORY) if found.is_dir()), path
        )
        ranks = [[_Shard(file) for file in stages] for stages in self._grid]
        if len({len(shard.models) for stages in ranks for shard in stages}) != 1:
            raise UserError(f"{directory}: the ranks have different numbers of virtual stages")
        first = ranks[0][0]
        self.architecture = architecture_from_args(first.args, f"{first.path}: args", self.tokenizer_size())
        stored = [_numbered(stages) for stages in ranks]
        wanted = {tensor.name: tensor for tensor in tensors(self.architecture)}
        extra = {name for name in stored[0] if name not in wanted and not name.endswith("._extra_state")}
        if self.architecture.share_embeddings_and_output_weights:
            extra -= {"output_layer.weight", "word_embeddings_for_head.weight"}  # copies of the embedding
        check_tensors(path, {}, {}, extra)
        self._parts = {name: self._find(tensor, stored) for name, tensor in wanted.items()}

    def _find(self, tensor: NamedTensor, stored: list[dict[str, StoredTensor]]) -> list[Part]:
        """The parts of a canonical tensor in the ranks' slices. UserError where they do not make it up."""
        for rank, names in enumerate(stored):
            if tensor.name not in names:
                raise UserError(f"{self.path}: tensor {tensor.name} is missing in tensor-parallel rank {rank}")
        slices = [of_rank[tensor.name] for of_rank in stored]
        if any(len(part.shape) != len(tensor.spec.dims) for part in slices):
            raise UserError(
                f"{self.path}: tensor {tensor.name} does not have {len(tensor.spec.dims)} dims in every rank"
            )
        parts = list(_parts(tensor, slices))
        rows = sum(part.length for part in parts) if parts[0].column is None else parts[0].length
        columns = slices[0].shape[1:] if parts[0].column is None else (sum(part.stored.shape[1] for part in parts),)
        wanted = tensor.spec.shape(self.architecture)
        is_padded = tensor.spec.dims[0] == AxisDim(Axis.VOCAB) and rows > wanted[0] and columns == wanted[1:]
        alike = len({(part.dtype, part.shape) for part in slices}) == 1
        if not alike or ((rows, *columns) != wanted and not is_padded):
            raise UserError(
                f"{self.path}: tensor {tensor.name} has shape {[rows, *columns]} in {len(slices)} tensor-parallel "
                f"rank(s), the architecture says {list(wanted)}"
            )
        return parts

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[name][0].stored.dtype

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        first_part = self._parts[name][0]
        columns = first_part.stored.shape[1:]
        if first_part.column is not None:
            columns = (columns[0] * len(self._parts[name]),)
        out = torch.empty((stop - start, *columns), dtype=self.dtype(name))
        for part in self._parts[name]:
            first, last = max(start, part.start), min(stop, part.start + part.length)
            if first >= last:
                continue
            stored, rows = part.stored, out[first - start : last - start]
            offset = stored.offset + (part.row + first - part.start) * stored.row_bytes
            if part.column is None:
                read_tensor(stored.path, offset, rows)
            else:
                cut = torch.empty((last - first, *stored.shape[1:]), dtype=stored.dtype)
                read_tensor(stored.path, offset, cut)
                rows[:, part.column : part.column + stored.shape[1]] = cut
        return out

    def weight_files(self) -> list[Path]:
        return [file for stages in self._grid for file in stages]

    def layout(self) -> str:
        stages = len(self._grid[0])
        return f"tensor_model_parallel_size {len(self._grid)}, pipeline_model_parallel_size {stages}, a file per rank"

    def tokenizer_size(self) -> int | None:
        return tokenizer.tokenizer_size(self._tokenizer)

    def copy_tokenizer(self, directory: Path) -> None:
        tokenizer.copy_files(self._tokenizer, directory)


def _grid(directory: Path) -> list[list[Path]]:
    """The files, by tensor-parallel rank and pipeline stage. Raises UserError where one is missing."""
    files: dict[tuple[int, int], Path] = {}
    for entry in directory.glob("mp_rank_*"):
        match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", entry.name)
        if match is None:
            raise UserError(f"{entry}: not mp_rank_TT or mp_rank_TT_PPP; expert parallelism is not supported")
        files[int(match.group(1)), int(match.group(2) or 0)] = entry / FILE_NAME
    ranks, stages = (1 + max(position[dim] for position in files) for dim in (0, 1))
    for rank in range(ranks):
        for stage in range(stages):
            if (rank, stage) not in files or not files[rank, stage].is_file():
                raise UserError(f"{directory}: {FILE_NAME} of tensor-parallel rank {rank}, stage {stage} is not there")
    return [[files[rank, stage] for stage in range(stages)] for rank in range(ranks)]


class _Shard:
    """The arguments of one file, and where its tensors are: one mapping of names per virtual stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb", buffering=0) as file:
                window = Window(file.fileno(), 0, path.stat().st_size)
                with zipfile.ZipFile(window) as blob:
                    entries = entries_of(blob)
                check_byte_order(window, entries)
                saved = ShardUnpickler(io.BytesIO(content(window, entries["data.pkl"]))).load()
                self.args: Mapping[str, Any] = vars(saved["args"])
                if saved.get("checkpoint_version", 0) < OLDEST_VERSION:
                    raise ValueError(f"checkpoint_version {saved.get('checkpoint_version')} is before {OLDEST_VERSION}")
                models = [saved["model"]] if "model" in saved else _virtual_stages(saved)
                self.models = [
                    {_canonical(name): self._stored(window, entries, view) for name, view in _flat(model)}
                    for model in models
                ]
        except (*MALFORMED, zipfile.BadZipFile, OSError, RecursionError) as error:
            raise UserError(f"{path}: refused: {' '.join(str(error).split())[:200]}") from None

    def _stored(self, window: Window, entries: Mapping[str, zipfile.ZipInfo], view: Any) -> StoredTensor:
        dtype = _DTYPES[view[0][0]]
        return StoredTensor(self.path, rows_offset(window, entries, view, dtype), dtype, view[2])


def _virtual_stages(saved: Mapping[str, Any]) -> list[Any]:
    count = sum(1 for key in saved if re.fullmatch(r"model\d+", str(key)))
    return [saved[f"model{index}"] for index in range(count)]


def _flat(model: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and tensors of a state dict, which may be nested; states other than weights are left out."""
    for key, value in model.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, tuple) and not key.endswith("_extra_state"):
            yield f"{prefix}{key}", value


def _canonical(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _numbered(stages: list[_Shard]) -> dict[str, StoredTensor]:
    """The tensors of one tensor-parallel rank, layers numbered through, virtual stage by virtual stage."""
    found: dict[str, StoredTensor] = {}
    layers_before = 0
    for virtual in range(len(stages[0].models)):
        for stage in stages:
            count = 0
            for name, stored in stage.models[virtual].items():
                if match := re.match(r"decoder\.layers\.(\d+)\.", name):
                    count = max(count, 1 + int(match.group(1)))
                    name = f"decoder.layers.{layers_before + int(match.group(1))}.{name[match.end() :]}"
                found[name] = stored
            layers_before += count
    return found


def _parts(tensor: NamedTensor, slices: list[StoredTensor]) -> Iterator[Part]:
    """How the ranks' slices make up a tensor: whole, by rows, by rows of gate and up, or by columns."""
    rows = slices[0].shape[0]
    if tensor.spec.tp_dim is None:
        yield Part(slices[0], 0, 0, rows, None)
    elif tensor.spec.tp_dim == 1:
        for rank, stored in enumerate(slices):
            yield Part(stored, 0, 0, rows, rank * stored.shape[1])
    elif isinstance(tensor.spec.dims[0], GatedDim):
        half = rows // 2
        for block in range(2):
            for rank, stored in enumerate(slices):
                yield Part(stored, block * half, (block * len(slices) + rank) * half, half, None)
    else:
        for rank, stored in enumerate(slices):
            yield Part(stored, 0, rank * rows, rows, None)
