"""The distillation loss for callers that already hold vocabulary-parallel logits.

    logits -> [a block of tokens: row statistics -> one all-gather over TP -> gradients, over the student's logits]

Kernels that read logits of any dtype get all tokens as one block, where they are. For the others a block is copied into
two fp32 buffers of 8 MiB each (at least one token), its -inf made finite: callers mask with it.

Where linear_kd_loss can be used it is better, not only leaner: logits that were rounded to bf16 before they came here
have lost up to 22% of the gradient of a student near its teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels import dense, sparse
from minitron_nemo.kernels.backend import backend
from minitron_nemo.kernels.delivery import DeliverGradients
from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.rows import Rows
from minitron_nemo.kernels.shard import Shard
from minitron_nemo.kernels.sparse import SparseTeacher
from minitron_nemo.kernels.sums import LossSums, TokenSums, check_tokens

_BUFFER_BYTES = 8 * 1024**2  # of one model's fp32 logits
# In place of -inf: its exponential is 0, its difference from another such logit 0, its quotient by T finite. A loss
# that it dominates is infinite: some token is impossible for one model and possible for the other.
_LEAST_LOGIT = -1e37
_INFINITE = 1e10

_Rows = TypeVar("_Rows", bound=Rows)


def logits_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    *,
    vocab_size: int,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    jsd_beta: float = 0.5,
    logits_weight: float = 1.0,
    ce_weight: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    sparse_teacher: SparseTeacher | None = None,
) -> tuple[Tensor, LossSums]:
    """Weighted sums over tokens of divergence(student, teacher) and cross-entropy, from logits.

    student_logits, teacher_logits: this rank's columns, [tokens, padded_vocab/tp], any float dtype; no teacher:
        cross-entropy alone, or `sparse_teacher`. Columns from `vocab_size` on are padding and take no part; their
        gradient is 0. Columns of the vocabulary may be -inf; where the teacher has mass and the student none (reverse
        KL: the other way round) the loss is infinite.
    The other arguments and the results are those of `linear_kd_loss`.

    When gradients are wanted, the storage of `student_logits` becomes the gradient's, in its dtype: the logits are gone
    after this call. The product that made them does not need them for its backward pass, and autograd refuses the
    backward pass of any operation that does. Otherwise, and always for the teacher's, logits stay as they are.
    Where a token's loss is not finite (`LossSums.nonfinite`) the gradients are unusable.

    Raises ValueError for shapes that do not fit, two teachers, unknown divergences and temperatures that are not
    positive.
    """
    objective = Objective(divergence, temperature, temperature_squared, jsd_beta, logits_weight, ce_weight)
    check_tokens(labels, token_weights)
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits is not None and (logits.dim() != 2 or len(logits) != len(labels)):
            raise ValueError(f"{name}: {tuple(logits.shape)}, must be [{len(labels)}, vocabulary/tp] as labels has it")
    if sparse_teacher is not None:
        if teacher_logits is not None:
            raise ValueError("sparse_teacher: teacher_logits must be None with it")
        if len(sparse_teacher) != len(labels):
            raise ValueError(f"sparse_teacher: {len(sparse_teacher)} tokens, labels has {len(labels)}")
        sparse_teacher = sparse_teacher.without(token_weights == 0)
    shard = Shard.of(student_logits.shape[1], vocab_size, tp_group)
    if teacher_logits is not None:
        teacher_shard = Shard.of(teacher_logits.shape[1], vocab_size, tp_group)
        if (teacher_shard.first_row, teacher_shard.rows) != (shard.first_row, shard.rows):
            raise ValueError(
                f"teacher_logits: {teacher_logits.shape[1]} columns per rank hold another part of the vocabulary than "
                f"the student's {student_logits.shape[1]}; reshard_rows gives the teacher's weight the student's rows"
            )
    wants_grad = torch.is_grad_enabled() and student_logits.requires_grad
    with torch.no_grad():
        total, sums = _accumulate(
            student_logits.detach(),
            None if teacher_logits is None else teacher_logits.detach()[:, : shard.rows],
            sparse_teacher,
            labels,
            token_weights,
            shard,
            objective,
            wants_grad,
        )
    if not wants_grad:
        return total, sums
    return DeliverGradients.apply(student_logits, None, total, student_logits.detach(), None), sums


def _accumulate(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    sparse_teacher: SparseTeacher | None,
    labels: Tensor,
    token_weights: Tensor,
    shard: Shard,
    objective: Objective,
    wants_grad: bool,
) -> tuple[Tensor, LossSums]:
    """Loss sums of all tokens; with `wants_grad` the gradient is in `student_logits` afterwards."""
    chosen = backend(student_logits.device)
    copied = sparse_teacher is not None or not chosen.any_dtype  # a sparse teacher's entries are written into buffers
    losses: Any = dense if sparse_teacher is None else sparse
    sums = TokenSums(token_weights)
    columns = student_logits[:, : shard.rows]
    # Blocks of padded rows: the same number on all ranks.
    step = _BUFFER_BYTES // (4 * student_logits.shape[1]) if copied else len(labels)
    for tokens, student, logits in _blocks(columns, teacher_logits, max(1, step), copied, objective):
        teacher = logits if sparse_teacher is None else sparse_teacher[tokens]
        rows = losses.loss_rows(student, teacher, labels[tokens], shard, objective, chosen.rows)
        sums.add(tokens, _not_finite(rows))
        if not wants_grad:
            continue
        losses.logit_gradients(
            student, teacher, labels[tokens], token_weights[tokens], rows, shard, objective, chosen.rows
        )
        if copied:
            columns[tokens] = student
    if wants_grad:
        student_logits[:, shard.rows :] = 0
    return sums.total(objective)


def _blocks(
    student: Tensor, teacher: Tensor | None, step: int, copied: bool, objective: Objective
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Runs of tokens with both models' logits: views, or fp32 copies that the next ones overwrite."""
    count = student.shape[0]
    size = (min(step, count), student.shape[1])
    student_buffer = student.new_empty(size, dtype=torch.float32) if copied else None
    teacher_buffer = torch.empty_like(student_buffer) if student_buffer is not None and teacher is not None else None
    least = _LEAST_LOGIT * min(1.0, objective.temperature)
    for start in range(0, count, step):
        tokens = slice(start, min(start + step, count))
        block = _block(student[tokens], student_buffer, least)
        yield tokens, block, None if teacher is None else _block(teacher[tokens], teacher_buffer, least)


def _block(logits: Tensor, buffer: Tensor | None, least: float) -> Tensor:
    return logits if buffer is None else buffer[: len(logits)].copy_(logits).clamp_min_(least)


def _not_finite(rows: _Rows) -> _Rows:
    """With losses infinite that are so large only because a -inf was made finite; NaN for students without a logit."""
    undefined = rows.student_scale.isnan()

    def flagged(loss: Tensor) -> Tensor:
        return loss.masked_fill(loss > _INFINITE, float("inf")).masked_fill(undefined, float("nan"))

    return replace(rows, ce=flagged(rows.ce), divergence=None if rows.divergence is None else flagged(rows.divergence))
