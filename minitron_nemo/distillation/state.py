"""Training checkpoints: everything an interrupted run needs to go on as if it had not been interrupted.

    DIR/latest_checkpointed_iteration.txt   "10", written last: what it names is complete
    DIR/iter_0000010/                       torch_dist: model, optimizer (main parameters, moments), common.pt
                     training.json          iteration, data position, settings, layout
                     random_00003.pt        random state of rank 3, used again on the same layout only
    DIR/iter_0000020.partial/               being written, or what a killed job left; never read, removed at the start

A save is collective and can fail on any rank at any byte. Every part of it reports its outcome to all ranks before
the next begins, so they agree: either the tracker names the new checkpoint, or the partial one is removed on all and
`SaveError` is raised on all. Writing goes through torch's own FileSystemWriter, whose collectives carry errors.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.core import save_config as save_backend_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import random as megatron_random
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save

from minitron_nemo.checkpoint.files import commit_partial, make_partial, partial_path, write_atomic
from minitron_nemo.checkpoint.safe_pickle import check_metadata
from minitron_nemo.distillation.intermediate import IntermediateLoss
from minitron_nemo.errors import UserError
from minitron_nemo.models.build import Model
from minitron_nemo.parallel import launch

TRACKER = "latest_checkpointed_iteration.txt"
TRAINING = "training.json"
SCHEMA_VERSION = 1
# Every parameter's optimizer state under its own name: readable on any layout. Gathered over gloo on the first
# data-parallel rank, which alone holds it in host memory while it is written.
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


class SaveError(Exception):
    """A checkpoint could not be written; the previous one is as it was. Raised on every rank."""


class TrainingState:
    """Saves and resumes one run in `directory`. `settings` are what a resumed run must share with the saved one."""

    def __init__(
        self,
        directory: Path,
        student: Model,
        optimizer: MegatronOptimizer,
        settings: Mapping[str, Any],
        keep_last: int,
        intermediate: IntermediateLoss | None = None,
    ) -> None:
        self.directory = directory
        self.student = student
        self.optimizer = optimizer
        self.settings = dict(settings)
        self.keep_last = keep_last
        self.intermediate = intermediate

    def save(self, iteration: int, data_position: Mapping[str, Any]) -> None:
        """Write the state after update `iteration`. Collective. Raises SaveError on all ranks if any cannot write."""
        final = self.directory / f"iter_{iteration:07d}"
        partial = partial_path(final)
        training = {
            "schema_version": SCHEMA_VERSION,
            "iteration": iteration,
            "data": dict(data_position),
            "settings": self.settings,
            **self._layout(),
        }
        try:
            agreed(_on_rank_0(lambda: make_partial(final)))
            common = self._save_tensors(partial)
            agreed(lambda: write_atomic(partial / f"random_{launch.rank():05d}.pt", _bytes(_random_state())))

            def publish() -> None:
                write_atomic(partial / "common.pt", _bytes(common))
                write_atomic(partial / TRAINING, json.dumps(training, indent=2) + "\n")
                save_backend_config(CheckpointingConfig("torch_dist", 1), str(partial))
                commit_partial(final)
                write_atomic(self.directory / TRACKER, f"{iteration}\n")
                self._drop_old(iteration)

            agreed(_on_rank_0(publish))
        except SaveError:
            agreed(_on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True)))
            raise

    def resume(self) -> tuple[int, dict[str, Any]] | None:
        """Load the latest checkpoint into model and optimizer; (iteration, data position), or None if there is none.

        Removes what a killed save left. Collective. Raises UserError for a checkpoint of a run with other settings, or
        one that is missing or damaged.
        """
        agreed(_on_rank_0(self._clean))
        tracker = self.directory / TRACKER
        if not tracker.exists():
            return None
        found = self.directory / f"iter_{int(tracker.read_text()):07d}"
        training = self._checked(found)
        check_metadata(found)
        model_state = self._model_state()
        state = {
            **model_state,
            "optimizer": self.optimizer.sharded_state_dict(model_state, is_loading=True, metadata=SHARDING),
        }
        loaded = dist_checkpointing.load(state, str(found))
        for index, module in enumerate(self.student.modules):
            module.load_state_dict(loaded[f"model{index}"])
        if self.intermediate is not None:
            self.intermediate.load_state_dict(loaded["intermediate"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        if all(training[key] == value for key, value in self._layout().items()):
            _restore_random_state(torch.load(found / f"random_{launch.rank():05d}.pt", weights_only=True))
        return training["iteration"], training["data"]

    def _save_tensors(self, partial: Path) -> dict[str, Any]:
        """Write every sharded tensor; return what is the same on all ranks and not a tensor."""
        model_state = self._model_state()
        optimizer_state = self.optimizer.sharded_state_dict(model_state, metadata=SHARDING)
        if optimizer_state["param_state"] is None:  # not the first data-parallel rank
            del optimizer_state["param_state"]
        state = {**model_state, "optimizer": optimizer_state}
        sharded, common = save_preprocess(state)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        try:
            dcp_save(
                mcore_to_pyt_state_dict(by_key, False),
                storage_writer=FileSystemWriter(partial, thread_count=1),
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )
        except CheckpointException as error:
            raise SaveError("; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())) from None
        return common

    def _model_state(self) -> dict[str, Any]:
        state = {f"model{index}": module.sharded_state_dict() for index, module in enumerate(self.student.modules)}
        return state if self.intermediate is None else state | {"intermediate": self.intermediate.sharded_state_dict()}

    def _layout(self) -> dict[str, Any]:
        return {"layout": asdict(self.student.layout), "world_size": launch.world_size()}

    def _checked(self, found: Path) -> dict[str, Any]:
        """`training.json` of a checkpoint, if a run with this one's settings wrote it."""
        path = found / TRAINING
        try:
            training: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            raise UserError(
                f"{path}: missing or damaged, though {TRACKER} names it; write an older iteration's number into "
                f"{TRACKER}, or remove {self.directory} to start over"
            ) from None
        if training.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{path}: schema_version {training.get('schema_version')} is not {SCHEMA_VERSION}")
        saved = training["settings"]
        for key in sorted(saved.keys() | self.settings.keys()):
            if saved.get(key) != self.settings.get(key):
                raise UserError(
                    f"{path}: {key} was {saved.get(key)!r} when this run was interrupted and is "
                    f"{self.settings.get(key)!r} now; restore it, or remove {self.directory} to start over"
                )
        return training

    def _clean(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for partial in self.directory.glob("*.partial"):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()

    def _drop_old(self, newest: int) -> None:
        """Keep the last `keep_last` checkpoints up to `newest`; later ones belong to an abandoned future."""
        names = [path.name for path in self.directory.iterdir() if re.fullmatch(r"iter_\d{7,}", path.name)]
        found = {int(name.removeprefix("iter_")): self.directory / name for name in names}
        kept = sorted(iteration for iteration in found if iteration <= newest)[-self.keep_last :]
        for iteration, path in found.items():
            if iteration not in kept:
                # Renamed first: a removal that is interrupted must not look like a checkpoint.
                os.rename(path, partial_path(path))
                shutil.rmtree(partial_path(path))


def agreed(work: Callable[[], object]) -> None:
    """Run `work` on every rank; raise SaveError on all of them if the file system refused it on one. Collective."""
    refusal = None
    try:
        work()
    except OSError as error:
        refusal = str(error)
    refusals: list[str | None] = [None] * launch.world_size()
    torch.distributed.all_gather_object(refusals, refusal)
    if any(refusals):
        raise SaveError("; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(refusals) if reason))


def _on_rank_0(work: Callable[[], object]) -> Callable[[], object]:
    return work if launch.rank() == 0 else lambda: None


def _bytes(content: Any) -> bytes:
    # Serialised in memory: on a full disk torch's own writer does not raise OSError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "device": megatron_random._get_cuda_rng_state(),  # of the CPU where parallel.device is installed
        "model_parallel": megatron_random.get_cuda_rng_tracker().get_states(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    megatron_random._set_cuda_rng_state(state["device"])
    megatron_random.get_cuda_rng_tracker().set_states(state["model_parallel"])
