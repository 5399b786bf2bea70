"""What the tests of broken and hostile checkpoints share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.errors import UserError
from tests.checkpoint.weights import same_weights
from tests.tiny import write_tiny_llama


class Hostile:
    """Unpickles as a call of any function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def refused(source: Path, named: str, tmp_path: Path) -> None:
    """Converting `source` fails with one line that names `named`; an earlier result stays, no new one appears."""
    kept = write_tiny_llama(tmp_path / "kept", seed=5)
    for destination in (kept, tmp_path / "new"):
        for to in ("hf", "megatron"):
            with pytest.raises(UserError, match=named) as caught:
                convert(source, destination, to, progress=False)
            assert len(str(caught.value).splitlines()) == 1
            assert str(source.name) in str(caught.value)
    assert same_weights(kept, write_tiny_llama(tmp_path / "again", seed=5))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("new", "kept."))]
