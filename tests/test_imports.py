"""What importing the package pulls in: NeMo and other extras never, installed or not, and torch when it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

FOREIGN = ("nemo", "nemo_run", "lightning", "pytorch_lightning", "fiddle", "modelopt", "transformer_engine", "lm_eval")
# The modules that the command line and every command of it begin with.
EVERYTHING = """
from pathlib import Path
import minitron_nemo
root = Path(minitron_nemo.__file__).parent
for path in root.rglob("*.py"):
    name = ".".join(["minitron_nemo", *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
    if not name.startswith(("minitron_nemo.nemo", "minitron_nemo.kernels.triton", "minitron_nemo.evaluation.harness")):
        __import__(name)
"""


def _modules(code: str) -> set[str]:
    """Names of all modules that a fresh interpreter has after `code`."""
    command = [sys.executable, "-W", "ignore", "-c", f"{code}\nimport sys; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.slow
def test_the_package_imports_nothing_of_nemo() -> None:
    loaded = _modules(EVERYTHING)
    assert {"minitron_nemo.run", "minitron_nemo.distillation.trainer", "torch", "megatron.core"} <= loaded
    assert {name for name in loaded if name.split(".")[0] in FOREIGN} == set()


def test_the_command_line_starts_without_torch() -> None:
    loaded = _modules("import minitron_nemo.cli")
    assert "torch" not in loaded
    assert len(loaded) < 400  # 222 when this was written; torch and Megatron-core bring 3,000 more
