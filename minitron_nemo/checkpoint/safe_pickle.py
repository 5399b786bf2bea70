"""Reading the pickles of a torch_dist checkpoint without executing anything in them.

`.metadata` and the `data.pkl` of each stored tensor are pickles. They are rebuilt here from an allow-list, into
records of our own: none of the classes that a pickle names is imported, called or touched, so a hostile one can
neither run code nor change a class. Stored objects (`_extra_state`) and `common.pt` are loaded with weights_only.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from minitron_nemo.errors import UserError

METADATA_FILE = ".metadata"
MALFORMED = (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, ImportError)
_METADATA_RECORDS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # What Megatron-core keeps for its own incremental saves.
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "BytesIOWriteData"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
}
_METADATA_VALUES = {  # constructors of plain values: what they are given is kept
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.serialization", "_get_layout"),
}
_PLAIN_TYPES = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "PurePosixPath"): PurePosixPath,
    ("builtins", "set"): set,
}


class Record:
    """An instance of a class the pickle names: its state as attributes, a tuple state as `state`."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Index(Record):
    """`MetadataIndex`, which is a dictionary key: equal where tensor name and offset are."""

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Index)
            and vars(self).get("fqn") == vars(other).get("fqn")
            and (vars(self).get("offset") == vars(other).get("offset"))
        )


class MetadataUnpickler(pickle.Unpickler):
    """Builds `.metadata` out of Records; any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        # Classes are made anew for every load, so that nothing a pickle does to one outlives it.
        if name == "MetadataIndex" and (module, name) in _METADATA_RECORDS:
            return type(name, (_Index,), {"offset": None, "__hash__": _Index.__hash__})
        if (module, name) in _METADATA_RECORDS:
            return type(name, (Record,), {})
        if (module, name) in _METADATA_VALUES:
            return lambda value: value
        if (module, name) in _PLAIN_TYPES:
            return _PLAIN_TYPES[module, name]
        return _dtype(module, name)


class TensorUnpickler(pickle.Unpickler):
    """Builds what `torch.save` says about one tensor: `(storage, storage_offset, size, stride)`, storage as
    `(dtype, key, elements)`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        return _dtype(module, name)

    def persistent_load(self, pid: Any) -> tuple[Any, str, int]:
        kind, storage_class, key, _, elements = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"stores {kind!r} where a tensor's storage was expected")
        return storage_class, key, elements


class ShardUnpickler(TensorUnpickler):
    """Builds the content of a legacy Megatron-LM file: tensors as `TensorUnpickler` has them, arguments as a Record.

    Random states, enums and TransformerEngine's state become empty Records; any other global is refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("argparse", "Namespace"), ("types", "SimpleNamespace")):
            return type(name, (Record,), {})
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) in _PLAIN_TYPES:
            return _PLAIN_TYPES[module, name]
        if (module, name) in _WITHOUT_MEANING or module.partition(".")[0] in ("megatron", "numpy"):
            return type("Ignored", (_Ignored,), {})
        return super().find_class(module, name)


class _Ignored(Record):
    """Something that reading weights has no use for, whatever it is made from."""

    def __new__(cls, *_: Any, **__: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing is kept."""


_WITHOUT_MEANING = {
    ("_codecs", "encode"),
    ("_io", "BytesIO"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}


def _dtype(module: str, name: str) -> torch.dtype:
    value = getattr(torch, name, None) if module == "torch" else None
    if not isinstance(value, torch.dtype):
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint has no use for")
    return value


def load_metadata(directory: Path) -> Record:
    """`.metadata` as Records. Raises UserError when it is missing, malformed or names anything unexpected."""
    path = directory / METADATA_FILE
    try:
        with open(path, "rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
            raise TypeError("its tables are not dictionaries")
        for index, place in metadata.storage_data.items():
            _check_inside(str(index.fqn), str(place.relative_path))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; is {directory} a Megatron torch_dist checkpoint?") from None
    except MALFORMED as error:
        raise UserError(f"{path}: refused: {_line(error)}; do not use a checkpoint from an unknown source") from None
    return metadata


def _check_inside(key: str, relative: str) -> None:
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise pickle.UnpicklingError(f"{key} is said to be in {relative!r}, outside the checkpoint")


def check_metadata(directory: Path) -> None:
    """Check every pickle that Megatron-core loads with a model: `.metadata`, `common.pt`, `_extra_state` objects.

    Must run before a torch or Megatron loader sees the directory, as those unpickle without limits. Raises UserError.
    """
    storage: Mapping[Any, Any] = load_metadata(directory).storage_data  # type: ignore[attr-defined]
    check_blob(directory / "common.pt", 0, None)
    for index, place in storage.items():
        if "_extra_state" in index.fqn:
            check_blob(directory / place.relative_path, place.offset, place.length)


def check_blob(path: Path, offset: int, length: int | None) -> None:
    """Raise UserError unless the torch.save blob there holds plain values and tensors alone."""
    try:
        if not path.resolve().is_relative_to(path.parent.resolve()):
            raise pickle.UnpicklingError("it is a link out of the checkpoint")
        with open(path, "rb") as file:
            file.seek(offset)
            blob = io.BytesIO(file.read(length) if length is not None else file.read())
        with torch.serialization.safe_globals([io.BytesIO]):
            torch.load(blob, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; the checkpoint is incomplete") from None
    except (*MALFORMED, RuntimeError) as error:
        raise UserError(f"{path}: refused at offset {offset}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
