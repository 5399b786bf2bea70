"""NeMo 2.7.3, unmodified, and we read each other's checkpoints without a bit lost."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.lightning import io
from nemo.lightning.io import connector
from transformers import AutoTokenizer

from minitron_nemo.arch import nemo as classes
from minitron_nemo.arch.transformer_config import SILU
from minitron_nemo.checkpoint.inspect import describe
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.errors import UserError
from tests.checkpoint.weights import architecture_of, random_plan, same_weights, weights
from tests.families import cut
from tests.nemo.shims import without_cuda
from tests.tiny import LLAMA3_ROPE, write_tiny_llama

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "llama3-rope": {"rope_scaling": LLAMA3_ROPE},
    "head_dim": {"kv_channels": 16, "num_query_groups": 2},
    "mistral": {"model_type": "mistral", "kv_channels": 16},
}
CASES = [*((model, torch.bfloat16) for model in MODELS), ("untied", torch.float32)]


@pytest.fixture(autouse=True)
def no_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # nemo/lightning/io/connector.py:316 puts tokenizers into /tmp/nemo_tokenizer, whatever is there.
    save = connector.ModelConnector.save_hf_tokenizer_assets
    directory = str(tmp_path / "nemo_tokenizer")
    monkeypatch.setattr(
        connector.ModelConnector, "save_hf_tokenizer_assets", lambda self, name: save(self, name, directory)
    )
    with without_cuda():
        yield


def _original(directory: Path, model: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    """A Hugging Face directory as NeMo takes it: Mistral's special tokens lie inside the tokenizer's vocabulary.

    NeMo's exporter for Mistral leaves out the rows of tokens that were added to it
    (nemo/collections/llm/gpt/model/mistral.py:322); those of Mistral-NeMo were not.
    """
    write_tiny_llama(directory, dtype=dtype, **{**MODELS[model], **changed})
    if model == "mistral":
        file = directory / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["model"]["vocab"] |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        file.write_text(json.dumps(tokenizer))
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"sliding_window": 512}))
    return directory


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_nemo_exports_what_we_write(tmp_path: Path, model: str, dtype: torch.dtype) -> None:
    original = _original(tmp_path / "hf", model, dtype)
    convert(original, tmp_path / "nemo", "nemo", progress=False)
    llm.export_ckpt(tmp_path / "nemo", "hf", output_path=tmp_path / "back")
    assert same_weights(original, tmp_path / "back")
    assert architecture_of(tmp_path / "back") == architecture_of(original)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab()
        == AutoTokenizer.from_pretrained(original).get_vocab()
    )


@pytest.mark.parametrize("model", MODELS)
def test_nemo_exports_pruned_students(tmp_path: Path, model: str) -> None:
    """Every axis cut, fewer layers, and heads x kv_channels is not hidden_size."""
    original = _original(tmp_path / "hf", model)
    convert(original, tmp_path / "teacher", "nemo", progress=False)
    plan = random_plan(architecture_of(original))
    assert plan.target.num_attention_heads * plan.target.kv_channels != plan.target.hidden_size
    convert(tmp_path / "teacher", tmp_path / "student", "nemo", plan=plan, progress=False)
    llm.export_ckpt(tmp_path / "student", "hf", output_path=tmp_path / "back")
    expected, found = cut(weights(original), plan), weights(tmp_path / "back")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert architecture_of(tmp_path / "back") == plan.target


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_what_nemo_imports_is_read(tmp_path: Path, model: str, dtype: torch.dtype) -> None:
    # NeMo's importer takes only the factor of rotary scaling from Hugging Face and leaves the rest as in Llama 3.1.
    changed = {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}} if "rope" in model else {}
    original = _original(tmp_path / "hf", model, dtype, **changed)
    # The sizes of the class do not matter: the importer makes a configuration of its own.
    target = llm.MistralModel(llm.MistralConfig7B()) if model == "mistral" else llm.LlamaModel(llm.Llama2Config7B())
    llm.import_ckpt(target, f"hf://{original}", output_path=tmp_path / "nemo")
    assert describe(tmp_path / "nemo")["format"] == "nemo"
    assert open_source(tmp_path / "nemo").architecture == architecture_of(original)
    convert(tmp_path / "nemo", tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (257, 256)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab()
        == AutoTokenizer.from_pretrained(original).get_vocab()
    )


def test_a_length_that_nemo_leaves_out_is_asked_for(tmp_path: Path) -> None:
    """NeMo's importer takes Mistral's length from sliding_window, which Mistral-NeMo does not have."""
    original = _original(tmp_path / "hf", "mistral")
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    llm.import_ckpt(llm.MistralModel(llm.MistralConfig7B()), f"hf://{original}", output_path=tmp_path / "nemo")
    with pytest.raises(UserError, match="model.config.seq_length is None"):
        open_source(tmp_path / "nemo")


def test_the_context_is_plain_json_that_nemo_builds_all_of(tmp_path: Path) -> None:
    original = _original(tmp_path / "hf", "llama3-rope", torch.bfloat16)
    convert(original, tmp_path / "nemo", "nemo", progress=False)
    context = tmp_path / "nemo" / "context"
    files = {str(path.relative_to(context)) for path in context.rglob("*") if path.is_file()}
    tokenizer = {"nemo_tokenizer/tokenizer.json", "nemo_tokenizer/tokenizer_config.json"}
    assert files == {"io.json", "model.yaml", "artifacts/generation_config.json"} | tokenizer
    loaded = io.load_context(tmp_path / "nemo")
    assert type(loaded.model) is llm.LlamaModel
    assert type(loaded.model.config) is Llama31Config
    assert loaded.model.config.params_dtype is torch.bfloat16 and loaded.model.config.bf16
    assert loaded.model.config.activation_func is torch.nn.functional.silu
    assert (loaded.model.config.scale_factor, loaded.model.config.old_context_len) == (8.0, 64)
    assert loaded.model.config.generation_config.bos_token_id == 257
    assert loaded.model.tokenizer.vocab_size == 259
    assert io.load_context(tmp_path / "nemo", subpath="model.config").kv_channels == 8


def test_nemo_saves_a_loaded_context_again(tmp_path: Path) -> None:
    """What a NeMo training would write after it started from ours."""
    original = _original(tmp_path / "hf", "tied")
    convert(original, tmp_path / "nemo", "nemo", progress=False)
    io.load_context(tmp_path / "nemo").io_dump(tmp_path / "again" / "context", yaml_attrs=["model"])
    (tmp_path / "nemo" / "weights").rename(tmp_path / "again" / "weights")
    assert open_source(tmp_path / "again").architecture == architecture_of(original)


def _known_classes() -> list[tuple[str, str]]:
    return [(classes.MODULES[kind], name) for kind, names in classes._CLASSES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), _known_classes())
def test_presets_are_those_of_nemos_classes(module: str, name: str) -> None:
    cls = getattr(importlib.import_module(module), name)
    defaults = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        defaults[field.name] = SILU if made is torch.nn.functional.silu else made
    _, presets = classes.presets(f"{module}.{name}")
    assert {field: defaults[field] for field in presets} == presets
    # What is not preset means what a field has that is left out.
    base = {"vocab_size": None, "kv_channels": None, "num_query_groups": None, "layernorm_epsilon": 1e-5}
    assert {field: defaults[field] for field in base if field not in presets} == {
        field: value for field, value in base.items() if field not in presets
    }
    if "rotary_base" not in presets:
        assert defaults["rotary_base"] == 10000
