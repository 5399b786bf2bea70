"""A job of NeMo's trainer on the CPU, started by torchrun: `python -m tests.nemo.nemo_job JOB SETTINGS.json`.

Jobs: `train` (llm_distill), `score` (llm.validate with ImportanceScores). Rank 0 writes what was logged.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning import io
from nemo.lightning.pytorch.optim import MegatronOptimizerModule
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader

from minitron_nemo.config import DistillConfig, IntermediateConfig
from minitron_nemo.nemo import ImportanceScores, llm_distill
from tests.nemo import trainer_shims


class Samples(pl.LightningDataModule):
    """Given samples in their order, as NeMo's GPT datasets give them: with a mask of what attention must not see."""

    def __init__(self, samples: list[dict[str, torch.Tensor]], micro_batch_size: int, global_batch_size: int) -> None:
        super().__init__()
        length = len(samples[0]["tokens"])
        mask = torch.ones(1, length, length).triu(1).bool()
        self.samples = [{**sample, "attention_mask": mask} for sample in samples]
        self.tokenizer: Any = None
        self.seq_length, self.micro_batch_size, self.global_batch_size = length, micro_batch_size, global_batch_size
        self.data_sampler = MegatronDataSampler(
            seq_len=length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.samples)


def main(job: str, settings: dict[str, Any]) -> None:
    trainer_shims.install()
    samples = torch.load(settings["samples"], weights_only=True)
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=settings["processes"],
        max_steps=1,
        limit_val_batches=len(samples) if job == "score" else 0,  # counts microbatches
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_checkpointing=False,  # NeMoLogger adds its own
        callbacks=[],
        plugins=nl.MegatronMixedPrecision(precision=settings["precision"], params_dtype=torch.float32),
        strategy=nl.MegatronStrategy(ckpt_async_save=False, **settings["layout"]),  # asynchronously by forks on CUDA
    )
    data = Samples(samples, 1, len(samples))
    resume = nl.AutoResume(restore_config=nl.RestoreConfig(path=settings["student"]))
    log = nl.NeMoLogger(
        name="job",
        log_dir=settings["log_dir"],
        use_datetime_version=False,
        ckpt=nl.ModelCheckpoint(save_last=True, every_n_train_steps=1, save_top_k=0),
    )
    if job == "train":
        # Adam's first step is lr * g / (|g| + eps), so with this eps it changes a weight by its gradient.
        optim = MegatronOptimizerModule(
            OptimizerConfig(
                optimizer="adam",
                lr=1e8,
                adam_eps=1e8,
                clip_grad=0.0,
                weight_decay=0.0,
                use_distributed_optimizer=True,
            )
        )
        intermediate = IntermediateConfig(**settings["intermediate"])
        objective = DistillConfig(**settings["objective"], intermediate=intermediate)
        llm_distill(settings["student"], settings["teacher"], data, trainer, objective, log, resume, optim)
    else:
        model = io.load_context(Path(settings["student"]) / "context", subpath="model")
        trainer.callbacks.append(ImportanceScores(settings["scores"], settings["student"]))
        llm.validate(model, data, trainer, log=log, resume=resume, tokenizer="model")
    if trainer.global_rank == 0:
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        Path(settings["metrics"]).write_text(json.dumps(logged))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
