"""What is minimised: `L = ce_weight * L_CE + logits_weight * L_logits` (2407.14679 section 3).

Sums over tokens, never means: Megatron divides by the token count of the global batch, once, where it reduces the
gradients. The token count is an integer, the tokens whose weight is not 0; fractional weights enter the sums only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from minitron_nemo.config import DistillConfig
from minitron_nemo.distillation.balance import DYNAMIC
from minitron_nemo.kernels import LossSums, SparseTeacher, linear_kd_loss
from minitron_nemo.kernels.objective import Objective


@dataclass(frozen=True)
class DistillationObjective(Objective):
    """The weights of the losses, the divergence, and how much memory the fused loss may take."""

    chunk_bytes: int | None = None

    @staticmethod
    def from_config(config: DistillConfig) -> DistillationObjective:
        """A dynamic `ce_weight` is 0 here: `Step` sets it from step to step."""
        settings = {field.name: getattr(config, field.name) for field in fields(DistillationObjective)}
        if settings["ce_weight"] == DYNAMIC:
            settings["ce_weight"] = 0.0
        return DistillationObjective(**settings)

    @staticmethod
    def cross_entropy(chunk_bytes: int | None) -> DistillationObjective:
        """Training on labels alone: no teacher."""
        return DistillationObjective(logits_weight=0.0, ce_weight=1.0, chunk_bytes=chunk_bytes)

    @property
    def needs_teacher(self) -> bool:
        return self.logits_weight != 0.0

    def loss(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor,
        token_weights: Tensor,
        *,
        vocab_size: int,
        tp_group: torch.distributed.ProcessGroup | None,
        sequence_parallel: bool,
        sparse_teacher: SparseTeacher | None = None,
    ) -> tuple[Tensor, LossSums]:
        """The sum of the objective over one microbatch, differentiable, and its parts.

        `student_hidden` is [s, b, h_s] after the final norm ([s/tp, b, h_s] under sequence parallelism) and
        `teacher_hidden` [s, b, h_t] likewise; the weights are this rank's rows, [padded_vocab/tp, h]. `labels` and
        `token_weights` are [b, s]. `sparse_teacher`, of [s*b] tokens, stands in for the teacher's states and weight.
        Every rank of `tp_group` gets the same value.
        """
        return linear_kd_loss(
            student_hidden.flatten(0, 1),  # [s*b, h_s], the sequence outermost
            student_weight,
            None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            teacher_weight,
            labels.t().reshape(-1),  # [s*b] in the order of the states
            token_weights.t().reshape(-1),
            vocab_size=vocab_size,
            tp_group=tp_group,
            sequence_parallel=sequence_parallel,
            sparse_teacher=sparse_teacher,
            **asdict(self),
        )
