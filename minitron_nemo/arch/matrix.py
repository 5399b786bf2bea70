"""`Matrix`: what a Plan says of a dense map; `checkpoint.dense` has its values."""

from __future__ import annotations

from dataclasses import dataclass

REPLACE, ADD, GAIN, BIAS = "replace", "add", "gain", "bias"


@dataclass(frozen=True)
class Matrix:
    """A dense map on columns of the student's tensors, or a norm; fp32 values are in the file beside the Plan.

    `replace` [n, k]: the student's tensor is the source's, with all its n columns, times the matrix. `add` [n - k, k]:
    it is the source's k kept columns plus the others, in their order, times the matrix. `gain` and `bias` [1, k]: those
    of the student's norm, as its family stores them (a gain minus one, where it does), since the source's are part of
    the matrix of what reads it. `sha256` is of its bytes.
    """

    kind: str
    shape: tuple[int, int]
    sha256: str

    @property
    def of_norm(self) -> bool:
        """Whether it is a norm's gain or bias itself, and multiplies nothing."""
        return self.kind in (GAIN, BIAS)
