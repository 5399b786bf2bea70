"""The exceptions of which the command line prints one line: wrong input exits with 2, what failed elsewhere with 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Names the file, the key, what is wrong and what to do, in one line."""


class SaidByRankZero(UserError):
    """What the other ranks raise for a UserError of the job, since rank 0 is the one to say it."""


class Failed(Exception):
    """A process or job that was started did not end well. Names it, its log and what to do, in one line."""


def on_every_rank(work: Callable[[], T], rank: int, gather: Callable[[Any], list[Any]]) -> T:
    """Call `work` on every rank of a job and return what this one's call returned.

    A UserError of any rank ends the call on every rank, when all have come to the end of their work: rank 0 raises that
    of the lowest rank. `gather` takes a value from every rank and gives all of them, by rank, to each.
    """
    results: list[T] = []
    failure = None
    try:
        results.append(work())
    except UserError as error:
        failure = error
    said = gather(None if failure is None else str(failure))
    failed = [place for place, text in enumerate(said) if text is not None]
    if not failed:
        return results[0]
    text = f"rank {failed[0]}: {said[failed[0]]}" if failed[0] else said[0]
    raise (UserError(text) if rank == 0 else SaidByRankZero(text)) from failure


def alone(value: T) -> list[T]:
    """The `gather` of a job of one process."""
    return [value]
