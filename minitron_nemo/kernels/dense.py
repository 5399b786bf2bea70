"""Loss and gradient of rows of logits of both models, over all vocabulary shards."""

from __future__ import annotations

from torch import Tensor

from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.rows import RowKernels, Rows, merge, merge_mixture
from minitron_nemo.kernels.shard import Shard


def loss_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    shard: Shard,
    objective: Objective,
    kernels: RowKernels,
) -> Rows:
    """Loss per row of [n, shard.rows] logits; labels are vocabulary ids, int64 [n].

    One all-gather of a few floats per row over the group, two for JSD. Overwrites both as `RowKernels` does.
    """
    statistics = kernels.statistics(student, teacher, labels - shard.first_row, objective, None)
    rows = merge(shard.gather_statistics(statistics), shard.rank, objective)
    if teacher is not None and objective.divergence == "jsd":
        sums = kernels.mixture(student, teacher, rows, objective)
        rows = merge_mixture(shard.gather_statistics(sums), rows, objective)
    return rows


def logit_gradients(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    rows: Rows,
    shard: Shard,
    objective: Objective,
    kernels: RowKernels,
) -> None:
    """Overwrite `student`, as `loss_rows` left it, with d(sum of weight * objective) / d(student logits)."""
    weights = token_weights.double()
    divergence_weights = weights * (objective.logits_weight * objective.divergence_scale / objective.temperature)
    if teacher is None:
        divergence_weights = divergence_weights * 0
    kernels.gradients(
        student,
        teacher,
        labels - shard.first_row,
        divergence_weights,
        weights * objective.ce_weight,
        rows,
        objective,
    )
