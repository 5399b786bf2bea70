"""`DistillationModel`: a student that NeMo's trainer trains with this project's loss.

    llm.train / trainer.fit -> TeacherPass -> student forward -> OutputLayer -> DistillationObjective -> one number

What it saves is the student: the context names the student's own class, and the weights are the student's alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import fiddle
import lightning.pytorch as pl
from megatron.core import parallel_state
from nemo.collections import llm
from nemo.utils.model_utils import unwrap_model
from torch import Tensor

from minitron_nemo.config import DistillConfig
from minitron_nemo.distillation.balance import Balance, check_weight
from minitron_nemo.distillation.intermediate import IntermediateLoss
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.errors import UserError
from minitron_nemo.models.output_layer import install_output_layer
from minitron_nemo.models.states import gather_sequence
from minitron_nemo.nemo.intermediate import checked_pairs, intermediate_loss
from minitron_nemo.nemo.loss import LossParts, LossReduction
from minitron_nemo.nemo.teacher import Teacher, TeacherPass


class DistillationModel(llm.GPTModel):
    """NeMo's GPTModel of `student`, trained against `teacher` with the losses of `objective`.

    `student` and `teacher` are models as `io.load_context(..., subpath="model")` gives them, without weights: the
    teacher's come from the NeMo checkpoint `teacher_path`, the student's are restored by NeMo (`AutoResume`).
    Validation measures the cross-entropy, as of NeMo's own models. Dynamic weights of the losses are measured anew
    where a training begins or goes on. Raises UserError for models of other vocabularies and for what only
    `minitron distill` does: intermediate losses between two widths, virtual pipeline stages.
    """

    def __init__(
        self,
        student: llm.GPTModel,
        teacher: llm.GPTModel,
        teacher_path: str,
        objective: DistillConfig | None = None,
        optim: Any = None,
        tokenizer: Any = None,
        model_transform: Any = None,
    ) -> None:
        super().__init__(student.config, optim or student.optim, tokenizer or student.tokenizer, model_transform)
        self.__io__ = student.__io__  # what a checkpoint's context will name
        self.optim.connect(self)  # once more, for it notes itself in `__io__`
        objective = objective or DistillConfig()
        check_weight("distill.ce_weight", objective.ce_weight)
        check_weight("distill.intermediate.alpha", objective.intermediate.alpha)
        self.vocab_size = _vocab_size(student)
        if _vocab_size(teacher) != self.vocab_size:
            raise UserError(
                f"{teacher_path}: vocab_size {_vocab_size(teacher)} is not the student's {self.vocab_size}; "
                "teacher and student must share the tokenizer"
            )
        # Losses are sums; Megatron divides by the tokens of the global batch where it reduces the gradients.
        self.config.calculate_per_token_loss = True
        self.objective = DistillationObjective.from_config(objective)
        self.intermediate: IntermediateLoss | None = None  # from the first step on
        self._intermediate = objective.intermediate
        needed = self.objective.needs_teacher
        self._pairs = checked_pairs(objective.intermediate, student, teacher) if needed else []
        self.balance = Balance(objective.ce_weight, objective.intermediate.alpha if self._pairs else 0.0)
        self._teacher_source = (teacher.config, teacher_path)
        self._teacher: Teacher | None = None
        self._taught: deque[dict[str, Any]] = deque()

    def io_init(self, **arguments: Any) -> fiddle.Config:
        """What IOMixin notes of the constructor's arguments: nothing. `__init__` puts the student's in its place."""
        return fiddle.Config(llm.GPTModel)

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build student and teacher on this rank and load the teacher. Collective."""
        if hasattr(self, "module"):
            return
        strategy = self.trainer.strategy
        if strategy.virtual_pipeline_model_parallel_size is not None:
            raise UserError(
                "trainer.strategy.virtual_pipeline_model_parallel_size: virtual stages are `minitron distill`'s; "
                "set it to null"
            )
        if getattr(strategy.ddp_config, "average_in_collective", False):
            raise UserError(
                "trainer.strategy.ddp.average_in_collective: gradients are sums, divided by the tokens of the global "
                "batch; set it to false"
            )
        if self._pairs and self.config.context_parallel_size > 1:
            raise UserError(
                "trainer.strategy.context_parallel_size: intermediate losses with context parallelism are `minitron "
                "distill`'s; set it to 1"
            )
        super().configure_model(vp_stage)
        if self.module.post_process:
            install_output_layer(self.module)
        if self.objective.needs_teacher:
            config, path = self._teacher_source
            self._teacher = Teacher(config, self.tokenizer, path, self.config, strategy)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Lightning adds these to the trainer's."""
        return [LossParts(), *([TeacherPass()] if self.objective.needs_teacher else [])]

    def teach(
        self, batches: Sequence[dict[str, Any]], sequence_length: int, micro_batch_size: int
    ) -> list[dict[str, Any]]:
        """Run the teacher on the microbatches of a step; they come back with what `begin` wants of it. Collective."""
        assert self._teacher is not None
        if self._pairs and self.intermediate is None:
            module = unwrap_model(self.module)
            self.intermediate = intermediate_loss(self._pairs, self._intermediate, module, self._teacher)
        final, states = self._teacher.states(batches, sequence_length, micro_batch_size)
        return [
            {**batch, "teacher_states": final[index] if final else None, "paired_states": states[index]}
            for index, batch in enumerate(batches)
        ]

    def begin(self, taught: Sequence[dict[str, Any]]) -> None:
        """The student's next forward passes get these microbatches of `teach`, in this order."""
        self._taught = deque(dict(batch) for batch in taught)
        if self.intermediate is not None:
            self.intermediate.begin(self.balance.weight("alpha"))

    def end(self, sums: dict[str, Tensor]) -> None:
        """Hold nothing of the teacher any more, and weigh the next step by this rank's `sums` of it. Collective."""
        self.balance.update(sums)
        if self.intermediate is not None:
            self.intermediate.let_go()

    def data_step(self, dataloader_iter: Any) -> dict[str, Any]:
        """The next microbatch of the step: one that the teacher has seen, if there is any.

        NeMo keeps `loss_mask` on the last stage alone; `token_weights` is the same on all.
        """
        if self._taught:
            taught = self._taught.popleft()
            if self.intermediate is not None:
                # Not in `training_step`: NeMo calls it on the last stage alone (lightning/megatron_parallel.py:860).
                self.intermediate.current = ({"token_weights": taught["token_weights"]}, taught["paired_states"])
            return taught
        if not self._pairs:
            given: dict[str, Any] = super().data_step(dataloader_iter)
            return given
        batch = next(dataloader_iter)
        tensors = batch[0] if isinstance(batch, tuple) else batch
        weights = tensors["loss_mask"].float().to(next(self.parameters()).device)
        return {**super().data_step(iter([batch])), "token_weights": weights}

    def training_step(self, batch: dict[str, Any], batch_idx: int | None = None) -> Tensor:
        """The objective's sum over the microbatch; on the last pipeline stage."""
        return self._loss(batch, replace(self.objective, ce_weight=self.balance.weight("ce_weight")))

    def validation_step(self, batch: dict[str, Any], batch_idx: int | None = None) -> Tensor:
        """The sum of the cross-entropy over the microbatch; on the last pipeline stage."""
        return self._loss(batch, DistillationObjective.cross_entropy(self.objective.chunk_bytes))

    @property
    def training_loss_reduction(self) -> LossReduction:
        return LossReduction()

    validation_loss_reduction = training_loss_reduction

    def _loss(self, batch: dict[str, Any], objective: DistillationObjective) -> Tensor:
        layer = unwrap_model(self.module).output_layer
        layer.head = partial(self._head, batch, objective)
        try:
            total: Tensor = self.config.forward_step_fn(self, {**batch, "labels": None})
        finally:
            layer.head = None
        return total

    def _head(self, batch: dict[str, Any], objective: DistillationObjective, hidden: Tensor, weight: Tensor) -> Tensor:
        """Leaves the parts of the loss in the batch, for the reduction."""
        states, teacher_weight = None, None
        if objective.needs_teacher and self._teacher is not None:
            states, teacher_weight = batch["teacher_states"], self._teacher.output_weight
            if not self.config.sequence_parallel:
                states = gather_sequence(states)
        tp = self.config.tensor_model_parallel_size
        total, batch["loss_sums"] = objective.loss(
            hidden,
            weight,
            states,
            teacher_weight,
            batch["labels"],
            batch["loss_mask"].float(),
            vocab_size=self.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group() if tp > 1 else None,
            sequence_parallel=self.config.sequence_parallel,
        )
        return total


def _vocab_size(model: llm.GPTModel) -> int:
    """Tokens that exist; the rows of the weights may be more."""
    size: int = model.config.vocab_size or model.tokenizer.vocab_size
    return size
