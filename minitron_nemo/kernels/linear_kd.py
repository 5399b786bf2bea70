"""Output projections of student and teacher fused with the distillation loss, vocabulary-parallel, chunk by chunk.

    hidden states, output weights -> [a chunk of tokens: fp32 logits -> row statistics -> one all-gather over TP ->
    logit gradients -> dX, dW] -> loss sums

No full logits exist. Gradients are computed in the forward pass, while a chunk's logits are at hand, and only scaled
in the backward pass: 3 student products and 1 teacher product, none repeated. Objective: 2407.14679 section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels import dense, sparse
from minitron_nemo.kernels.backend import Backend, backend
from minitron_nemo.kernels.delivery import DeliverGradients
from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.shard import Shard
from minitron_nemo.kernels.sparse import SparseTeacher
from minitron_nemo.kernels.sums import LossSums, TokenSums, check_tokens


@dataclass(frozen=True)
class Projections:
    """Checked and gathered inputs: hidden states of all tokens, output weights without their padding."""

    student_hidden: Tensor  # [tokens, h_s]
    student_weight: Tensor  # [shard.rows, h_s]
    teacher_hidden: Tensor | None  # [tokens, h_t]
    teacher_weight: Tensor | None  # [shard.rows, h_t]
    shard: Shard
    chunk_tokens: int
    backend: Backend

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Runs of tokens with both models' fp32 logits, [n, shard.rows]; the next overwrites this one's buffers."""
        count = self.student_hidden.shape[0]
        step = -(-count // max(1, -(-count // self.chunk_tokens)))  # as many chunks as the limit asks for, of one size
        size = (step, self.shard.rows)
        student_buffer = self.student_hidden.new_empty(size, dtype=torch.float32)
        teacher_buffer = None if self.teacher_hidden is None else torch.empty_like(student_buffer)
        logits = self.backend.products.logits
        for start in range(0, count, max(1, step)):
            tokens = slice(start, min(start + step, count))
            student = student_buffer[: tokens.stop - start]
            logits(self.student_hidden[tokens], self.student_weight, student)
            teacher = None
            if teacher_buffer is not None and self.teacher_hidden is not None and self.teacher_weight is not None:
                teacher = teacher_buffer[: tokens.stop - start]
                logits(self.teacher_hidden[tokens], self.teacher_weight, teacher)
            yield tokens, student, teacher


def project(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    tokens: int,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_bytes: int | None,
) -> Projections:
    """`tokens`: of the whole sequence. Without `chunk_bytes` chunks are of the device's own size.

    Raises ValueError for shapes that do not fit.
    """
    shard = Shard.of(student_weight.shape[0], vocab_size, tp_group)
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_hidden and teacher_weight: give both or neither")
    if teacher_weight is not None:
        teacher_shard = Shard.of(teacher_weight.shape[0], vocab_size, tp_group)
        if (teacher_shard.first_row, teacher_shard.rows) != (shard.first_row, shard.rows):
            raise ValueError(
                f"teacher and student hold other rows of the vocabulary on rank {shard.rank}: "
                f"{teacher_weight.shape[0]} and {student_weight.shape[0]} rows per rank; reshard_rows gives the "
                "teacher's weight the student's"
            )
        teacher_weight = teacher_weight.detach()[: shard.rows]
    if sequence_parallel:
        student_hidden = shard.gather(student_hidden)
        teacher_hidden = None if teacher_hidden is None else shard.gather(teacher_hidden)
    for name, states, weight in (
        ("student_hidden", student_hidden, student_weight),
        ("teacher_hidden", teacher_hidden, teacher_weight),
    ):
        if states is not None and weight is not None and states.shape != (tokens, weight.shape[1]):
            raise ValueError(
                f"{name}: {tuple(states.shape)}, must be {(tokens, weight.shape[1])}: as many tokens as labels, as "
                "wide as its output weight"
            )
    # Rows of the padded weight, equal on all ranks, so that every rank cuts the same chunks.
    token_bytes = 4 * student_weight.shape[0] * (1 if teacher_hidden is None else 2)
    here = backend(student_hidden.device)
    return Projections(
        student_hidden=student_hidden.detach(),
        student_weight=student_weight.detach()[: shard.rows],
        teacher_hidden=None if teacher_hidden is None else teacher_hidden.detach(),
        teacher_weight=teacher_weight,
        shard=shard,
        chunk_tokens=here.chunk_tokens if chunk_bytes is None else max(1, chunk_bytes // token_bytes),
        backend=here,
    )


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
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
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
    sparse_teacher: SparseTeacher | None = None,
) -> tuple[Tensor, LossSums]:
    """Weighted sums over tokens of divergence(student, teacher) and cross-entropy, from hidden states.

    student_hidden: [tokens, h_s]; teacher_hidden: [tokens, h_t] or None (cross-entropy alone); after the final norms.
        With `sequence_parallel` [tokens/tp, h]: rank r of `tp_group` holds the r-th run of tokens.
    student_weight, teacher_weight: this rank's rows of the output weights, [padded_vocab/tp, h], any float dtype.
        Rows from `vocab_size` on are padding and take no part; their gradient is 0.
    labels: int64 [tokens]; anything where the token's weight is 0. A label outside the vocabulary at another weight
        gives an infinite cross-entropy. token_weights: fp32 [tokens]. Both whole on every rank, in the order of the
        gathered hidden states.
    divergence: forward_kl, reverse_kl or jsd, with `jsd_beta`; formulas at `Objective`. Cross-entropy is at
        temperature 1.
    chunk_bytes: of fp32 logits of both models held at once; None: of 2048 tokens on a GPU, of 512 on a CPU.
    sparse_teacher: of as many tokens as labels, whole on every rank, instead of teacher_hidden and teacher_weight;
        anything where the token's weight is 0.

    Returns logits_weight * divergence + ce_weight * cross-entropy, a differentiable fp32 scalar, and LossSums; both
    the same on all ranks of `tp_group`. Gradients of student_hidden are summed over `tp_group`; the gradient of
    student_weight goes to its `main_grad` where it has one (see `DeliverGradients`). Tokens whose loss is not finite
    are counted in `LossSums.nonfinite`: the sums and gradients are then unusable, and the caller must say so.
    Without gradients (no_grad, or nothing requires them) no gradient work is done.

    Raises ValueError for shapes that do not fit, two teachers, unknown divergences and temperatures that are not
    positive.
    """
    objective = Objective(divergence, temperature, temperature_squared, jsd_beta, logits_weight, ce_weight)
    check_tokens(labels, token_weights)
    if sparse_teacher is not None:
        if teacher_hidden is not None or teacher_weight is not None:
            raise ValueError("sparse_teacher: teacher_hidden and teacher_weight must be None with it")
        if len(sparse_teacher) != len(labels):
            raise ValueError(f"sparse_teacher: {len(sparse_teacher)} tokens, labels has {len(labels)}")
        sparse_teacher = sparse_teacher.without(token_weights == 0)
    wants_grad = torch.is_grad_enabled()
    with torch.no_grad():
        projections = project(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            len(labels),
            vocab_size,
            tp_group,
            sequence_parallel,
            chunk_bytes,
        )
        hidden_grad = weight_grad = None
        if wants_grad and student_hidden.requires_grad:
            # One rank alone may round to what it delivers at once; parts of several, not before they are added.
            alone = projections.shard.size == 1 and student_hidden.dtype == student_weight.dtype == torch.bfloat16
            hidden_grad = torch.empty_like(projections.student_hidden, dtype=torch.bfloat16 if alone else torch.float32)
        if wants_grad and student_weight.requires_grad:
            weight_grad = torch.empty_like(student_weight, dtype=torch.float32)
            # The first chunk overwrites the vocabulary's rows; without tokens there is none.
            weight_grad[projections.shard.rows if len(labels) else 0 :].zero_()
        total, sums = _accumulate(
            projections, sparse_teacher, objective, labels, token_weights, hidden_grad, weight_grad
        )
        if hidden_grad is not None:
            hidden_grad = projections.shard.sum_hidden_grad(hidden_grad, sequence_parallel)
    if hidden_grad is None and weight_grad is None:
        return total, sums
    return DeliverGradients.apply(student_hidden, student_weight, total, hidden_grad, weight_grad), sums


def _accumulate(
    projections: Projections,
    sparse_teacher: SparseTeacher | None,
    objective: Objective,
    labels: Tensor,
    token_weights: Tensor,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> tuple[Tensor, LossSums]:
    """Loss sums of all chunks; overwrites `hidden_grad` [tokens, h_s] and `weight_grad`, [padded_vocab/tp, h_s]."""
    shard, kernels, products = projections.shard, projections.backend.rows, projections.backend.products
    losses: Any = dense if sparse_teacher is None else sparse  # the same functions, for another kind of teacher
    sums = TokenSums(token_weights)
    for tokens, student, logits in projections.chunks():
        teacher = logits if sparse_teacher is None else sparse_teacher[tokens]
        rows = losses.loss_rows(student, teacher, labels[tokens], shard, objective, kernels)
        sums.add(tokens, rows)
        if hidden_grad is None and weight_grad is None:
            continue
        losses.logit_gradients(student, teacher, labels[tokens], token_weights[tokens], rows, shard, objective, kernels)
        products.gradients(
            student,
            logits,
            projections.student_hidden[tokens],
            projections.student_weight,
            None if hidden_grad is None else hidden_grad[tokens],
            None if weight_grad is None else weight_grad[: shard.rows],
            accumulate=tokens.start > 0,
        )
    return sums.total(objective)
