"""Checkpoints of Megatron-LM before torch_dist are put together from their shards, under any of their names."""

from __future__ import annotations

import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron_nemo.checkpoint.inspect import describe
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.models.build import build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.checkpoint.refusals import Hostile, refused
from tests.checkpoint.weights import architecture_of, peak_memory, same_weights, weights
from tests.pool import run_distributed
from tests.tiny import LLAMA3_ROPE, write_tiny_llama

ARGUMENTS = {  # of arguments.py in Megatron-LM, for the tiny Llama
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 8,
    "max_position_embeddings": 512,
    "seq_length": 128,
    "norm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_base": 10000,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 259,
    "padded_vocab_size": 272,
    "params_dtype": torch.float32,
}


def _before_core(name: str) -> str:
    for new, old in (
        (r"^decoder\.", "encoder."),
        (r"final_layernorm", "final_norm"),
        (r"self_attention\.linear_qkv\.layer_norm_weight", "input_norm.weight"),
        (r"mlp\.linear_fc1\.layer_norm_weight", "post_attention_norm.weight"),
        (r"linear_qkv", "query_key_value"),
        (r"linear_proj", "dense"),
        (r"linear_fc1", "dense_h_to_4h"),
        (r"linear_fc2", "dense_4h_to_h"),
    ):
        name = re.sub(new, old, name)
    return name


# Names of Megatron-core with TransformerEngine, of its own layers, and of the models before it.
NAMINGS: dict[str, Callable[[str], str]] = {
    "transformer_engine": lambda name: name,
    "local": lambda name: name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight").replace(
        "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
    ),
    "before": _before_core,
}


