"""What the tables of this room are written with."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """`0.1234 ± 0.0012`; without a standard error for None."""
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
