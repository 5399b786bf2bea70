"""One Slurm cluster for all tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster
