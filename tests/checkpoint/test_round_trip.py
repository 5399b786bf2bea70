"""Conversions lose nothing; Plans cut exactly what they say; the number of processes changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minitron_nemo.checkpoint import blocks, huggingface, sink
from minitron_nemo.checkpoint.fingerprint import checkpoint_identity, fingerprint, model_identity
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.errors import UserError
from tests.checkpoint.weights import architecture_of, peak_memory, random_plan, same_weights, weights
from tests.families import FAMILIES, cut, write_tiny
from tests.tiny import LLAMA3_ROPE, write_tiny_llama

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "llama3-rope": {"rope_scaling": LLAMA3_ROPE},
    "head_dim": {"kv_channels": 12, "num_query_groups": 2},
    "mistral": {"model_type": "mistral"},
    **{family: {"family": family} for family in FAMILIES},
    **{f"{family}-tied": {"family": family, "tied": True} for family in FAMILIES},
}


def write(directory: Path, model: str, **options: Any) -> Path:
    options = MODELS[model] | options
    family = options.pop("family", None)
    return write_tiny(family, directory, **options) if family else write_tiny_llama(directory, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.fast_cases(12)
def test_round_trip_through_megatron_is_bit_identical(tmp_path: Path, model: str, dtype: torch.dtype) -> None:
    original = write(tmp_path / "hf", model, dtype=dtype)
    convert(original, tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "back", "hf")
    assert same_weights(original, tmp_path / "back")
    assert architecture_of(tmp_path / "back") == architecture_of(original)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "back"), AutoTokenizer.from_pretrained(original)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.eos_token_id == 256
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (257, 256)
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("model", ["untied", "tied", "head_dim", *FAMILIES])
@pytest.mark.fast_cases(3)
def test_pruned_weights_equal_an_independent_slice(
    tmp_path: Path, model: str, small_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_blocks:  # several blocks a tensor, several windows a block, several files
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
        monkeypatch.setattr(huggingface, "SHARD_BYTES", 50_000)
    original = write(tmp_path / "hf", model)
    plan = random_plan(architecture_of(original))
    convert(original, tmp_path / "direct", "hf", plan=plan)
    convert(original, tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "pruned", "megatron", plan=plan)
    convert(tmp_path / "pruned", tmp_path / "exported", "hf")
    expected = cut(weights(original), plan)
    for student in ("direct", "exported"):
        found = weights(tmp_path / student)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (len(list((tmp_path / student).glob("*.safetensors"))) > 1) == small_blocks


@pytest.mark.parametrize("tied", [False, True])
def test_pruned_export_has_the_logits_of_an_independent_construction(tmp_path: Path, tied: bool) -> None:
    original = write_tiny_llama(tmp_path / "hf", tied=tied, rope_scaling=LLAMA3_ROPE)
    plan = random_plan(architecture_of(original))
    convert(original, tmp_path / "student", "hf", plan=plan)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            rope_parameters={**LLAMA3_ROPE, "rope_theta": 10000.0},
            tie_word_embeddings=tied,
        )
    )
    missing = theirs.load_state_dict(cut(weights(original), plan), strict=False).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])
    theirs.tie_weights()
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    tokens = torch.arange(120).reshape(2, 60) * 2
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        assert expected.std() > 0.1
        assert torch.equal(ours.eval()(tokens).logits, expected)


def test_what_a_killed_run_left_behind_does_no_harm(tmp_path: Path) -> None:
    original = write_tiny_llama(tmp_path / "hf")
    write_tiny_llama(tmp_path / "out.partial", seed=1)
    (tmp_path / "out.partial" / ".places-7.json").write_text("half")
    convert(original, tmp_path / "out", "megatron")
    convert(tmp_path / "out", tmp_path / "back", "hf")
    assert same_weights(original, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "out"]
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    # 0.4 GB in fp32, of which one tensor is 0.3 GB
    original = write_tiny_llama(
        tmp_path / "hf", num_layers=4, hidden_size=1024, ffn_hidden_size=2048, vocab_size=75_000, tied=True
    )
    random_plan(architecture_of(original)).save(tmp_path / "plan.json")

    def peak(source: str, destination: str, *rest: str) -> float:
        return peak_memory(tmp_path / source, tmp_path / destination, *rest)

    assert peak("hf", "megatron", "megatron") < 200
    assert peak("megatron", "back", "hf") < 200
    assert peak("megatron", "student", "megatron", str(tmp_path / "plan.json")) < 200
    assert peak("hf", "nemo", "nemo") < 200
    assert peak("nemo", "bridge", "bridge", str(tmp_path / "plan.json")) < 200


@pytest.mark.slow
def test_memory_does_not_grow_with_a_mixture(tmp_path: Path) -> None:
    write_tiny("mixtral", tmp_path / "hf", hidden_size=1024, ffn_hidden_size=2048)  # 0.4 GB in fp32
    random_plan(architecture_of(tmp_path / "hf")).save(tmp_path / "plan.json")
    assert peak_memory(tmp_path / "hf", tmp_path / "megatron", "megatron") < 200
    plan = str(tmp_path / "plan.json")
    assert peak_memory(tmp_path / "megatron", tmp_path / "student", "megatron", plan) < 200
    assert peak_memory(tmp_path / "student", tmp_path / "exported", "hf") < 200


def test_fingerprint_sees_weights_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)  # several blocks a tensor
    original = write_tiny_llama(tmp_path / "hf")
    convert(original, tmp_path / "megatron", "megatron")
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(blocks, "PART_BYTES", 50_000)
    convert(original, tmp_path / "megatron-cut", "megatron")
    convert(tmp_path / "megatron", tmp_path / "back", "hf")
    convert(original, tmp_path / "half", "megatron", dtype=torch.bfloat16)
    other = write_tiny_llama(tmp_path / "other", seed=1)
    expected = fingerprint(original)
    for same in ("megatron", "megatron-cut", "back"):
        assert fingerprint(tmp_path / same) == expected
    assert fingerprint(tmp_path / "half") != expected
    assert fingerprint(other) != expected


def test_an_identity_sees_architecture_and_tokenizer_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_tiny_llama(tmp_path / "hf")
    convert(original, tmp_path / "megatron", "megatron")
    monkeypatch.setattr(blocks, "PART_BYTES", 50_000)
    convert(original, tmp_path / "megatron-cut", "megatron")
    identity, model = checkpoint_identity(tmp_path / "megatron"), model_identity(tmp_path / "megatron")
    assert checkpoint_identity(tmp_path / "megatron-cut") == identity
    changes = (
        ("megatron", "architecture.json", {"rotary_base": 5e5}),
        ("megatron", "architecture.json", {"layernorm_epsilon": 1e-6}),
        ("megatron", "architecture.json", {"max_position_embeddings": 1024}),
        ("megatron", "tokenizer/tokenizer_config.json", {"chat_template": "{{ messages }}"}),
        ("hf", "config.json", {"rope_theta": 5e5}),
        ("hf", "tokenizer_config.json", {"chat_template": "{{ messages }}"}),
    )
    for number, (name, file, change) in enumerate(changes):
        changed = shutil.copytree(tmp_path / name, tmp_path / f"changed-{number}")
        content = json.loads((changed / file).read_text())
        (changed / file).write_text(json.dumps(content | change))
        assert checkpoint_identity(changed) != checkpoint_identity(tmp_path / name), change
        assert (model_identity(changed) == model) == ("chat_template" in change), change
        assert fingerprint(changed) == fingerprint(original)
    shutil.rmtree(tmp_path / "megatron-cut" / "tokenizer")
    assert checkpoint_identity(tmp_path / "megatron-cut") != identity
    assert model_identity(tmp_path / "megatron-cut") == model


def test_cached_fingerprint_is_used_until_the_weights_change(tmp_path: Path) -> None:
    convert(write_tiny_llama(tmp_path / "hf"), tmp_path / "megatron", "megatron")
    cache = tmp_path / "megatron" / "fingerprints.json"
    expected = fingerprint(tmp_path / "megatron")
    cache.write_text(cache.read_text().replace(expected, "kept"))
    assert fingerprint(tmp_path / "megatron") == "kept"
    data = tmp_path / "megatron" / "__0_0.distcp"
    data.touch()
    assert fingerprint(tmp_path / "megatron") == expected
    assert not list(tmp_path.glob("hf/fingerprints*"))


def test_an_existing_checkpoint_is_replaced_and_other_directories_are_not(tmp_path: Path) -> None:
    first, second = write_tiny_llama(tmp_path / "a"), write_tiny_llama(tmp_path / "b", seed=1)
    convert(first, tmp_path / "out", "megatron")
    convert(second, tmp_path / "out", "hf")
    assert same_weights(second, tmp_path / "out")
    assert not (tmp_path / "out" / ".metadata").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a checkpoint"):
        convert(first, tmp_path / "home", "hf")
    with pytest.raises(UserError, match="the source itself"):
        convert(first, tmp_path / "a", "hf")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_replacing_works_where_directories_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = write_tiny_llama(tmp_path / "a"), write_tiny_llama(tmp_path / "b", seed=1)
    monkeypatch.setattr("minitron_nemo.checkpoint.files._exchange", lambda *_: False)
    convert(first, tmp_path / "out", "hf")
    convert(second, tmp_path / "out", "hf")
    assert same_weights(second, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_a_plan_for_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    original = write_tiny_llama(tmp_path / "hf")
    plan = random_plan(architecture_of(write_tiny_llama(tmp_path / "other", num_layers=8)))
    with pytest.raises(UserError, match="num_layers is 4, planned 8"):
        convert(original, tmp_path / "out", "hf", plan=plan)
    assert not list(tmp_path.glob("out*"))


def test_chosen_data_type_is_written_and_said(tmp_path: Path) -> None:
    original = write_tiny_llama(tmp_path / "hf")
    convert(original, tmp_path / "out", "hf", dtype=torch.bfloat16)
    before, after = weights(original), weights(tmp_path / "out")
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert open_source(tmp_path / "out").dtype("decoder.final_layernorm.weight") == torch.bfloat16


def test_a_destination_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write_tiny_llama(tmp_path / "hf")
    usage = sink.shutil.disk_usage(tmp_path)._replace(free=1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(sink.shutil, "disk_usage", lambda _: usage)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="make room"):
        convert(original, tmp_path / "out", "hf")
    assert not list(tmp_path.glob("out*"))
