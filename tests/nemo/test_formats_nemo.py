"""NeMo 2.7.3, unmodified, and we read each other's checkpoints without a bit lost."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo.collections import llm
from nemo.collections.llm.fn.activation import squared_relu
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.lightning import io
from nemo.lightning.io import connector
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_nemo.arch import Axis, Plan
from minitron_nemo.arch import nemo as classes
from minitron_nemo.arch.families import FAMILIES as FAMILY_TABLES
from minitron_nemo.checkpoint.inspect import describe
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.errors import UserError
from tests.checkpoint.weights import architecture_of, random_plan, same_weights, weights
from tests.families import FAMILIES, cut, write_tiny
from tests.nemo.shims import without_cuda
from tests.tiny import LLAMA3_ROPE, write_tiny_llama

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "llama3-rope": {"rope_scaling": LLAMA3_ROPE},
    "head_dim": {"kv_channels": 16, "num_query_groups": 2},
    "mistral": {"model_type": "mistral", "kv_channels": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # NeMo's importer knows no other (qwen3.py:304 leaves it out)
    "nemotron": {},
    "phi3": {"num_query_groups": 8},  # NeMo's importer knows no other (phi3mini.py:136)
}
# NeMo exports Phi-3 from fp32 alone (phi3mini.py:161 makes such a model, lightning/io/state.py:232 refuses others).
CASES = [
    *((model, torch.bfloat16) for model in MODELS if model != "phi3"),
    ("untied", torch.float32),
    ("phi3", torch.float32),
]
# What NeMo's converters leave out of the configuration, and what then stands in its place.
NOT_EXPORTED: dict[str, dict[str, Any]] = {"phi3": {"window_size": None}}  # phi3mini.py:200
NOT_IMPORTED: dict[str, dict[str, Any]] = {
    "qwen3": {"max_position_embeddings": 40960},  # qwen3.py:304
    "phi3": {"max_position_embeddings": 4096, "window_size": None},  # phi3mini.py:136
    "mistral": {"max_position_embeddings": 100, "window_size": None},  # mistral.py:219: the window's length
}
# Models to import for. Their sizes do not matter: the importers make configurations of their own.
TARGETS = {
    "mistral": lambda: llm.MistralModel(llm.MistralConfig7B()),
    "qwen2": lambda: llm.Qwen2Model(llm.Qwen2Config500M()),
    "qwen3": lambda: llm.Qwen3Model(llm.Qwen3Config600M()),
    "nemotron": lambda: llm.NemotronModel(llm.Nemotron3Config4B()),
    "phi3": lambda: llm.Phi3Model(llm.Phi3ConfigMini()),
}


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
    """A Hugging Face directory as NeMo takes it: special tokens lie inside the tokenizer's vocabulary where they must.

    NeMo's exporters leave out the rows of tokens that were added to it (nemo/collections/llm/gpt/model/mistral.py:337,
    nemotron.py:436, phi3mini.py:211); those of Mistral-NeMo were not.
    """
    settings = {**MODELS[model], **changed}
    if model in FAMILIES:
        write_tiny(model, directory, dtype=dtype, **settings)
    else:
        write_tiny_llama(directory, dtype=dtype, **settings)
    if model in ("mistral", "nemotron", "phi3"):
        _edit(
            directory / "tokenizer.json",
            lambda tokenizer: tokenizer["model"]["vocab"].update(
                {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
            ),
        )
    if model == "mistral":
        _edit(directory / "config.json", lambda config: config.update(sliding_window=100))
    return directory


def _edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_nemo_exports_what_we_write(tmp_path: Path, model: str, dtype: torch.dtype) -> None:
    # Heads are hidden_size / heads wide in every Phi-3 that NeMo exports (phi3mini.py:200 leaves them out).
    original = _original(tmp_path / "hf", model, dtype)
    convert(original, tmp_path / "nemo", "nemo", progress=False)
    llm.export_ckpt(tmp_path / "nemo", "hf", output_path=tmp_path / "back")
    assert same_weights(original, tmp_path / "back")
    assert architecture_of(tmp_path / "back") == replace(architecture_of(original), **NOT_EXPORTED.get(model, {}))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab()
        == AutoTokenizer.from_pretrained(original).get_vocab()
    )


@pytest.mark.parametrize("model", [model for model in MODELS if model != "phi3"])
def test_nemo_exports_pruned_students(tmp_path: Path, model: str) -> None:
    """Every axis cut, query groups included, fewer layers, and heads x kv_channels is not hidden_size."""
    original = _original(tmp_path / "hf", model)
    convert(original, tmp_path / "teacher", "nemo", progress=False)
    groups = architecture_of(original).num_query_groups // 2
    plan = random_plan(architecture_of(original), groups=groups)
    assert plan.target.num_attention_heads * plan.target.kv_channels != plan.target.hidden_size
    convert(tmp_path / "teacher", tmp_path / "student", "nemo", plan=plan, progress=False)
    llm.export_ckpt(tmp_path / "student", "hf", output_path=tmp_path / "back")
    expected, found = cut(weights(original), plan), weights(tmp_path / "back")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert architecture_of(tmp_path / "back") == plan.target


def test_nemo_exports_phi3_students_whose_heads_still_make_up_the_width(tmp_path: Path) -> None:
    """Half of the layers, of the width, and of the heads; 2/3 of the neurons."""
    original = _original(tmp_path / "hf", "phi3")
    source = architecture_of(original)
    plan = Plan(
        source=source,
        target=source.resized({Axis.LAYERS: 2, Axis.HIDDEN: 32, Axis.FFN: 64, Axis.HEADS: 4, Axis.GROUPS: 4}),
        kept_layers=(0, 3),
        kept_hidden=tuple(range(1, 64, 2)),
        kept_ffn=(tuple(range(64)), tuple(range(32, 96))),
        kept_heads=((0, 2, 3, 7), (1, 2, 5, 6)),
        kept_groups=((0, 2, 3, 7), (1, 2, 5, 6)),
    )
    convert(original, tmp_path / "student", "nemo", plan=plan, progress=False)
    llm.export_ckpt(tmp_path / "student", "hf", output_path=tmp_path / "back")
    expected, found = cut(weights(original), plan), weights(tmp_path / "back")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model", ["mistral", "qwen2", "nemotron", "phi3"])
def test_tied_models_are_read_back_though_nemo_does_not_export_them(tmp_path: Path, model: str) -> None:
    """Its exporters ask for an output layer whatever the configuration says; it loads such a model, and trains it."""
    original = _original(tmp_path / "hf", model, tied=True)
    convert(original, tmp_path / "nemo", "nemo", progress=False)
    assert io.load_context(tmp_path / "nemo", subpath="model.config").share_embeddings_and_output_weights
    with pytest.raises(ValueError, match=r"No matches found for source key: output_layer.weight"):
        llm.export_ckpt(tmp_path / "nemo", "hf", output_path=tmp_path / "exported")
    convert(tmp_path / "nemo", tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")
    assert architecture_of(tmp_path / "back") == architecture_of(original)


def test_nemo_exports_a_tied_qwen3_with_an_output_layer_that_is_not_read(tmp_path: Path) -> None:
    """Made without tying (qwen3.py:332), its output layer is memory that nothing was written to."""
    original = _original(tmp_path / "hf", "qwen3", tied=True)
    convert(original, tmp_path / "nemo", "nemo", progress=False)
    llm.export_ckpt(tmp_path / "nemo", "hf", output_path=tmp_path / "exported")
    assert weights(tmp_path / "exported").keys() - weights(original).keys() == {"lm_head.weight"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "back")
    assert same_weights(original, tmp_path / "back")
    assert architecture_of(tmp_path / "exported") == architecture_of(original)


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_what_nemo_imports_is_read(tmp_path: Path, model: str, dtype: torch.dtype) -> None:
    # NeMo's importer takes only the factor of rotary scaling from Hugging Face and leaves the rest as in Llama 3.1.
    changed = {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}} if "rope" in model else {}
    original = _original(tmp_path / "hf", model, dtype, **changed)
    target = TARGETS[model]() if model in TARGETS else llm.LlamaModel(llm.Llama2Config7B())
    llm.import_ckpt(target, f"hf://{original}", output_path=tmp_path / "nemo")
    assert describe(tmp_path / "nemo")["format"] == "nemo"
    kept = replace(architecture_of(original), **NOT_IMPORTED.get(model, {}))
    assert open_source(tmp_path / "nemo").architecture == kept
    convert(tmp_path / "nemo", tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")
    if model not in ("nemotron", "phi3"):  # whose importers leave out generation_config.json
        written = json.loads((tmp_path / "back" / "config.json").read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (257, 256)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab()
        == AutoTokenizer.from_pretrained(original).get_vocab()
    )


def test_a_length_that_nemo_leaves_out_is_asked_for(tmp_path: Path) -> None:
    """NeMo's importer takes Mistral's length from sliding_window, which Mistral-NeMo does not have."""
    original = _original(tmp_path / "hf", "mistral")
    _edit(original / "config.json", lambda config: config.update(sliding_window=None))
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
    names = [model for layers in FAMILY_TABLES.values() for model in layers.nemo.values()]
    return [(model.module, name) for model in names for name in model.configs]


@pytest.mark.parametrize(("module", "name"), _known_classes())
def test_presets_are_those_of_nemos_classes(module: str, name: str) -> None:
    cls = getattr(importlib.import_module(module), name)
    defaults = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.name == "activation_func":
            made = {torch.nn.functional.silu: "silu", squared_relu: "squared_relu"}[made]
        defaults[field.name] = made
    _, presets = classes.presets(f"{module}.{name}")
    assert {field: defaults[field] for field in presets} == presets
    # What is not preset means what a field has that is left out.
    base = {"vocab_size": None, "kv_channels": None, "num_query_groups": None, "layernorm_epsilon": 1e-5}
    assert {field: defaults[field] for field in base if field not in presets} == {
        field: value for field, value in base.items() if field not in presets
    }
    if "rotary_base" not in presets:
        assert defaults["rotary_base"] == 10000
