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

from minitron_nemo.kernels import rows as row_kernels
from minitron_nemo.kernels.products import Products, products
from minitron_nemo.kernels.rows import Objective

CHUNK_BYTES = 256 * 1024**2

# Renamed in torch 2.13; the containers of NVIDIA carry older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, never means; detached scalars, the same on all ranks of `tp_group`."""

    logits: Tensor  # fp32: weight * divergence, times temperature^2 where asked; 0 without a teacher
    ce: Tensor  # fp32: weight * cross-entropy
    tokens: Tensor  # int64: tokens whose weight is not 0
    weight: Tensor  # fp32: sum of weights


@dataclass(frozen=True)
class _Shard:
    """This rank's part of the vocabulary."""

    group: dist.ProcessGroup | None
    size: int
    rank: int
    first_row: int  # of the vocabulary
    rows: int  # without the padding

    @staticmethod
    def of(weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> _Shard:
        size = 1 if group is None else group.size()
        rank = 0 if group is None else group.rank()
        if weight.shape[0] * size < vocab_size:
            raise ValueError(f"output weight holds {weight.shape[0] * size} rows, vocab_size is {vocab_size}")
        first_row = rank * weight.shape[0]
        return _Shard(group, size, rank, first_row, min(weight.shape[0], max(0, vocab_size - first_row)))

    def gather(self, tensor: Tensor) -> Tensor:
        """[n, k] of each rank -> [tp * n, k] on every rank, in rank order."""
        if self.size == 1:
            return tensor
        gathered = tensor.new_empty(self.size * tensor.shape[0], tensor.shape[1])
        _all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def sum_hidden_grad(self, grad: Tensor, sequence_parallel: bool) -> Tensor:
        """Sum of all ranks' [tokens, h]: whole on every rank, or [tokens/tp, h] of each with sequence parallelism."""
        if self.size == 1:
            return grad
        if not sequence_parallel:
            dist.all_reduce(grad, group=self.group)
            return grad
        part = grad.new_empty(grad.shape[0] // self.size, grad.shape[1])
        _reduce_scatter(part, grad, group=self.group)
        return part


@dataclass(frozen=True)
class _Projections:
    """Checked and gathered inputs: hidden states of all tokens, output weights without their padding."""

    student_hidden: Tensor  # [tokens, h_s]
    student_weight: Tensor  # [shard.rows, h_s]
    teacher_hidden: Tensor | None  # [tokens, h_t]
    teacher_weight: Tensor | None  # [shard.rows, h_t]
    labels: Tensor  # [tokens], in this shard's numbering
    shard: _Shard
    chunk_tokens: int
    products: Products

    def chunks(self, objective: Objective, track_best: bool = False) -> Iterator[_Chunk]:
        """Logits and statistics chunk by chunk; the next chunk overwrites this one's buffers."""
        count = self.student_hidden.shape[0]
        size = (min(count, self.chunk_tokens), self.shard.rows)
        student_buffer = self.student_hidden.new_empty(size, dtype=torch.float32)
        teacher_buffer = None if self.teacher_hidden is None else torch.empty_like(student_buffer)
        for start in range(0, count, self.chunk_tokens):
            tokens = slice(start, min(start + self.chunk_tokens, count))
            student = student_buffer[: tokens.stop - start]
            self.products.logits(self.student_hidden[tokens], self.student_weight, student)
            teacher = None
            if teacher_buffer is not None and self.teacher_hidden is not None and self.teacher_weight is not None:
                teacher = teacher_buffer[: tokens.stop - start]
                self.products.logits(self.teacher_hidden[tokens], self.teacher_weight, teacher)
            statistics = row_kernels.shard_statistics(
                student,
                teacher,
                self.labels[tokens],
                self.shard.first_row if track_best else None,
                objective,
                self.products.row_block_bytes,
            )
            shards = self.shard.gather(statistics).view(self.shard.size, *statistics.shape)
            yield _Chunk(tokens, student, teacher, shards)


@dataclass(frozen=True)
class _Chunk:
    """A run of tokens, its buffers as `shard_statistics` left them, and the statistics of all shards."""

    tokens: slice
    student: Tensor  # [n, shard.rows] fp32
    teacher: Tensor | None
    statistics: Tensor  # [tp, n, columns] fp32


def _project(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_bytes: int,
) -> _Projections:
    shard = _Shard.of(student_weight, vocab_size, tp_group)
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_hidden and teacher_weight: give both or neither")
    if teacher_weight is not None:
        if _Shard.of(teacher_weight, vocab_size, tp_group).first_row != shard.first_row:
            raise ValueError(
                f"teacher and student hold other rows of the vocabulary on rank {shard.rank}: "
                f"{teacher_weight.shape[0]} and {student_weight.shape[0]} rows per rank"
            )
        teacher_weight = teacher_weight.detach()[: shard.rows]
    if sequence_parallel:
        student_hidden = shard.gather(student_hidden)
        teacher_hidden = None if teacher_hidden is None else shard.gather(teacher_hidden)
    for name, count in (("labels", labels), ("teacher_hidden", teacher_hidden)):
        if count is not None and count.shape[0] != student_hidden.shape[0]:
            raise ValueError(f"{name}: {count.shape[0]} tokens, student_hidden has {student_hidden.shape[0]}")
    # Rows of the padded weight, equal on all ranks, so that every rank cuts the same chunks.
    token_bytes = 4 * student_weight.shape[0] * (1 if teacher_hidden is None else 2)
    return _Projections(
        student_hidden=student_hidden.detach(),
        student_weight=student_weight.detach()[: shard.rows],
        teacher_hidden=None if teacher_hidden is None else teacher_hidden.detach(),
        teacher_weight=teacher_weight,
        labels=labels - shard.first_row,
        shard=shard,
        chunk_tokens=max(1, chunk_bytes // token_bytes),
        products=products(student_hidden.device),
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
    logits_weight: float = 1.0,
    ce_weight: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, LossSums]:
    """Weighted sums over tokens of divergence(student, teacher) and cross-entropy, from hidden states.

    student_hidden: [tokens, h_s]; teacher_hidden: [tokens, h_t] or None (cross-entropy alone); after the final norms.
        With `sequence_parallel` [tokens/tp, h]: rank r of `tp_group` holds the r-th run of tokens.
    student_weight, teacher_weight: this rank's rows of the output weights, [padded_vocab/tp, h], any float dtype.
        Rows from `vocab_size` on are padding and take no part; their gradient is 0.
    labels: int64 [tokens]; anything where the token's weight is 0. A label outside the vocabulary at another weight
        gives an infinite cross-entropy. token_weights: fp32 [tokens]. Both whole on every rank, in the order of the
        gathered hidden states.
    divergence: forward_kl = KL(teacher || student), reverse_kl = KL(student || teacher), of softmax(logits /
        temperature), times temperature^2 with `temperature_squared` (1503.02531 section 2). Cross-entropy is at
        temperature 1.
    chunk_bytes: of fp32 logits of both models held at once.

    Returns logits_weight * divergence + ce_weight * cross-entropy, a differentiable fp32 scalar, and LossSums; both
    the same on all ranks of `tp_group`. Gradients of student_hidden are summed over `tp_group`. The gradient of
    student_weight is added to `student_weight.main_grad` where that exists, `grad_added_to_main_grad` is set, and the
    gradient autograd sees is zero: Megatron's DDP hook then fires, and drops it, or, with `zero_out_wgrad` (set by
    Megatron on an embedding that is also the output weight on one stage), adds what the embedding contributed.
    Without gradients (no_grad, or nothing requires them) no gradient work is done.

    Raises ValueError for shapes that do not fit, unknown divergences and temperatures that are not positive.
    """
    objective = Objective(divergence, temperature, temperature_squared, logits_weight, ce_weight)
    with torch.no_grad():
        projections = _project(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            vocab_size,
            tp_group,
            sequence_parallel,
            chunk_bytes,
        )
    wants_grad = torch.is_grad_enabled()
    with torch.no_grad():
        hidden_grad = weight_grad = None
        if wants_grad and student_hidden.requires_grad:
            hidden_grad = torch.empty_like(projections.student_hidden, dtype=torch.float32)
        if wants_grad and student_weight.requires_grad:
            weight_grad = torch.zeros_like(student_weight, dtype=torch.float32)
        total, sums = _accumulate(projections, objective, token_weights, hidden_grad, weight_grad)
        if hidden_grad is not None:
            hidden_grad = projections.shard.sum_hidden_grad(hidden_grad, sequence_parallel)
    if hidden_grad is None and weight_grad is None:
        return total, sums
    return _DeliverGradients.apply(student_hidden, student_weight, total, hidden_grad, weight_grad), sums


def _accumulate(
    projections: _Projections,
    objective: Objective,
    token_weights: Tensor,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> tuple[Tensor, LossSums]:
    """Loss sums of all chunks; overwrites `hidden_grad` [tokens, h_s], adds to `weight_grad` [padded_vocab/tp, h_s]."""
    counted = token_weights != 0
    divergence, ce = token_weights.new_zeros(2, dtype=torch.float64)
    for chunk in projections.chunks(objective):
        tokens = chunk.tokens
        rows = row_kernels.merge(chunk.statistics, projections.shard.rank, objective)
        ce += _weighted_sum(rows.ce, token_weights[tokens], counted[tokens])
        if rows.divergence is not None:
            divergence += _weighted_sum(rows.divergence, token_weights[tokens], counted[tokens])
        if hidden_grad is None and weight_grad is None:
            continue
        row_kernels.logit_gradients(
            chunk.student,
            chunk.teacher,
            projections.labels[tokens],
            token_weights[tokens],
            rows,
            objective,
            projections.products.row_block_bytes,
        )
        projections.products.gradients(
            chunk.student,
            chunk.teacher,
            projections.student_hidden[tokens],
            projections.student_weight,
            None if hidden_grad is None else hidden_grad[tokens],
            None if weight_grad is None else weight_grad[: projections.shard.rows],
        )
    divergence *= objective.divergence_scale
    total = objective.logits_weight * divergence
    if objective.ce_weight:
        total = total + objective.ce_weight * ce
    return total.float(), LossSums(divergence.float(), ce.float(), counted.sum(), token_weights.sum())


def _weighted_sum(values: Tensor, weights: Tensor, counted: Tensor) -> Tensor:
    """Values of uncounted tokens may be infinite: they are left out, not multiplied by 0."""
    return torch.where(counted, values * weights, 0.0).sum()


class _DeliverGradients(torch.autograd.Function):
    """The loss as a function of hidden states and weight, its gradients already known up to the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        total: Tensor,
        hidden_grad: Tensor | None,
        weight_grad: Tensor | None,
    ) -> Tensor:
        ctx.hidden_dtype, ctx.weight = hidden.dtype, weight
        ctx.gradients = hidden_grad, weight_grad
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_kd_loss: backward a second time; its gradients are released by the first")
        hidden_grad, weight_grad = ctx.gradients
        weight, ctx.gradients, ctx.weight = ctx.weight, None, None
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(upstream).to(ctx.hidden_dtype)
        if weight_grad is not None:
            weight_grad = _deliver_weight_grad(weight, weight_grad.mul_(upstream))
        return hidden_grad, weight_grad, None, None, None


def _deliver_weight_grad(weight: Tensor, grad: Tensor) -> Tensor:
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad.to(weight.dtype)
    main_grad.add_(grad)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight)


def token_statistics(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token, without gradients: cross-entropy fp64, KL(teacher || student) fp64, same most likely token bool.

    Inputs as for `linear_kd_loss`; the results, [tokens] each, are the same on all ranks of `tp_group`.
    """
    objective = Objective()
    with torch.no_grad():
        projections = _project(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            vocab_size,
            tp_group,
            sequence_parallel,
            chunk_bytes,
        )
        parts = []
        for chunk in projections.chunks(objective, track_best=True):
            rows = row_kernels.merge(chunk.statistics, projections.shard.rank, objective)
            assert rows.divergence is not None
            parts.append((rows.ce, rows.divergence, row_kernels.agreement(chunk.statistics)))
        ce, divergence, agree = (torch.cat(part) for part in zip(*parts, strict=True))
    return ce, divergence, agree