def _layer(hf: dict[str, torch.Tensor], index: int, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """A tensor-parallel slice of one layer, cut by hand from Hugging Face weights."""
    prefix = f"model.layers.{index}."
    q, k, v = (hf[f"{prefix}self_attn.{name}_proj.weight"].view(4, -1, 64) for name in "qkv")
    gate, up = hf[prefix + "mlp.gate_proj.weight"], hf[prefix + "mlp.up_proj.weight"]
    return {
        "self_attention.linear_qkv.layer_norm_weight": hf[prefix + "input_layernorm.weight"],
        "self_attention.linear_qkv.weight": torch.cat([q, k, v], 1).reshape(-1, 64).chunk(ranks)[rank],
        "self_attention.linear_proj.weight": hf[prefix + "self_attn.o_proj.weight"].chunk(ranks, 1)[rank],
        "mlp.linear_fc1.layer_norm_weight": hf[prefix + "post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]]),
        "mlp.linear_fc2.weight": hf[prefix + "mlp.down_proj.weight"].chunk(ranks, 1)[rank],
    }


def _vocabulary(weight: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    padded = torch.full((-(-weight.shape[0] // 16) * 16, weight.shape[1]), 7.0)
    padded[: weight.shape[0]] = weight
    return padded.chunk(ranks)[rank]


def _write(hf: Path, directory: Path, ranks: int, stages: list[list[list[int]]], naming: str, **changed: Any) -> Path:
    """Shards as Megatron-LM saves them; `stages[stage][virtual]` are the layers there."""
    original = weights(hf)
    for rank in range(ranks):
        for stage, chunks in enumerate(stages):
            models = []
            for virtual, layers in enumerate(chunks):
                first = stage == virtual == 0
                last = stage == len(stages) - 1 and virtual == len(chunks) - 1
                model: dict[str, torch.Tensor | None] = {}
                if first:
                    embedding = _vocabulary(original["model.embed_tokens.weight"], rank, ranks)
                    model["embedding.word_embeddings.weight"] = embedding
                for index, layer in enumerate(layers):
                    cut = _layer(original, layer, rank, ranks)
                    model |= {f"decoder.layers.{index}.{name}": tensor.clone() for name, tensor in cut.items()}
                    model[f"decoder.layers.{index}.mlp.linear_fc1._extra_state"] = None
                if last:
                    output = original.get("lm_head.weight", original["model.embed_tokens.weight"])
                    model["decoder.final_layernorm.weight"] = original["model.norm.weight"]
                    model["output_layer.weight"] = _vocabulary(output, rank, ranks)
                named = {NAMINGS[naming](name): tensor for name, tensor in model.items()}
                models.append({"language_model": named} if naming == "before" else named)
            content: dict[str, Any] = {
                "args": Namespace(**{**ARGUMENTS, "pipeline_model_parallel_size": len(stages), **changed}),
                "checkpoint_version": 3.0,
                "iteration": 10,
                "rng_state": [{"np_rng_state": np.random.RandomState(0).get_state(), "random": torch.ByteTensor([1])}],
                "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
                **({"model": models[0]} if len(models) == 1 else {f"model{i}": m for i, m in enumerate(models)}),
            }
            suffix = f"_{stage:03d}" if len(stages) > 1 else ""
            file = directory / "iter_0000010" / f"mp_rank_{rank:02d}{suffix}" / "model_optim_rng.pt"
            file.parent.mkdir(parents=True)
            torch.save(content, file)
    (directory / "latest_checkpointed_iteration.txt").write_text("10")
    return directory


@pytest.mark.parametrize(
    ("ranks", "stages", "naming"),
    [
        (1, [[[0, 1, 2, 3]]], "transformer_engine"),
        (4, [[[0, 1, 2, 3]]], "local"),
        (2, [[[0, 1]], [[2, 3]]], "before"),
        (2, [[[0]], [[1, 2, 3]]], "transformer_engine"),  # uneven
        (1, [[[0], [2]], [[1], [3]]], "local"),  # interleaved
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_shards_make_the_model(
    tmp_path: Path, ranks: int, stages: list[list[list[int]]], naming: str, tied: bool
) -> None:
    original = write_tiny_llama(tmp_path / "hf", tied=tied)
    source = _write(original, tmp_path / "legacy", ranks, stages, naming, untie_embeddings_and_output_weights=not tied)
    convert(source, tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")
    facts = describe(source / "iter_0000010")
    assert facts["format"] == "legacy"
    assert f"tensor_model_parallel_size {ranks}, pipeline_model_parallel_size {len(stages)}" in facts["layout"]
    assert open_source(source).architecture == architecture_of(original)


def test_arguments_tell_rotary_scaling_and_multi_head_attention(tmp_path: Path) -> None:
    rope = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    original = write_tiny_llama(tmp_path / "hf", rope_scaling=rope)
    scaled = {"use_rope_scaling": True, "rope_scaling_factor": 8.0}
    source = _write(original, tmp_path / "legacy", 1, [[[0, 1, 2, 3]]], "local", **scaled)
    assert open_source(source).architecture == architecture_of(original)
    plain = {"group_query_attention": False, "num_query_groups": 1}
    source = _write(original, tmp_path / "plain", 1, [[[0, 1, 2, 3]]], "local", **plain)
    refused(source, r"linear_qkv.weight has shape \[128, 64\].*says \[192, 64\]", tmp_path)


def test_the_tokenizer_beside_the_shards_goes_along(tmp_path: Path) -> None:
    original = write_tiny_llama(tmp_path / "hf")
    source = _write(original, tmp_path / "legacy", 1, [[[0, 1, 2, 3]]], "local", vocab_size=None)
    assert open_source(source).architecture.vocab_size == 272  # nothing tells how much of it is padding
    original.rename(source / "tokenizer")
    convert(source, tmp_path / "back", "hf", progress=False)
    assert same_weights(source / "tokenizer", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def _save_shard(source: Path, directory: Path) -> None:
    """What Megatron-LM's generate_state_dict saves of a model, on this rank."""
    layout = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    launch.initialize(layout, seed=1)
    model = build_model(open_source(source).architecture, layout, dtype=torch.float32)
    load_model(model, source)
    tensor_rank, stage = launch.rank() % 2, launch.rank() // 2
    file = directory / f"mp_rank_{tensor_rank:02d}_{stage:03d}" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    state = model.modules[0].state_dict_for_save_checkpoint()
    torch.save({"args": Namespace(**ARGUMENTS), "checkpoint_version": 3.0, "model": state}, file)


@pytest.mark.slow
def test_megatron_cores_own_state_dicts_are_read(tmp_path: Path) -> None:
    original = write_tiny_llama(tmp_path / "hf")
    convert(original, tmp_path / "ours", "megatron", progress=False)
    run_distributed(4, _save_shard, tmp_path / "ours", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    rows = 1_200_000  # 0.3 GB of embedding in one of two files
    original = write_tiny_llama(tmp_path / "hf", vocab_size=rows, tied=True)
    sizes = {"vocab_size": rows, "untie_embeddings_and_output_weights": False}
    source = _write(original, tmp_path / "legacy", 2, [[[0, 1, 2, 3]]], "local", **sizes)
    assert peak_memory(source, tmp_path / "back", "hf") < 200
    assert same_weights(original, tmp_path / "back")


def _edit(source: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = source / "iter_0000010" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)  # written by this test
    change(content)
    torch.save(content, file)


def _compress(source: Path) -> None:
    file = source / "iter_0000010" / "mp_rank_01" / "model_optim_rng.pt"
    with zipfile.ZipFile(file) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries.items():
            new.writestr(name, content)


FC2 = "decoder.layers.2.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: _edit(s, lambda c: c.pop("args")), "refused: 'args'"),
        (lambda s: _edit(s, lambda c: c.update(checkpoint_version=2.0)), "checkpoint_version 2.0"),
        (lambda s: _edit(s, lambda c: c["model"].pop(FC2)), f"{FC2} is missing in tensor-parallel rank 1"),
        (lambda s: _edit(s, lambda c: c["model"].update({FC2: torch.ones(64, 47)})), "fc2.weight has shape"),
        (lambda s: _edit(s, lambda c: c["model"].update({FC2: torch.ones(48, 64).t()})), "strides"),
        (lambda s: _edit(s, lambda c: c["model"].update({FC2: torch.ones(9)})), "fc2.weight does not have 2 dims"),
        (lambda s: _edit(s, lambda c: c.update(model0=c["model"], model1=c.pop("model"))), "virtual stages"),
        (lambda s: _edit(s, lambda c: c["model"].update(x=c["model"])), "refused: maximum recursion"),
        (lambda s: _edit(s, lambda c: c["model"].update({FC2: torch.ones(64, 48).int()})), "IntStorage"),
        (_compress, "compressed"),
        (lambda s: (s / "iter_0000010/mp_rank_01/model_optim_rng.pt").unlink(), "rank 1, stage 0 is not there"),
        (lambda s: (s / "iter_0000010/mp_rank_01").rename(s / "iter_0000010/mp_rank_01_000_000"), "expert"),
        (lambda s: (s / "iter_0000010/mp_rank_01/model_optim_rng.pt").write_bytes(b"PK"), "refused"),
    ],
)
@pytest.mark.fast_cases(7)
def test_damaged_shards(tmp_path: Path, change: Callable[[Path], Any], named: str) -> None:
    source = _write(write_tiny_llama(tmp_path / "hf"), tmp_path / "source", 2, [[[0, 1, 2, 3]]], "local")
    change(source)
    refused(source, named, tmp_path)


def test_tensors_that_nobody_knows_are_not_lost_in_silence(tmp_path: Path) -> None:
    source = _write(write_tiny_llama(tmp_path / "hf"), tmp_path / "source", 2, [[[0, 1, 2, 3]]], "local")
    for rank in ("00", "01"):
        file = source / "iter_0000010" / f"mp_rank_{rank}" / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        content["model"]["decoder.layers.0.mlp.linear_fc1.bias"] = torch.ones(96)
        torch.save(content, file)
    refused(source, "linear_fc1.bias is not part", tmp_path)


@pytest.mark.parametrize("where", ["args", "model", "rng_state", "optimizer"])
def test_hostile_shards_run_nothing(tmp_path: Path, where: str) -> None:
    marker = tmp_path / "marker"
    source = _write(write_tiny_llama(tmp_path / "hf"), tmp_path / "source", 2, [[[0, 1, 2, 3]]], "local")
    for function, argument in ((os.system, f"touch {marker}"), (eval, f"open({str(marker)!r}, 'w')")):
        _edit(source, lambda content: content.update({where: Hostile(function, argument)}))  # noqa: B023
        refused(source, "it names", tmp_path)
        source = _write(tmp_path / "hf", tmp_path / "again" / function.__name__, 2, [[[0, 1, 2, 3]]], "local")
    assert not marker.exists()
