"""What `inspect` says is so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.checkpoint import inspect as inspection
from minitron_nemo.checkpoint.inspect import describe, inspect
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.errors import UserError
from tests.tiny import write_tiny_llama


def test_statistics_are_those_of_the_whole_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_llama(tmp_path / "hf", tied=True)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[3, 5] = embedding[250, 0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    monkeypatch.setattr(inspection, "BLOCK_VALUES", 1000)
    found = describe(source, "embedding.word_embeddings.weight")["tensor"]
    values = embedding[~embedding.isnan()].double()
    assert (found["shape"], found["dtype"], found["nan_count"]) == ([259, 64], "float32", 2)
    assert (found["min"], found["max"]) == (values.min().item(), values.max().item())
    assert found["mean"] == pytest.approx(values.mean().item(), rel=1e-9)
    assert found["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-9)


def test_facts_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16)
    convert(source, tmp_path / "megatron", "megatron", progress=False)
    tensors = load_file(source / "model.safetensors")
    count = sum(tensor.numel() for tensor in tensors.values())
    for path, kind in ((source, "huggingface"), (tmp_path / "megatron", "megatron")):
        facts = describe(path)
        assert facts["format"] == kind
        assert facts["parameters"] == count
        assert facts["non_embedding_parameters"] == count - 2 * 259 * 64
        assert facts["active_parameters"] == count
        assert facts["dtype"] == "bfloat16"
        assert facts["tokenizer_size"] == 259
        assert facts["architecture"]["hidden_size"] == 64
        text = inspect(path)
        assert f"parameters: {count:,}" in text.splitlines()
        assert "  num_query_groups: 4" in text.splitlines()
    assert "tensor_model_parallel_size 1, pipeline_model_parallel_size 1" in inspect(tmp_path / "megatron")


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tensor 'lm_head.weight'"):
        inspect(write_tiny_llama(tmp_path / "hf"), "lm_head.weight")
