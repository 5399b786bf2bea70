"""Megatron-Bridge checkpoints: `iter_*/`, a torch_dist directory with run_config.yaml in it, and tracker files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.architecture import FILE_NAME
from minitron_nemo.arch.bridge import architecture_from_bridge, bridge_model
from minitron_nemo.checkpoint import tokenizer
from minitron_nemo.checkpoint.iterations import STATE_FILE, TRACKER_FILE, iteration_name, newest_iteration
from minitron_nemo.checkpoint.megatron import TorchDistSource
from minitron_nemo.checkpoint.megatron_sink import MegatronSink
from minitron_nemo.checkpoint.nemo_context import as_targets
from minitron_nemo.checkpoint.sink import main_dtype
from minitron_nemo.checkpoint.source import Source
from minitron_nemo.errors import UserError

CONFIG_FILE = "run_config.yaml"


def bridge_directory(path: Path) -> Path | None:
    """The directory of `path`, or of its newest iteration, that has Megatron-Bridge's configuration; None without."""
    for directory in (path, newest_iteration(path)):
        if directory is not None and (directory / CONFIG_FILE).is_file():
            return directory
    return None


class BridgeSource(TorchDistSource):
    """Reads what Megatron-Bridge saved, from the directory of all iterations or of one."""

    format = "bridge"

    def __init__(self, path: Path) -> None:
        directory = bridge_directory(path) or path
        config = directory / CONFIG_FILE
        files = directory / tokenizer.DIRECTORY
        # Beside what this project wrote, and nowhere else.
        known = Architecture.load(directory).model_type if (directory / FILE_NAME).is_file() else None
        architecture = architecture_from_bridge(
            _model(config), f"{config}: model", tokenizer.tokenizer_size(files), known
        )
        super().__init__(path, directory, architecture, files)


def _model(path: Path) -> dict[str, Any]:
    """The `model` section; what it refers to by `_target_` without a call becomes the dotted name. UserError."""
    try:
        model = yaml.safe_load(path.read_text())["model"]
        return {name: _plain(value) for name, value in model.items()}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a run_config of Megatron-Bridge: {' '.join(str(error).split())[:200]}") from None


def _plain(value: Any) -> Any:
    is_reference = isinstance(value, dict) and set(value) == {"_target_", "_call_"} and not value["_call_"]
    return value["_target_"] if is_reference else value


class BridgeSink(MegatronSink):
    """Writes iteration 0 of what Megatron-Bridge's AutoBridge loads.

    Its configuration does not tell apart families with the same layers; `architecture.json` beside it does.
    """

    subdirectory = iteration_name(0)
    common = MappingProxyType({"checkpoint_version": 3.0, "iteration": 0})

    def __init__(self, path: Path, architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__(path, architecture, dtypes)
        self._model = bridge_model(architecture, main_dtype(architecture, dtypes))

    def describe(self, partial: Path, source: Source) -> None:
        self.architecture.save(self._weights)
        source.copy_tokenizer(self._weights / tokenizer.DIRECTORY)
        config = {
            "model": {name: value if name == "_target_" else as_targets(value) for name, value in self._model.items()},
            "tokenizer": _TOKENIZER,
            "checkpoint": _CHECKPOINT,
        }
        (self._weights / CONFIG_FILE).write_text(yaml.safe_dump(config))
        torch.save(_TRAIN_STATE, self._weights / "train_state.pt")
        torch.save(_TRAIN_STATE, partial / STATE_FILE)
        (partial / TRACKER_FILE).write_text("0")


_TOKENIZER = {
    "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
    "tokenizer_type": "HuggingFaceTokenizer",
    # An empty path is how Megatron-Bridge says: `tokenizer/` beside this file (training/model_load_save.py).
    "tokenizer_model": {"_target_": "pathlib.PosixPath", "_call_": True},
}
_CHECKPOINT = {
    "_target_": "megatron.bridge.training.config.CheckpointConfig",
    "save_optim": False,
    "save_rng": False,
    "fully_parallel_save": True,
}
# megatron/bridge/training/state.py, TrainState: nothing has been trained.
_TRAIN_STATE = {
    **{
        name: torch.tensor(0, dtype=torch.int32)
        for name in ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    },
    "floating_point_operations_so_far": torch.tensor(0, dtype=torch.float64),
    **{name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")},
}
