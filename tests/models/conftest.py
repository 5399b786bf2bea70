"""Tiny models in both formats, made once."""

import pytest

from tests.models.support import SHAPES, TinyModel


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    return {name: TinyModel(tmp_path_factory.mktemp(name), **shape) for name, shape in SHAPES.items()}
