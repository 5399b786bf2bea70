"""What evaluation asks of each token, from hidden states and output weights: no full logits, no gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels.linear_kd import project
from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.rows import agreement, likeliest, merge
from minitron_nemo.kernels.sums import check_tokens


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
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token, without gradients: cross-entropy fp64, KL(teacher || student) fp64, same most likely token bool.

    Inputs as for `linear_kd_loss`; the results, [tokens] each, are the same on all ranks of `tp_group`.
    """
    objective = Objective()
    check_tokens(labels)
    ce, divergence = labels.new_zeros(2, len(labels), dtype=torch.float64)
    agree = torch.zeros_like(labels, dtype=torch.bool)
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
        shard = projections.shard
        for tokens, student, teacher in projections.chunks():
            statistics = projections.backend.rows.statistics(
                student, teacher, labels[tokens] - shard.first_row, objective, shard.first_row
            )
            shards = shard.gather_statistics(statistics)
            rows = merge(shards, shard.rank, objective)
            assert rows.divergence is not None
            ce[tokens], divergence[tokens], agree[tokens] = rows.ce, rows.divergence, agreement(shards)
    return ce, divergence, agree


def label_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Per token, without gradients: log-probability of the label fp64, and whether it is the most likely token, bool.

    hidden: [tokens, h], of all tokens on every rank; weight and labels as for `linear_kd_loss`. The results, [tokens]
    each, are the same on all ranks of `tp_group`.
    """
    objective = Objective()
    check_tokens(labels)
    log_probability = labels.new_zeros(len(labels), dtype=torch.float64)
    greedy = torch.zeros_like(labels, dtype=torch.bool)
    with torch.no_grad():
        projections = project(hidden, weight, None, None, len(labels), vocab_size, tp_group, False, chunk_bytes)
        shard = projections.shard
        for tokens, logits, _ in projections.chunks():
            statistics = projections.backend.rows.statistics(
                logits, None, labels[tokens] - shard.first_row, objective, shard.first_row
            )
            shards = shard.gather_statistics(statistics)
            log_probability[tokens] = -merge(shards, shard.rank, objective).ce
            greedy[tokens] = likeliest(shards) == labels[tokens]
    return log_probability, greedy
