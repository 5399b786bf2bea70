"""Tiny models in both formats, made once."""

import pytest

from tests.families import FAMILIES
from tests.models.support import SHAPES, TinyModel


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    return {name: TinyModel(tmp_path_factory.mktemp(name), **shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="session")
def family_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    """One of each family, some of them tied."""
    return {
        family: TinyModel(tmp_path_factory.mktemp(family), family, tied=family in ("qwen2", "phi3", "qwen3_moe"))
        for family in FAMILIES
    }
