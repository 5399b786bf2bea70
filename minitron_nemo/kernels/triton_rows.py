"""`RowKernels` in Triton: for CUDA, and under its interpreter (TRITON_INTERPRET=1) for tensors on the CPU.

Passes read the raw logits, fp32, bf16 or fp16, and compute exponentials anew: one pass for statistics, one for JSD's
mixture, one for gradients, which overwrites the student's logits. The teacher's are never written. Arithmetic is fp32,
but for the last step of sums over a row.

A logit of -inf is an entry that does not exist: with p = 0 or q = 0 it contributes 0. Running maxima start at ABSENT,
which is finite, so that whatever has no finite logit ends with maximum ABSENT and sum 0, not NaN. Logits of +inf or NaN
make the sums NaN.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from minitron_nemo.kernels import rows as layout
from minitron_nemo.kernels.objective import Objective
from minitron_nemo.kernels.rows import Rows
from minitron_nemo.kernels.triton_kernels import gradients_kernel, mixture_kernel, statistics_kernel

# Entries that a program of 8 warps holds at once. Where it goes along a whole row, every entry of the block is a lane
# with maxima and sums of its own, so that the loop has no barrier; with 4096 lanes some variants of `statistics` take
# up to 198 registers a thread, with 2048 at most 120.
BLOCK, ROW_BLOCK = 4096, 2048
# Explicit, because Triton's default changes with its version.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def statistics(
    student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective, first_row: int | None
) -> Tensor:
    """See `RowKernels`; fp64. One read of both models' logits. ValueError if a row's entries are not adjacent."""
    columns = layout.STUDENT_COLUMNS if teacher is None else layout.ALL_COLUMNS
    out = student.new_zeros(student.shape[0], columns, dtype=torch.float64)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(student):
        statistics_kernel[(student.shape[0],)](
            student,
            teacher,
            labels.contiguous(),
            out,
            _row_stride(student),
            _row_stride(teacher),
            student.shape[1],
            objective.temperature,
            1.0 / objective.temperature,
            first_row or 0,
            DIVERGENCE=_divergence(teacher, objective),
            UNSCALED=objective.temperature != 1.0,
            BEST=first_row is not None,
            BLOCK=ROW_BLOCK,
            **OPTIONS,
        )
    return out


def mixture(student: Tensor, teacher: Tensor, rows: Rows, objective: Objective) -> Tensor:
    """See `RowKernels`; fp64. One read of both models' logits."""
    assert rows.teacher_max is not None and rows.teacher_scale is not None
    scalars = torch.stack([rows.student_max, rows.student_scale, rows.teacher_max, rows.teacher_scale], 1).float()
    out = student.new_zeros(student.shape[0], 2, dtype=torch.float64)
    if student.numel() == 0:
        return out
    with torch.cuda.device_of(student):
        mixture_kernel[(student.shape[0],)](
            student,
            teacher,
            scalars,
            out,
            _row_stride(student),
            _row_stride(teacher),
            student.shape[1],
            1.0 / objective.temperature,
            objective.jsd_beta,
            BLOCK=ROW_BLOCK,
            **OPTIONS,
        )
    return out


def gradients(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    divergence_weights: Tensor,
    ce_weights: Tensor,
    rows: Rows,
    objective: Objective,
) -> None:
    """See `RowKernels`. One read of both models' logits, one write of the student's."""
    if student.numel() == 0:
        return
    divergence = _divergence(teacher, objective)
    scalars = [rows.student_max, rows.student_scale, rows.unscaled_scale, divergence_weights, ce_weights]
    if teacher is not None:
        assert rows.teacher_max is not None and rows.teacher_scale is not None
        scalars += [rows.teacher_max, rows.teacher_scale, _log_ratio_mean(rows, divergence)]
    if divergence == "jsd":
        scalars[3] = divergence_weights * (1 - objective.jsd_beta)
    with torch.cuda.device_of(student):
        gradients_kernel[(student.shape[0] * triton.cdiv(student.shape[1], BLOCK),)](
            student,
            teacher,
            labels.contiguous(),
            torch.stack(scalars, 1).float(),
            _row_stride(student),
            _row_stride(teacher),
            student.shape[1],
            objective.temperature,
            1.0 / objective.temperature,
            objective.jsd_beta,
            DIVERGENCE=divergence,
            UNSCALED=objective.temperature != 1.0 and objective.ce_weight != 0.0,
            BLOCK=BLOCK,
            **OPTIONS,
        )


def _divergence(teacher: Tensor | None, objective: Objective) -> str:
    return "none" if teacher is None else objective.divergence


def _log_ratio_mean(rows: Rows, divergence: str) -> Tensor:
    """Mean under q of what `gradients_kernel` takes the logarithm of; zeros where it takes none."""
    if divergence == "jsd":
        assert rows.student_mixture_kl is not None
        return rows.student_mixture_kl
    assert rows.divergence is not None and rows.log_ratio_offset is not None
    return rows.divergence - rows.log_ratio_offset


def _row_stride(logits: Tensor | None) -> int:
    if logits is None:
        return 0
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits: entries of a row are {logits.stride(1)} apart; give rows of adjacent entries")
    return logits.stride(0)
