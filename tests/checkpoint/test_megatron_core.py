"""Megatron-core and we read each other's checkpoints, at any layout and under either naming of layers."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor

from minitron_nemo.checkpoint import blocks
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.megatron_sink import MegatronSink
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.checkpoint.verify import verify
from minitron_nemo.errors import UserError
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.checkpoint.weights import architecture_of, random_plan, same_weights, weights
from tests.families import MIXTURES, cut, write_tiny
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.slow  # processes that import Megatron-core

LAYOUTS = {"TP1": (1, 1), "TP4": (4, 1), "PP2": (1, 2), "TP2-PP2": (2, 2)}


def _shard(hf: dict[str, torch.Tensor], model: Model, groups: int, head_dim: int) -> dict[str, torch.Tensor]:
    """What this rank's parameters have to be, cut by hand from Hugging Face weights. Padded vocabulary is zero."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    module = model.modules[0]
    expected: dict[str, torch.Tensor] = {}

    def vocabulary(name: str, rows: int) -> torch.Tensor:
        padded = torch.zeros(rows * size, hf[name].shape[1])
        padded[: hf[name].shape[0]] = hf[name]
        return padded[rank * rows : (rank + 1) * rows]

    for index, layer in enumerate(module.decoder.layers):
        prefix = f"model.layers.{layer.layer_number - 1}."
        q, k, v = (hf[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv")
        hidden = q.shape[1]
        q, k, v = q.view(groups, -1, hidden), k.view(groups, head_dim, hidden), v.view(groups, head_dim, hidden)
        qkv = torch.cat([q, k, v], 1).reshape(-1, hidden)
        ours = f"decoder.layers.{index}."
        gate, up = hf[prefix + "mlp.gate_proj.weight"], hf[prefix + "mlp.up_proj.weight"]
        expected |= {
            ours + "input_layernorm.weight": hf[prefix + "input_layernorm.weight"],
            ours + "self_attention.linear_qkv.weight": qkv.chunk(size)[rank],
            ours + "self_attention.linear_proj.weight": hf[prefix + "self_attn.o_proj.weight"].chunk(size, 1)[rank],
            ours + "pre_mlp_layernorm.weight": hf[prefix + "post_attention_layernorm.weight"],
            ours + "mlp.linear_fc1.weight": torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]]),
            ours + "mlp.linear_fc2.weight": hf[prefix + "mlp.down_proj.weight"].chunk(size, 1)[rank],
        }
    for name, parameter in module.named_parameters():
        if "word_embeddings" in name:
            expected[name] = vocabulary("model.embed_tokens.weight", parameter.shape[0])
        if name == "output_layer.weight":
            tied = model.architecture.share_embeddings_and_output_weights
            expected[name] = vocabulary("model.embed_tokens.weight" if tied else "lm_head.weight", parameter.shape[0])
    if module.post_process:
        expected["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    return expected


def _built(directory: Path, layout: tuple[int, int]) -> Model:
    architecture = open_source(directory).architecture
    sequence_parallel = layout[0] > 1 and architecture.num_moe_experts is not None
    sizes = Layout(*layout, sequence_parallel=sequence_parallel)
    launch.initialize(sizes, seed=1)
    return build_model(architecture, sizes, dtype=torch.float32)


def _loaded(directory: Path, layout: tuple[int, int]) -> Model:
    model = _built(directory, layout)
    load_model(model, directory)
    return model


def _mismatches(directory: Path, layout: tuple[int, int], hf: dict[str, torch.Tensor], groups: int) -> list[str]:
    model = _loaded(directory, layout)
    expected = _shard(hf, model, groups, head_dim=8)
    found = dict(model.modules[0].named_parameters())
    different = sorted(set(found) ^ set(expected))
    return different + [name for name in found if name in expected and not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ours_loads_in_megatron_core_bit_equal(tmp_path: Path, layout: str, tied: bool) -> None:
    original = write_tiny_llama(tmp_path / "hf", tied=tied)
    convert(original, tmp_path / "megatron", "megatron", progress=False)
    size = LAYOUTS[layout][0] * LAYOUTS[layout][1]
    results = run_distributed(size, _mismatches, tmp_path / "megatron", LAYOUTS[layout], weights(original), 4)
    assert results == [[]] * size


def test_pruned_loads_in_megatron_core_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    original = write_tiny_llama(tmp_path / "hf")
    plan = random_plan(architecture_of(original))
    convert(original, tmp_path / "student", "megatron", plan=plan, progress=False)
    results = run_distributed(2, _mismatches, tmp_path / "student", (2, 1), cut(weights(original), plan), 4)
    assert results == [[]] * 2


def _load_strictly(model: Model, directory: Path) -> torch.nn.Module:
    module = model.modules[0]
    state = module.sharded_state_dict()
    assert any("_extra_state" in key for key in state)
    module.load_state_dict(dist_checkpointing.load(state, str(directory)), strict=True)
    return module


def _strict_load_mismatches(directory: Path, layout: tuple[int, int], hf: dict[str, torch.Tensor]) -> list[str]:
    """Megatron's own load, extra states included, as Megatron-LM does it; vocabularies are left to the tests above."""
    model = _built(directory, layout)
    module = _load_strictly(model, directory)
    expected = _shard(hf, model, 4, head_dim=8)
    found = dict(module.named_parameters())
    return [name for name in found if "decoder" in name and not torch.equal(found[name], expected[name])]


def test_ours_has_all_that_megatron_cores_strict_load_asks_for(tmp_path: Path) -> None:
    original = write_tiny_llama(tmp_path / "hf")
    convert(original, tmp_path / "megatron", "megatron", progress=False)
    results = run_distributed(4, _strict_load_mismatches, tmp_path / "megatron", (2, 2), weights(original))
    assert results == [[]] * 4


def _save_with_megatron(source: Path, destination: Path, layout: tuple[int, int], prefix: str, naming: dict) -> None:
    """Megatron-core's own save of a model, with an optimizer state and a random state beside it."""
    model = _loaded(source, layout)
    state: dict[str, Any] = model.modules[0].sharded_state_dict(prefix=prefix, metadata=naming or None)
    if launch.rank() == 0:
        destination.mkdir()
        model.architecture.save(destination)
    moments = torch.ones(4, 4)
    key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    state["moments"] = ShardedTensor.from_rank_offsets(key, moments, replica_id=launch.rank())
    state["iteration"] = 7
    launch.barrier()
    dist_checkpointing.save(state, str(destination), async_sharded_save=False, content_metadata=naming or None)


@pytest.mark.parametrize(
    ("prefix", "naming", "layout"),
    [
        ("", {}, (2, 2)),
        ("module.", {}, (4, 1)),
        ("", {"singleton_local_shards": True}, (2, 2)),
        ("module.", {"non_homogeneous_layers": True}, (1, 2)),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_megatron_cores_checkpoints_read_bit_equal(
    tmp_path: Path, prefix: str, naming: dict, layout: tuple[int, int], tied: bool
) -> None:
    original = write_tiny_llama(tmp_path / "hf", tied=tied)
    convert(original, tmp_path / "ours", "megatron", progress=False)
    theirs = tmp_path / "theirs"
    run_distributed(layout[0] * layout[1], _save_with_megatron, tmp_path / "ours", theirs, layout, prefix, naming)
    with open(theirs / ".metadata", "rb") as file:
        keys = pickle.load(file).state_dict_metadata
    assert any(key.startswith("optimizer.") for key in keys)
    assert any(key.endswith("linear_fc1.weight_w") for key in keys) == ("singleton_local_shards" in naming)
    assert keys[prefix + "embedding.word_embeddings.weight"].size[0] > 259  # padded
    convert(theirs, tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")
    assert fingerprint(theirs) == fingerprint(original)
    said = open_source(theirs).layout()
    assert f"tensor_model_parallel_size {layout[0]}, pipeline_model_parallel_size {layout[1]}," in said
    assert ("per layer" in said) == bool(naming)


def _load_strictly_and_save(source: Path, destination: Path, layout: tuple[int, int]) -> None:
    module = _load_strictly(_built(source, layout), source)
    if launch.rank() == 0:
        destination.mkdir()
    launch.barrier()
    dist_checkpointing.save(module.sharded_state_dict(), str(destination), async_sharded_save=False)


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_have_the_keys_and_shapes_that_megatron_core_saves(tmp_path: Path, family: str) -> None:
    convert(write_tiny(family, tmp_path / "hf"), tmp_path / "ours", "megatron", progress=False)
    run_distributed(2, _load_strictly_and_save, tmp_path / "ours", tmp_path / "theirs", (2, 1))
    found: list[dict[str, Any]] = []
    for name in ("ours", "theirs"):
        with open(tmp_path / name / ".metadata", "rb") as file:
            metadata = pickle.load(file).state_dict_metadata
        found.append({key: getattr(entry, "size", None) for key, entry in metadata.items()})
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            found[-1][key] = found[-1][key][1:]  # theirs have padded vocabularies
    assert found[0] == found[1]
    experts = architecture_of(tmp_path / "hf").num_moe_experts
    assert found[0]["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (4, experts, 192, 64)


@pytest.mark.parametrize(
    ("naming", "layout"),
    [({}, (1, 2)), ({"singleton_local_shards": True}, (2, 1)), ({"non_homogeneous_layers": True}, (2, 1))],
)
def test_mixtures_of_megatron_core_read_bit_equal(tmp_path: Path, naming: dict, layout: tuple[int, int]) -> None:
    original = write_tiny("qwen2_moe", tmp_path / "hf")
    convert(original, tmp_path / "ours", "megatron", progress=False)
    theirs = tmp_path / "theirs"
    run_distributed(2, _save_with_megatron, tmp_path / "ours", theirs, layout, "module.", naming)
    convert(theirs, tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")
    assert fingerprint(theirs) == fingerprint(original)
    said = open_source(theirs).layout()
    assert f"tensor_model_parallel_size {layout[0]}, pipeline_model_parallel_size {layout[1]}," in said
    assert ("per layer" in said) == bool(naming)


def _convert_in_job(source: Path, destination: Path, to: str, plan: Any) -> None:
    before, blocks.BLOCK_BYTES, blocks.PART_BYTES = (blocks.BLOCK_BYTES, blocks.PART_BYTES), 5000, 40_000
    try:
        convert(
            source,
            destination,
            to,
            plan=plan,
            rank=launch.rank(),
            world_size=launch.world_size(),
            gather=launch.gather,
        )
    finally:
        blocks.BLOCK_BYTES, blocks.PART_BYTES = before


def _cannot_write_in_job(source: Path, destination: Path, failing: int) -> tuple[str, str]:
    """What `convert` raises on this rank when one cannot write: its type and its text."""
    broken = patch.object(MegatronSink, "write", side_effect=OSError(5, "Input/output error"))
    with broken if launch.rank() == failing else nullcontext(), pytest.raises(UserError) as caught:
        _convert_in_job(source, destination, "megatron", None)
    return type(caught.value).__name__, str(caught.value)


def test_what_one_process_cannot_write_is_said_by_rank_0_and_known_to_all(tmp_path: Path) -> None:
    original = write_tiny_llama(tmp_path / "hf")
    said = run_distributed(3, _cannot_write_in_job, original, tmp_path / "out", 2)
    assert [name for name, _ in said] == ["UserError", "SaidByRankZero", "SaidByRankZero"]
    assert {text.partition(";")[0] for _, text in said} == {
        f"rank 2: {tmp_path / 'out'}: not written: Input/output error"
    }
    run_distributed(2, _convert_in_job, original, tmp_path / "out", "megatron", None)
    assert verify(original, tmp_path / "out", progress=False) is None


def test_any_number_of_processes_writes_the_same_weights(tmp_path: Path) -> None:
    original = write_tiny_llama(tmp_path / "hf", tied=True, dtype=torch.bfloat16)
    plan = random_plan(architecture_of(original))
    for count in (1, 3):
        run_distributed(count, _convert_in_job, original, tmp_path / f"megatron{count}", "megatron", plan)
        run_distributed(count, _convert_in_job, tmp_path / f"megatron{count}", tmp_path / f"hf{count}", "hf", None)
    files = [sorted((tmp_path / f"megatron{count}").glob("*.distcp")) for count in (1, 3)]
    assert len(files[0]) > 3
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    assert (tmp_path / "hf1/model.safetensors").read_bytes() == (tmp_path / "hf3/model.safetensors").read_bytes()
    expected = cut(weights(original), plan)
    found = weights(tmp_path / "hf3")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
