"""Training checkpoints: everything an interrupted run needs to go on as if it had not been interrupted.

    DIR/iter_0000010/                  torch_dist: model, optimizer (main parameters, moments), common.pt
                     training.json     iteration, data position, skipped updates, settings, layout
                     random_00003.pt   random state of rank 3, used again on the same layout only
                     checksums.json    sizes and checksums of the files above

Which of them there are, and which are loaded, is for `checkpoints` to say.

A save is collective and can fail on any rank at any byte. Every part of it reports its outcome to all ranks before
the next begins, so they agree: either the tracker names the new checkpoint, or the partial one is removed on all and
`SaveError` is raised on all. The files are written while training goes on (`background`); the ranks agree on them, and
rank 0 begins to publish the checkpoint, when all of them are found to have finished: at a later update, or by waiting.

A load checks every file before Megatron sees one: where a rank fails in Megatron's loader, the others wait for it.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.core import save_config as save_backend_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import _replace_state_dict_keys_with_sharded_keys
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import random as megatron_random

from minitron_nemo.checkpoint.files import commit_partial, make_partial, partial_path, write_atomic
from minitron_nemo.checkpoint.safe_pickle import check_metadata
from minitron_nemo.distillation.background import BackgroundWrite, Part, Task
from minitron_nemo.distillation.checkpoints import Checkpoints, damage, iteration_of
from minitron_nemo.distillation.integrity import checksum, write_checksums
from minitron_nemo.distillation.intermediate import IntermediateLoss
from minitron_nemo.errors import UserError
from minitron_nemo.models.build import Model
from minitron_nemo.models.checkpoint import sharded_states
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device

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


class Resumed(NamedTuple):
    """What a checkpoint says beside tensors; `damaged` says what is wrong with newer ones that were passed over."""

    iteration: int
    data: dict[str, Any]
    skips: dict[str, Any]
    balance: dict[str, Any]
    damaged: list[str]


class Saved(NamedTuple):
    """A published checkpoint: how long training stood still for it, and how long its files took meanwhile."""

    iteration: int
    stall_seconds: float
    write_seconds: float


@dataclass
class _Pending:
    """A save under way: first every rank writes, then rank 0 publishes."""

    iteration: int
    training: dict[str, Any]
    common: bytes
    write: BackgroundWrite
    stall_seconds: float
    write_seconds: float = 0.0
    publishing: Task[object] | None = None


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
        self.checkpoints = Checkpoints(directory, keep_last)
        self.student = student
        self.optimizer = optimizer
        self.settings = dict(settings)
        self.intermediate = intermediate
        self._pending: _Pending | None = None

    def save(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Take the state after update `iteration` and begin to write it; `finish` an earlier save first. Collective.

        `state` has what is no tensor: `data`, `skips` and `balance`, which `Resumed` brings back.
        When this returns, training may change the state. Raises SaveError on all ranks if any cannot begin.
        """
        assert self._pending is None, "the checkpoint before is not finished"
        start = time.perf_counter()
        final = self.checkpoints.of(iteration)
        training = {
            "schema_version": SCHEMA_VERSION,
            "iteration": iteration,
            **state,
            "settings": self.settings,
            **self._layout(),
        }
        try:
            agreed(_on_rank_0(lambda: make_partial(final)))
        except SaveError as error:
            raise self._discard(final, error) from None
        by_key, common = self._tensors()
        random_state = {f"random_{launch.rank():05d}.pt": _bytes(_random_state())}
        write = BackgroundWrite(partial_path(final), by_key, random_state)
        self._pending = _Pending(iteration, training, _bytes(common), write, time.perf_counter() - start)

    def poll(self) -> Saved | None:
        """Bring the save under way one stage further if every rank is ready; what was published, if that ends it.

        Collective where a save is under way. Raises SaveError as `finish` does.
        """
        pending = self._pending
        if pending is None:
            return None
        ready = torch.tensor((pending.publishing or pending.write.task).finished(), dtype=torch.int32)
        ready = ready.to(current_device())
        torch.distributed.all_reduce(ready, torch.distributed.ReduceOp.MIN)
        if not ready.item():
            return None
        return self._advance(pending)

    def finish(self) -> Saved | None:
        """Wait for the last save until it is published; None if there is none. Collective.

        Raises SaveError on all ranks, and removes the partial checkpoint, if any rank could not write its part.
        """
        saved = None
        while self._pending is not None:
            saved = self._advance(self._pending)
        return saved

    def _advance(self, pending: _Pending) -> Saved | None:
        """Wait for the present stage, let all ranks agree on it, begin the next; what was published after the last."""
        start = time.perf_counter()
        final = self.checkpoints.of(pending.iteration)
        stage: Task[Any] = pending.publishing or pending.write.task
        results: list[Any] = []
        try:
            agreed(lambda: results.append(stage.join()))
        except SaveError as error:
            self._pending = None
            raise self._discard(final, error) from None
        if pending.publishing is None:
            self._begin_publishing(final, pending, results[0])
        else:
            self._pending = None
        pending.stall_seconds += time.perf_counter() - start
        if self._pending is not None:
            return None
        return Saved(pending.iteration, pending.stall_seconds, pending.write_seconds)

    def _begin_publishing(self, final: Path, pending: _Pending, written: Part) -> None:
        parts: list[Any] = [None] * launch.world_size()
        torch.distributed.gather_object(written, parts if launch.rank() == 0 else None)
        pending.write_seconds = written.seconds
        pending.publishing = Task(_on_rank_0(lambda: self._publish(final, pending, parts)), f"publish {final.name}")

    def abandon(self) -> None:
        """After an error: wait until this rank writes no more. What was begun is a leftover for the next start."""
        if self._pending is not None:
            (self._pending.publishing or self._pending.write.task).wait()

    def resume(self) -> Resumed | None:
        """Load the latest whole checkpoint into model and optimizer; None if there is none.

        Removes what a killed save left. A checkpoint that is damaged is passed over for the one before, and stays.
        Collective. Raises UserError for a checkpoint of a run with other settings, or where all are damaged.
        """
        agreed(_on_rank_0(self.checkpoints.clean))
        found = self.checkpoints.candidates()
        damaged: list[str] = []
        for directory in found:
            problem = damage(directory)
            if problem is None:
                return self._load(directory)._replace(damaged=damaged)
            damaged.append(problem)
        if found:
            raise UserError(
                f"{'; '.join(damaged)}; no other checkpoint is left: remove {self.checkpoints.directory} to start over"
            )
        return None

    def roll_back(self, before: int | None) -> Resumed | None:
        """Load the latest whole checkpoint that was not saved amid skipped updates; None if there is none.

        `before`: and is older than this iteration. Nothing may be pending. Collective.
        """
        damaged = []
        for directory in self.checkpoints.candidates():
            if before is not None and iteration_of(directory) >= before:
                continue
            if problem := damage(directory):
                damaged.append(problem)
            elif not self._training(directory)["skips"]["in_a_row"]:
                return self._load(directory)._replace(damaged=damaged)
        return None

    def _tensors(self) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """This rank's sharded tensors and objects by their keys, and what is the same on all ranks and not a tensor."""
        model_state = self._model_state()
        optimizer_state = self.optimizer.sharded_state_dict(model_state, metadata=SHARDING)
        if optimizer_state["param_state"] is None:  # not the first data-parallel rank
            del optimizer_state["param_state"]
        sharded, common = save_preprocess({**model_state, "optimizer": optimizer_state})
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        return by_key, common

    def _publish(self, final: Path, pending: _Pending, parts: list[Part]) -> None:
        """On rank 0: the files that belong to no rank, the directory's final name, the tracker."""
        partial = partial_path(final)
        assert pending.write.metadata is not None
        pending.write.writer.finish(pending.write.metadata, [part.results for part in parts])
        write_atomic(partial / "common.pt", pending.common)
        write_atomic(partial / TRAINING, json.dumps(pending.training, indent=2) + "\n")
        save_backend_config(CheckpointingConfig("torch_dist", 1), str(partial))
        files = {name: figures for part in parts for name, figures in part.files.items()}
        files |= {path.name: checksum(path) for path in partial.iterdir() if path.name not in files}
        write_checksums(partial, files)
        commit_partial(final)
        self.checkpoints.published(pending.iteration)

    def _discard(self, final: Path, error: SaveError) -> SaveError:
        agreed(_on_rank_0(lambda: shutil.rmtree(partial_path(final), ignore_errors=True)))
        return SaveError(f"the checkpoint after update {iteration_of(final)} could not be written: {error}")

    def _load(self, found: Path) -> Resumed:
        training = self._training(found)
        self._check_settings(found / TRAINING, training)
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
        return Resumed(training["iteration"], training["data"], training["skips"], training["balance"], [])

    def _model_state(self) -> dict[str, Any]:
        state = {f"model{index}": chunk for index, chunk in enumerate(sharded_states(self.student))}
        return state if self.intermediate is None else state | {"intermediate": self.intermediate.sharded_state_dict()}

    def _layout(self) -> dict[str, Any]:
        return {"layout": asdict(self.student.layout), "world_size": launch.world_size()}

    def _training(self, directory: Path) -> dict[str, Any]:
        """`training.json` of a checkpoint that is not damaged. Collective."""
        return launch.from_rank_0(lambda: json.loads((directory / TRAINING).read_text()))

    def _check_settings(self, path: Path, training: Mapping[str, Any]) -> None:
        """Raise UserError unless a run with this one's settings wrote the checkpoint."""
        if training.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{path}: schema_version {training.get('schema_version')} is not {SCHEMA_VERSION}")
        saved = training["settings"]
        for key in sorted(saved.keys() | self.settings.keys()):
            if saved.get(key) != self.settings.get(key):
                raise UserError(
                    f"{path}: {key} was {saved.get(key)!r} when this run was interrupted and is "
                    f"{self.settings.get(key)!r} now; restore it, or remove {self.checkpoints.directory} to start over"
                )


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
