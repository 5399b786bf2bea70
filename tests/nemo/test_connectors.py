"""`minitron://` in NeMo's own import and export."""

from __future__ import annotations

from pathlib import Path

import torch
from nemo.collections import llm
from nemo.lightning import io
from safetensors.torch import load_file

from minitron_nemo import nemo  # noqa: F401 - registers the connectors
from minitron_nemo.checkpoint.transform import convert
from tests.tiny import write_tiny_llama


def test_import_and_export_give_the_same_bits(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source", dtype=torch.bfloat16)
    model = llm.LlamaModel(
        llm.LlamaConfig(num_layers=1, num_attention_heads=8, hidden_size=64, apply_rope_fusion=False)
    )
    imported = llm.import_ckpt(model, f"minitron://{source}", output_path=tmp_path / "nemo")
    loaded = io.load_context(imported / "context", subpath="model")
    assert (type(loaded), loaded.config.num_layers, loaded.config.ffn_hidden_size) == (llm.LlamaModel, 4, 96)
    exported = llm.export_ckpt(imported, "minitron", tmp_path / "megatron")
    convert(exported, tmp_path / "hf", "hf", progress=False)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "hf"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
