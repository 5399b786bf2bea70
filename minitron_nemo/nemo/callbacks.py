"""Importance collected while NeMo validates a model: the hooks of `importance/`, NeMo's data and schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from nemo.lightning import io
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.utils.model_utils import unwrap_model
from torch import Tensor, distributed

from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.errors import UserError
from minitron_nemo.importance.collect import Collector


class ImportanceScores(pl.Callback, io.IOMixin):
    """Scores every axis of the model that `llm.validate` runs and writes them to `path`, for `prune.scores`.

    `checkpoint` is the NeMo checkpoint that is validated: its context gives the sizes, its weights the fingerprint.
    Tokens whose `loss_mask` is 0 do not count. Any tensor and pipeline layout; raises UserError for virtual pipeline
    stages and context parallelism. It does nothing in the validations of a training.
    """

    def __init__(self, path: str, checkpoint: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.checkpoint = Path(checkpoint)
        self._step: list[dict[str, Tensor]] = []  # the microbatches of the current step
        self._seen: list[dict[str, Tensor]] = []  # those of all steps
        self._data = hashlib.sha256()
        self._collector: Collector | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.VALIDATING:
            return
        config = pl_module.config
        for name in ("virtual_pipeline_model_parallel_size", "context_parallel_size"):
            if (getattr(config, name) or 1) > 1:
                raise UserError(
                    f"trainer.strategy.{name}: {getattr(config, name)} is not supported while scoring; use 1"
                )
        self._collector = Collector(
            [unwrap_model(chunk.module) for chunk in trainer.strategy.megatron_parallel],
            open_source(self.checkpoint).architecture,
            self._step,
            sequence_parallel=config.sequence_parallel,
            on_microbatch=lambda: None,
        )
        self._device = next(pl_module.parameters()).device
        self._data_step, config.data_step_fn = config.data_step_fn, self._read
        self._collector.__enter__()

    def on_megatron_step_start(self, step: MegatronStep) -> None:
        # The schedule numbers the microbatches of every step from 0.
        self._seen += self._step
        self._step.clear()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._collector is None:
            return
        self._collector.__exit__()
        pl_module.config.data_step_fn = self._data_step
        self._collector.microbatches = [*self._seen, *self._step]
        digests: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(digests, self._data.hexdigest())
        scores = self._collector.scores(
            model_fingerprint=fingerprint(self.checkpoint) if distributed.get_rank() == 0 else "",
            data_fingerprint=hashlib.sha256(" ".join(sorted(set(digests))).encode()).hexdigest(),
            settings={"precision": str(pl_module.config.params_dtype).removeprefix("torch.")},
        )
        if distributed.get_rank() == 0:
            scores.save(self.path)
        self._collector = None

    def _read(self, batches: Iterator[Any]) -> dict[str, Any]:
        """The next microbatch by the model's own `data_step_fn`, which keeps `loss_mask` on the last stage alone."""
        batch = next(batches)
        tensors = batch[0] if isinstance(batch, tuple) else batch
        self._step.append({"token_weights": tensors["loss_mask"].float().to(self._device)})
        self._data.update(tensors["tokens"].cpu().numpy().tobytes())
        return self._data_step(iter([batch]))
