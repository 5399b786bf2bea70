"""Kept entries of an axis, in 4 bytes each where a tuple of Python's numbers takes 36: a large model has millions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# A string, which stays what it is, or a list of numbers that is too long for a shape or a pair.
LONG_LIST = re.compile(r'"(?:[^"\\]|\\.)*"|\[[\d,\s]{200,}\]')
MARK = "__entries__"  # {MARK: 3} is in the place of the list that came fourth


class Entries(Sequence[int]):
    """Whole numbers that never change; equal to any sequence of the same numbers, with the hash of their tuple.

    Raises TypeError for what is no sequence of whole numbers below 2^31.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Sequence[int] | NDArray[np.integer]) -> None:
        given = np.asarray(values if len(values) else np.zeros(0, np.int32))
        if given.ndim != 1 or given.dtype.kind not in "iu" or (given.astype(np.int32) != given).any():
            raise TypeError(f"{values!r} is no list of whole numbers below 2^31")
        self._values: NDArray[np.int32] = given.astype(np.int32)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return self._values.astype(np.int64 if dtype is None else dtype)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        found = self._values[index]
        return Entries(found) if isinstance(index, slice) else int(found)

    def __iter__(self) -> Iterator[int]:
        return map(int, self._values)

    def __contains__(self, entry: object) -> bool:
        return bool((self._values == entry).any())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Entries):
            return np.array_equal(self._values, other._values)
        return tuple(self) == tuple(other) if isinstance(other, Sequence) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def tolist(self) -> list[int]:
        return self._values.tolist()


def read_json(text: str) -> Any:
    """What a JSON text says, long lists of whole numbers as Entries. Raises ValueError.

    One list at a time is made of Python's numbers; all of a large model's would need as much memory as its blocks.
    """
    lists: list[Entries] = []

    def take(match: re.Match[str]) -> str:
        if match[0].startswith('"'):
            return match[0]
        lists.append(Entries(json.loads(match[0])))
        return f'{{"{MARK}": {len(lists) - 1}}}'

    def put_back(found: dict[str, Any]) -> Any:
        return lists[found[MARK]] if set(found) == {MARK} else found

    return json.loads(LONG_LIST.sub(take, text), object_hook=put_back)


def write_json(content: Any) -> str:
    """The JSON text of what has Entries in it: they are lists there. One at a time is made of Python's numbers."""
    return json.dumps(content, default=Entries.tolist)
