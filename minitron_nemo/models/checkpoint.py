"""Weights of a built model from and to torch_dist directories, at any layout. Training state is the trainer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.architecture import FILE_NAME
from minitron_nemo.checkpoint import files, safe_pickle, tokenizer
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.errors import UserError
from minitron_nemo.models.build import Model, padded_vocab_size
from minitron_nemo.models.groups import without_padding
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout

# Stored with the rows of the layout that wrote them, or without padding.
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def load_model(model: Model, directory: Path) -> None:
    """Fill the model with the weights of a checkpoint written on any layout, in any floating dtype. Collective.

    Weights are converted to the model's dtype, rows of padded vocabulary set to zero. An optimizer made before must
    be told to fetch its main parameters again. Raises UserError where the checkpoint is not of this architecture; the
    model must not be used after a failed load.
    """
    safe_pickle.check_metadata(directory)
    if (directory / FILE_NAME).exists():
        _check_architecture(model.architecture, directory)
    state, _ = extract_matching_values(_sharded_state(model), lambda value: not isinstance(value, ShardedObject))
    try:
        _check_vocabulary(model, directory)
        loaded = dist_checkpointing.load(state, str(directory))
    except (CheckpointingException, CheckpointException, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{directory}: not a checkpoint of this model: {_first_line(error)}") from error
    for index, module in enumerate(model.modules):
        # Not strict: objects other than tensors (TransformerEngine's fp8 state) were left out above.
        mismatch = module.load_state_dict(loaded[f"chunk{index}"], strict=False)
        if missing := [key for key in mismatch.missing_keys if not key.endswith("_extra_state")]:
            raise UserError(f"{directory}: has no {missing[0]}; convert the checkpoint again")
    _clear_vocabulary_padding(model)


def load_output_weight(directory: Path, layout: Layout, dtype: torch.dtype) -> Tensor:
    """This rank's rows of a checkpoint's output projection, [padded_vocab/tp, h], without the model around it.

    Tied models' is the embedding; rows of padded vocabulary are zero. Raises UserError for a damaged checkpoint.
    """
    source = open_source(directory)
    architecture = source.architecture
    rows = padded_vocab_size(architecture, layout) // layout.tensor_model_parallel_size
    start = parallel_state.get_tensor_model_parallel_rank() * rows
    stop = max(start, min(start + rows, architecture.vocab_size))
    weight = torch.zeros(rows, architecture.hidden_size, dtype=dtype)
    if stop > start:
        tied = architecture.share_embeddings_and_output_weights
        weight[: stop - start] = source.read(VOCABULARY[0] if tied else VOCABULARY[1], start, stop)
    return weight.to(current_device())


def save_model(model: Model, directory: Path, tokenizer_from: Path) -> None:
    """Write weights, `architecture.json` and the tokenizer of the checkpoint `tokenizer_from`. Collective.

    `tokenizer_from` is a Megatron or a Hugging Face directory. The directory appears, or replaces an earlier one,
    when it is complete.
    """
    save_collectively(directory, lambda partial: _write(model, partial, tokenizer_from))


def save_collectively(directory: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on all ranks with the empty directory that takes the place of `directory` once all are done."""
    if launch.rank() == 0:
        files.make_partial(directory)
    launch.barrier()
    write(files.partial_path(directory))
    launch.barrier()
    if launch.rank() == 0:
        files.commit_partial(directory)
    launch.barrier()


def _write(model: Model, directory: Path, tokenizer_from: Path) -> None:
    dist_checkpointing.save(_sharded_state(model), str(directory), async_sharded_save=False)
    if launch.rank() == 0:
        model.architecture.save(directory)
        ours = tokenizer_from / tokenizer.DIRECTORY
        tokenizer.copy_files(ours if ours.is_dir() else tokenizer_from, directory / tokenizer.DIRECTORY)


def sharded_states(model: Model) -> list[dict[str, Any]]:
    """Megatron's description of where each chunk's tensors belong in the whole; keys in the files carry no chunk."""
    with launch.virtual_stages(model.layout):
        return [
            without_padding(module.sharded_state_dict(), model.architecture, model.layout) for module in model.modules
        ]


def _sharded_state(model: Model) -> dict[str, Any]:
    return {f"chunk{index}": state for index, state in enumerate(sharded_states(model))}


def _check_architecture(wanted: Architecture, directory: Path) -> None:
    found = asdict(Architecture.load(directory))
    for name, value in asdict(wanted).items():
        if found[name] != value:
            raise UserError(f"{directory / FILE_NAME}: {name} is {found[name]!r}, the model's is {value!r}")


def _check_vocabulary(model: Model, directory: Path) -> None:
    """A shorter vocabulary would be taken as it is: Megatron-core lets the number of rows differ, for the padding."""
    stored = dist_checkpointing.load_tensors_metadata(str(directory))
    for name in VOCABULARY:
        if name in stored and stored[name].global_shape[0] < model.architecture.vocab_size:
            raise UserError(
                f"{directory}: {name} has {stored[name].global_shape[0]} rows, fewer than the vocabulary of "
                f"{model.architecture.vocab_size}"
            )


@torch.no_grad()
def _clear_vocabulary_padding(model: Model) -> None:
    """Rows that no checkpoint fills hold whatever was in memory: a NaN there would spread through 0 x NaN."""
    first, last = model.modules[0], model.modules[-1]
    weights = [last.output_layer.weight] if last.post_process and last.output_layer.weight is not None else []
    if first.pre_process:
        weights.append(first.embedding.word_embeddings.weight)
    for weight in weights:
        rows = weight.shape[0]
        start = parallel_state.get_tensor_model_parallel_rank() * rows
        weight[max(0, min(rows, model.architecture.vocab_size - start)) :] = 0


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
