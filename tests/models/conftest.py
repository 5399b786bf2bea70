"""Tiny models in both formats, made once."""

import pytest

from tests.models.support import SHAPES, TinyModel, store
from tests.pool import run_distributed


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    models = {name: TinyModel(tmp_path_factory.mktemp(name), **shape) for name, shape in SHAPES.items()}
    for model in models.values():
        run_distributed(1, store, model)
    return models
