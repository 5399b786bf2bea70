"""Plug-ins for NeMo 2: `nemo minitron ...`, recipes, distillation in NeMo's trainer, connectors, callbacks.

The only room that imports NeMo, and nothing imports it but NeMo: `nemo_run.cli` names it as an entry point, so that
the command line, the factories and the connectors are registered before NeMo reads its own arguments.
"""

try:
    import nemo_run  # noqa: F401
    from nemo.collections import llm  # noqa: F401
except ImportError as error:
    raise ImportError(f"minitron_nemo.nemo needs NeMo 2 ({error}); docs/nemo.md says how it is installed") from error

from minitron_nemo.nemo import cli, connectors, recipes
from minitron_nemo.nemo.callbacks import ImportanceScores
from minitron_nemo.nemo.distill import llm_distill
from minitron_nemo.nemo.model import DistillationModel

__all__ = ["DistillationModel", "ImportanceScores", "cli", "connectors", "llm_distill", "recipes"]
