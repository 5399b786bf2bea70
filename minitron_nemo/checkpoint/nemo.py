"""NeMo 2 checkpoints: `weights`, a torch_dist directory whose keys begin with `module.`, beside `context`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.nemo import architecture_from_nemo, nemo_config, nemo_model
from minitron_nemo.checkpoint import tokenizer
from minitron_nemo.checkpoint.megatron import TorchDistSource
from minitron_nemo.checkpoint.megatron_sink import MegatronSink
from minitron_nemo.checkpoint.nemo_context import (
    ARTIFACTS_DIRECTORY,
    FILE_NAME,
    TOKENIZER_DIRECTORY,
    Call,
    read_context,
    write_context,
)
from minitron_nemo.checkpoint.safe_pickle import METADATA_FILE
from minitron_nemo.checkpoint.sink import main_dtype
from minitron_nemo.checkpoint.source import Source

CONTEXT = "context"
WEIGHTS = "weights"


def is_nemo(path: Path) -> bool:
    """Whether a directory is laid out as NeMo 2 does it."""
    if (path / CONTEXT).is_dir():
        return (path / CONTEXT / FILE_NAME).exists() or (path / WEIGHTS).is_dir()
    return (path / FILE_NAME).exists() and (path / METADATA_FILE).exists()


class NemoSource(TorchDistSource):
    """Reads what NeMo 2 saved, training checkpoints included. The first versions had no subdirectories."""

    format = "nemo"

    def __init__(self, path: Path) -> None:
        directory = path / CONTEXT if (path / CONTEXT).is_dir() else path
        context = read_context(directory)
        self._generation = context.generation
        files = context.tokenizer or directory / TOKENIZER_DIRECTORY
        architecture = architecture_from_nemo(
            context.config.target,
            context.config.arguments,
            f"{directory / FILE_NAME}: model.config",
            tokenizer.tokenizer_size(files),
        )
        weights = path / WEIGHTS
        super().__init__(path, weights if weights.is_dir() else path, architecture, files)

    def copy_tokenizer(self, directory: Path) -> None:
        super().copy_tokenizer(directory)
        if self._generation is not None:
            shutil.copyfile(self._generation, directory / tokenizer.GENERATION_FILE)


class NemoSink(MegatronSink):
    """Writes what NeMo 2.7's `io.load_context` and `llm.export_ckpt` read."""

    prefix = "module."
    subdirectory = WEIGHTS
    # Lightning's part of a checkpoint, at the start of a training.
    common = MappingProxyType({"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.4.0", "state_dict": {}})

    def __init__(self, path: Path, architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__(path, architecture, dtypes)
        self._config = Call(*nemo_config(architecture, main_dtype(architecture, dtypes)))

    def describe(self, partial: Path, source: Source) -> None:
        context = partial / CONTEXT
        context.mkdir(exist_ok=True)
        files, artifacts = context / TOKENIZER_DIRECTORY, context / ARTIFACTS_DIRECTORY
        source.copy_tokenizer(files)
        generation = files / tokenizer.GENERATION_FILE
        if has_generation := generation.is_file():
            artifacts.mkdir(exist_ok=True)
            generation.rename(artifacts / tokenizer.GENERATION_FILE)
        names = nemo_model(self.architecture)
        has_tokenizer = any(files.iterdir())
        if not has_tokenizer:
            files.rmdir()
        write_context(
            context,
            f"{names.module}.{names.model}",
            self._config,
            tokenizer=has_tokenizer,
            generation=has_generation,
        )
