"""`Matrix`: what a Plan says of a dense map; `checkpoint.dense` has its values."""

from __future__ import annotations

from dataclasses import dataclass

REPLACE, ADD = "replace", "add"


@dataclass(frozen=True)
class Matrix:
    """A dense map on the columns of one tensor of the student; its fp32 values are in the file beside the Plan.

    `replace` [n, k]: the student's tensor is the source's, with all its n columns, times the matrix. `add` [n - k, k]:
    it is the source's k kept columns plus the others, in their order, times the matrix. `sha256` is of its bytes.
    """

    kind: str
    shape: tuple[int, int]
    sha256: str
