"""How the student computes a map that was fitted behind a norm: what its readers' weights are multiplied by, its norm.

The teacher's readers W see diag(g) x + beta, and x is near M y + b, where y is what the student's norm makes of its k
channels before its gain; an RMSNorm has no beta, and no b. Wanted are N, g' and beta' with

    N (diag(g') y + beta') = diag(g) (M y + b) + beta

Columns of N have length 1, as those of a selection have: so weights keep the size that the teacher's have. With g' = 1
and gains as small as usual they would be several times smaller, and an optimizer whose updates have a size of their
own, as Adam's, would move them as many times as far as a plain cut's (docs/evidence/cuts.md).

The constant t = diag(g) b + beta, of h channels, is in general no combination of k columns. But the entries of what is
behind a LayerNorm sum to 0: v added to every column of F = N diag(g') has no bearing on F y. With beta' = s g' it has
one on N beta' = s F 1, and that is t for

    F = diag(g) M + v 1^T,  v = (t / s - diag(g) M 1) / k

So the map is exact. With s = |t| / |diag(g) M|, |beta'| is about |t|, as large as what it stands for, and v is small
beside the columns.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from minitron_nemo.importance.counted import Norm

SMALLEST = 2.0**-8  # of a gain that is stored minus one in bfloat16, beside 0


class StudentNorm(NamedTuple):
    """N [h, k] of the readers; gain and bias [1, k] of the norm, as its family stores them, no bias of an RMSNorm."""

    readers: Tensor
    gain: Tensor
    bias: Tensor | None


def student_norm(fitted: Tensor, norm: Norm, *, zero_centered_gamma: bool) -> StudentNorm:
    """The formula above of a map M [h, k], fp64, behind an RMSNorm, or [M, b] [h, k + 1] behind a LayerNorm.

    `norm` is the teacher's. With `zero_centered_gamma` gains are stored minus one; these are numbers of bfloat16, and N
    makes up for what rounding changes: a small gain would lose most of its digits there, beside the one.
    """
    maps, scale = norm.gain.double()[:, None] * fitted, 0.0
    if norm.bias is not None:
        maps, scale = _reaching(maps[:, :-1], maps[:, -1] + norm.bias.double())
    lengths = maps.norm(dim=0, keepdim=True)  # [1, k]
    stored = lengths = lengths.where(lengths > 0, 1.0)  # of a column of zeros
    if zero_centered_gamma:
        stored = (lengths - 1).clamp(min=SMALLEST - 1).bfloat16().double()
        lengths = stored + 1
    return StudentNorm(maps / lengths, stored, None if norm.bias is None else scale * lengths)


def _reaching(maps: Tensor, constant: Tensor) -> tuple[Tensor, float]:
    """F [h, k], which makes of y what `maps` make of it, and s with s F 1 = `constant` [h]."""
    scale = float(constant.norm()) / (float(maps.norm()) or 1.0)
    if scale == 0:
        return maps, scale
    return maps + ((constant / scale - maps.sum(dim=1)) / maps.shape[1])[:, None], scale
