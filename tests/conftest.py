"""What all tests share: thread settings, order, and what the `gpu` marker means."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

# Before torch is imported anywhere: one thread a process, here and in everything the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# The cheapest tests first, so that a broken build shows early.
ORDER = ("slow", "e2e", "slurm", "soak")


def _rank(item: pytest.Item) -> int:
    return max((1 + ORDER.index(mark.name) for mark in item.iter_markers() if mark.name in ORDER), default=0)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slurm = Path(__file__).parent / "slurm"
    cases: Counter[str] = Counter()
    for item in items:
        if slurm in item.path.parents:
            item.add_marker("slurm")
        fast = item.get_closest_marker("fast_cases")
        if fast is not None and not _rank(item):
            test = item.nodeid.split("[")[0]
            cases[test] += 1
            if cases[test] > fast.args[0]:
                item.add_marker("slow")
    items.sort(key=_rank)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
