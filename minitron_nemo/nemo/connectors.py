"""`minitron://`: checkpoints that `minitron convert` reads, for NeMo's import; Megatron ones of it by NeMo's export.

    nemo llm import model=llama3_8b source=minitron:///path/distilled output_path=/path/nemo
    nemo llm export path=/path/nemo target=minitron output_path=/path/megatron

Both are one streaming pass in bounded memory (`checkpoint.transform`); no model is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo.collections import llm
from nemo.lightning import io

from minitron_nemo.arch.families import FAMILIES
from minitron_nemo.checkpoint.transform import convert

EXTENSION = "minitron"


class Importer(io.ModelConnector):
    """Its path is the source; the NeMo checkpoint it makes has the source's own sizes, whatever model NeMo names."""

    def apply(self, output_path: Path, **_: Any) -> Path:
        convert(Path(str(self)), output_path, "nemo")
        return output_path


class Exporter(io.ModelConnector):
    """Its path is the NeMo checkpoint."""

    def apply(self, output_path: Path, **_: Any) -> Path:
        convert(Path(str(self)), output_path, "megatron")
        return output_path


_models = [getattr(llm, names.model) for layers in FAMILIES.values() for names in layers.nemo.values()]
for _model in (llm.GPTModel, *_models):
    io.model_importer(_model, EXTENSION)(Importer)
    io.model_exporter(_model, EXTENSION)(Exporter)
