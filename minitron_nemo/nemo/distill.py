"""`nemo minitron llm_distill`: `nemo llm distill` with this project's losses, in NeMo's trainer."""

from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import nemo_run as run
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning import io
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

from minitron_nemo.config import DistillConfig
from minitron_nemo.errors import UserError
from minitron_nemo.nemo.cli import NAMESPACE
from minitron_nemo.nemo.model import DistillationModel


@run.cli.entrypoint(namespace=NAMESPACE)
def llm_distill(
    student_model_path: str,
    teacher_model_path: str,
    data: pl.LightningDataModule,
    trainer: nl.Trainer,
    objective: Annotated[DistillConfig | None, run.Config[DistillConfig]] = None,
    log: Annotated[nl.NeMoLogger | None, run.Config[nl.NeMoLogger]] = None,
    resume: Annotated[nl.AutoResume | None, run.Config[nl.AutoResume]] = None,
    optim: nl.OptimizerModule | None = None,
) -> Path:
    """Train a student against its teacher with this project's loss, in NeMo's trainer. Both are NeMo checkpoints."""
    model = DistillationModel(
        _model(student_model_path), _model(teacher_model_path), teacher_model_path, objective=objective
    )
    resume = resume or nl.AutoResume()
    resume.restore_config = resume.restore_config or nl.RestoreConfig(path=student_model_path)
    return llm.train(model, data, trainer, log=log, resume=resume, optim=optim, tokenizer="model")


def _model(path: str) -> llm.GPTModel:
    model: Any = io.load_context(ckpt_to_context_subdir(path), subpath="model")
    if not isinstance(model, llm.GPTModel):
        raise UserError(f"{path}: a {type(model).__name__} is no llm.GPTModel")
    return model
