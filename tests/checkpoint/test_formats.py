"""NeMo 2 and Megatron-Bridge: written, read back, pruned on the way; the names are those that their readers ask for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from minitron_nemo.checkpoint import blocks
from minitron_nemo.checkpoint.inspect import describe
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.cli import main
from minitron_nemo.errors import UserError
from tests.checkpoint.weights import architecture_of, random_plan, same_weights, weights
from tests.e2e.chain import write_recipe
from tests.families import DENSE, FAMILIES, MIXTURES, cut, write_tiny
from tests.tiny import LLAMA3_ROPE, write_tiny_llama

LLAMA31_ROPE = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}  # what Megatron-core's own scaling fixes
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "llama3-rope": {"rope_scaling": LLAMA31_ROPE},
    "head_dim": {"kv_channels": 12, "num_query_groups": 2},
    "mistral": {"model_type": "mistral"},
}
FORMATS = ("nemo", "bridge")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_round_trip_is_bit_identical(tmp_path: Path, model: str, to: str) -> None:
    original = write_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16, **MODELS[model])
    convert(original, tmp_path / to, to, progress=False)
    assert describe(tmp_path / to)["format"] == to
    convert(tmp_path / to, tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")
    assert architecture_of(tmp_path / "back") == architecture_of(original)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (len(tokenizer), tokenizer.eos_token_id) == (259, 256)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["bos_token_id"] == 257


# Mixtures of experts are not written for NeMo and Megatron-Bridge.
WRITTEN = [
    (family, to)
    for family in ("llama", *FAMILIES)
    for to in FORMATS
    if family not in MIXTURES or to in ("hf", "megatron")
]


@pytest.mark.parametrize(("family", "to"), WRITTEN[len(FORMATS) :])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.fast_cases(9)
def test_round_trip_of_every_family_is_bit_identical(tmp_path: Path, family: str, tied: bool, to: str) -> None:
    original = write_tiny(family, tmp_path / "hf", tied=tied, dtype=torch.bfloat16)
    convert(original, tmp_path / to, to, progress=False)
    convert(tmp_path / to, tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")
    assert architecture_of(tmp_path / "back") == architecture_of(original)


@pytest.mark.parametrize("to", ["nemo", "bridge"])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_is_refused_where_it_cannot_be_written(tmp_path: Path, family: str, to: str) -> None:
    with pytest.raises(UserError, match="mixtures of experts are not written|NeMo has no classes for"):
        convert(write_tiny(family, tmp_path / "hf"), tmp_path / "out", to, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(("family", "to"), WRITTEN)
@pytest.mark.fast_cases(3)
def test_pruned_weights_equal_an_independent_slice(
    tmp_path: Path, family: str, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers, width, heads and query groups are cut."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    original = write_tiny(family, tmp_path / "hf")
    plan = random_plan(architecture_of(original), groups=2)
    convert(original, tmp_path / "teacher", to, progress=False)
    convert(tmp_path / "teacher", tmp_path / "student", to, plan=plan, progress=False)
    convert(tmp_path / "student", tmp_path / "exported", "hf", progress=False)
    expected, found = cut(weights(original), plan), weights(tmp_path / "exported")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert architecture_of(tmp_path / "exported") == plan.target


@pytest.mark.parametrize("to", FORMATS)
def test_a_window_is_written_as_nvidias_converters_write_it(tmp_path: Path, to: str) -> None:
    """nemo/collections/llm/gpt/model/mistral.py:216, megatron/bridge/models/mistral/mistral_bridge.py: as it is."""
    original = write_tiny_llama(tmp_path / "hf", model_type="mistral")
    file = original / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": 100}))
    convert(original, tmp_path / "out", to, progress=False)
    assert open_source(tmp_path / "out").architecture == architecture_of(original)
    if to == "nemo":
        written = yaml.safe_load((tmp_path / "out" / "context" / "model.yaml").read_text())["config"]
    else:
        written = yaml.safe_load((tmp_path / "out" / "iter_0000000" / "run_config.yaml").read_text())["model"]
    assert (written["window_size"], written["seq_length"], written["cp_comm_type"]) == ([100, 0], 512, "a2a")


# What TransformerEngine's layer spec names (megatron/core/models/gpt/gpt_layer_specs.py, Megatron-core 0.16.1), as
# megatron/bridge/models/llama/llama_bridge.py, mapping_registry, and nemo/collections/llm/gpt/model/llama.py,
# convert_state, ask for it; TransformerEngine's four linear modules have an extra state each.
KEYS = {
    "embedding.word_embeddings.weight",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.self_attention.linear_qkv.weight",
    "decoder.layers.self_attention.linear_proj.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.mlp.linear_fc1.weight",
    "decoder.layers.mlp.linear_fc2.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
    *(
        f"decoder.layers.{module}._extra_state/shard_{layer}_4"
        for module in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        for layer in range(4)
    ),
}


# What the mappings of the other families (qwen2_bridge.py, qwen3.py, ...) ask for beside these.
MORE_KEYS = {
    "qwen2": {"decoder.layers.self_attention.linear_qkv.bias"},
    "qwen3": {f"decoder.layers.self_attention.{kind}_layernorm.weight" for kind in "qk"},
    "nemotron": {
        "decoder.layers.self_attention.linear_qkv.layer_norm_bias",
        "decoder.layers.mlp.linear_fc1.layer_norm_bias",
        "decoder.final_layernorm.bias",
    },
    "phi3": set(),
}
PLACES = [("nemo", "module.", "weights"), ("bridge", "", "iter_0000000")]


@pytest.mark.parametrize(("to", "prefix", "inner"), PLACES)
@pytest.mark.parametrize("family", DENSE)
def test_keys_of_every_family(tmp_path: Path, family: str, to: str, prefix: str, inner: str) -> None:
    convert(write_tiny(family, tmp_path / "hf"), tmp_path / "out", to, progress=False)
    with open(tmp_path / "out" / inner / ".metadata", "rb") as file:
        assert set(pickle.load(file).state_dict_metadata) == {prefix + key for key in KEYS | MORE_KEYS[family]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("to", "prefix", "inner"), PLACES)
def test_keys_are_those_of_transformer_engines_layers(
    tmp_path: Path, to: str, prefix: str, inner: str, tied: bool
) -> None:
    convert(write_tiny_llama(tmp_path / "hf", tied=tied), tmp_path / "out", to, progress=False)
    with open(tmp_path / "out" / inner / ".metadata", "rb") as file:
        found = pickle.load(file).state_dict_metadata
    assert set(found) == {prefix + key for key in KEYS if not (tied and key == "output_layer.weight")}
    assert found[prefix + "decoder.layers.mlp.linear_fc1.weight"].size == torch.Size([4, 192, 64])


def test_bridges_configuration_makes_the_model(tmp_path: Path) -> None:
    original = write_tiny_llama(tmp_path / "hf", tied=True, rope_scaling=LLAMA31_ROPE, dtype=torch.bfloat16)
    convert(original, tmp_path / "out", "bridge", progress=False)
    directory = tmp_path / "out" / "iter_0000000"
    config = yaml.safe_load((directory / "run_config.yaml").read_text())
    expected = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "normalization": "RMSNorm",
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "num_query_groups": 4,
        "kv_channels": 8,
        "vocab_size": 259,
        "seq_length": 512,
        "share_embeddings_and_output_weights": True,
        "rope_scaling": True,
        "rope_scaling_factor": 8.0,
        "bf16": True,
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
    }
    assert {key: config["model"][key] for key in expected} == expected
    # What Megatron-Bridge finds the newest iteration by, and takes up its training state from.
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "0"
    for file in (tmp_path / "out" / "latest_train_state.pt", directory / "train_state.pt"):
        state = torch.load(file, weights_only=True)
        assert state["step"].item() == 0 and state["floating_point_operations_so_far"].dtype == torch.float64


# A class of its own that a family has in Megatron-Bridge 0.3.1, and what its converters set on GPTModelProvider
# (megatron/bridge/models/*/*_bridge.py).
BRIDGE: dict[str, tuple[str | None, dict[str, Any]]] = {
    "qwen2": ("qwen.qwen_provider.Qwen25ModelProvider7B", {"add_qkv_bias": True}),
    "qwen3": ("qwen.qwen_provider.Qwen3ModelProvider8B", {"qk_layernorm": True, "kv_channels": 16}),
    "nemotron": (
        "nemotron.nemotron_provider.Nemotron4ModelProvider15B",
        {
            "layernorm_zero_centered_gamma": True,
            "rotary_percent": 0.5,
            "activation_func": {"_target_": "megatron.core.activations.squared_relu", "_call_": False},
        },
    ),
    "phi3": (None, {"window_size": [10, 0]}),
}


@pytest.mark.parametrize("family", DENSE)
def test_bridges_configuration_of_every_family(tmp_path: Path, family: str) -> None:
    original = write_tiny(family, tmp_path / "hf")
    convert(original, tmp_path / "out", "bridge", progress=False)
    directory = tmp_path / "out" / "iter_0000000"
    config = yaml.safe_load((directory / "run_config.yaml").read_text())
    own_class, features = BRIDGE[family]
    expected = {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", **features}
    assert {key: config["model"][key] for key in expected} == expected
    # What Megatron-Bridge saves has no architecture.json beside it.
    (directory / "architecture.json").unlink()
    if own_class is None:
        with pytest.raises(UserError, match="window_size is .* for llama"):
            open_source(tmp_path / "out")
        return
    assert open_source(tmp_path / "out").architecture == architecture_of(original)
    config["model"]["_target_"] = f"megatron.bridge.models.{own_class}"
    (directory / "run_config.yaml").write_text(yaml.safe_dump(config))
    assert open_source(tmp_path / "out").architecture == architecture_of(original)


def test_bridge_is_read_by_iteration_and_by_tracker(tmp_path: Path) -> None:
    first, second = write_tiny_llama(tmp_path / "a"), write_tiny_llama(tmp_path / "b", seed=1)
    convert(first, tmp_path / "run", "bridge", progress=False)
    convert(second, tmp_path / "other", "bridge", progress=False)
    run = tmp_path / "run"
    (tmp_path / "other" / "iter_0000000").rename(run / "iter_0000200")

    def reads(path: Path, expected: Path) -> bool:
        convert(path, tmp_path / "back", "hf", progress=False)
        return same_weights(expected, tmp_path / "back")

    assert reads(run, first)
    assert reads(run / "iter_0000200", second)
    (run / "latest_checkpointed_iteration.txt").write_text("200\n")
    assert reads(run, second)
    (run / "latest_checkpointed_iteration.txt").unlink()
    assert reads(run, first)  # by latest_train_state.pt
    (run / "latest_train_state.pt").unlink()
    assert reads(run, second)
    # Several iterations are somebody's training: not to be replaced by a conversion.
    with pytest.raises(UserError, match="is not a checkpoint"):
        convert(first, run, "bridge", progress=False)


def test_what_bridge_saves_beside_the_sizes_is_read(tmp_path: Path) -> None:
    """Megatron-Bridge dumps all fields, with objects among them; newer ones nest the transformer's."""
    original = write_tiny_llama(tmp_path / "hf", tied=True)
    convert(original, tmp_path / "out", "bridge", progress=False)
    file = tmp_path / "out" / "iter_0000000" / "run_config.yaml"
    config = yaml.safe_load(file.read_text())
    config["model"] |= {"attention_backend": {"_target_": "megatron.core.transformer.enums.AttnBackend", "_args_": [5]}}
    config["model"] |= {"transformer_layer_spec": {"_target_": "x.default_layer_spec", "_call_": False}, "fp8": None}
    file.write_text(yaml.safe_dump(config))
    assert open_source(tmp_path / "out").architecture == architecture_of(original)
    target = config["model"].pop("_target_")
    nested = {"_target_": "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig"}
    outer = {
        key: config["model"].pop(key) for key in ("vocab_size", "seq_length", "share_embeddings_and_output_weights")
    }
    config["model"]["activation_func"] = "silu"
    config["model"] = {**nested, **outer, "transformer": config["model"]}
    file.write_text(yaml.safe_dump(config))
    assert target.endswith("GPTModelProvider")
    assert open_source(tmp_path / "out").architecture == architecture_of(original)


@pytest.mark.slow
def test_the_command_line_and_recipes_take_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path))
    for to in FORMATS:
        source = str(tmp_path / to)
        assert main(["convert", str(tmp_path / "model"), source, "--to", to]) == 0
        assert main(["inspect", source]) == 0
        assert f"format: {to}" in capsys.readouterr().out.splitlines()
        assert main(["plan", recipe, f"model.source={source}", "export.formats=[nemo,bridge]"]) == 0
    assert main(["plan", recipe, "export.formats=[nemo,gptq]"]) == 2
    assert "export.formats: 'gptq' is not one of hf, megatron, nemo, bridge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("to", "model", "named"),
    [
        ("nemo", {"model_type": "mistral", "rope_scaling": LLAMA3_ROPE}, "NeMo's MistralModel has no rotary scaling"),
        ("bridge", {"rope_scaling": LLAMA3_ROPE}, "original_max_position_embeddings"),
    ],
)
def test_what_a_format_cannot_say_is_refused_before_anything_is_written(
    tmp_path: Path, to: str, model: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        convert(write_tiny_llama(tmp_path / "hf", **model), tmp_path / "out", to, progress=False)
    assert not list(tmp_path.glob("out*"))
