"""`verify` says yes to what the transform writes, and names whatever is done to it afterwards."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.arch import Plan
from minitron_nemo.arch.matrix import ADD, GAIN, REPLACE
from minitron_nemo.arch.plan import FILE_NAME
from minitron_nemo.checkpoint import blocks, dense, huggingface
from minitron_nemo.checkpoint.dense import DenseMaps, MatrixFile
from minitron_nemo.checkpoint.sink import FORMATS
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.checkpoint.verify import Difference, verify, verify_record
from minitron_nemo.cli import main
from minitron_nemo.errors import UserError
from tests.checkpoint.weights import architecture_of, random_plan, weights
from tests.families import write_tiny
from tests.tiny import write_tiny_llama

EMBEDDING = "embedding.word_embeddings.weight"
QKV = "decoder.layers.{}.self_attention.linear_qkv."
FC1 = "decoder.layers.{}.mlp.linear_fc1."
FC2 = "decoder.layers.{}.mlp.linear_fc2.weight"
PROJECTION = "decoder.layers.{}.self_attention.linear_proj.weight"
EXPERT = "decoder.layers.{}.mlp.experts.experts.{}."
SHARED = "decoder.layers.{}.mlp.shared_experts.linear_fc1.weight"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a tensor, parts a checkpoint, files."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(blocks, "PART_BYTES", 50_000)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 100_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "source")


KINDS = ("select", "groups", "experts", "merged", "dense", "rotated")


def formats(kind: str) -> tuple[str, ...]:
    """NeMo's and Megatron-Bridge's are written as Megatron's are, and NeMo knows no mixture."""
    return ("hf", "megatron") if kind in ("groups", "experts", "rotated") else FORMATS


def source_of(kind: str, directory: Path) -> Path:
    return write_tiny("qwen2_moe", directory) if kind == "experts" else write_tiny_llama(directory)


def plan_of(kind: str, source: Path, directory: Path) -> Plan:
    """Cuts of all axes. "groups": of query groups too; "experts": of a mixture's; "merged": with merges of heads and
    factors on norms; "dense": with matrices as well; "rotated": with channels that are combinations of the source's.
    """
    model = architecture_of(source)
    if kind == "identity":
        return Plan.identity(model)
    plan = random_plan(model, groups=2 if kind == "groups" else None)
    layers = range(plan.target.num_layers)
    if kind in ("select", "groups", "experts"):
        return plan
    norms = [name.format(layer) + "layer_norm_weight" for layer in layers for name in (QKV, FC1)]
    readers = [name.format(layer) + "weight" for layer in layers for name in (QKV, FC1)]
    before, after = plan.source, plan.target
    width = (before.hidden_size, after.hidden_size)
    shapes = {FC2.format(layer): (ADD, (before.ffn_hidden_size - after.ffn_hidden_size, 64)) for layer in layers}
    if kind == "rotated":
        shapes |= dict.fromkeys([*readers, EMBEDDING, "output_layer.weight"], (REPLACE, width))
        shapes |= dict.fromkeys([*norms, "decoder.final_layernorm.weight"], (GAIN, (1, after.hidden_size)))
        return with_matrices(replace(plan, kept_hidden=None, rotated=True), shapes, directory)
    heads = tuple(tuple((head, head ^ 1) for head in kept) for kept in plan.kept_heads or ())  # a group has two
    plan = replace(plan, merged_heads=heads)
    if kind == "merged":
        return replace(plan, norm_scales={name: 0.7 + place for place, name in enumerate(norms)})
    shapes |= dict.fromkeys(readers, (REPLACE, width)) | dict.fromkeys(norms, (GAIN, (1, after.hidden_size)))
    return with_matrices(plan, shapes, directory)


def with_matrices(plan: Plan, shapes: dict[str, tuple[str, tuple[int, int]]], directory: Path) -> Plan:
    """The Plan with random matrices of these kinds and shapes, written to `directory`."""
    directory.mkdir()
    file = MatrixFile(directory, {name: shape for name, (_, shape) in shapes.items()})
    file.prepare()
    generator = torch.Generator().manual_seed(1)
    matrices = {
        name: file.write(name, how, torch.randn(shape, generator=generator)) for name, (how, shape) in shapes.items()
    }
    replace(plan, matrices=matrices).save(directory / FILE_NAME)
    return Plan.load(directory / FILE_NAME)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["identity", *KINDS])
@pytest.mark.slow
def test_what_the_transform_writes_is_what_the_plan_says(tmp_path: Path, kind: str, dtype: torch.dtype | None) -> None:
    source = source_of(kind, tmp_path / "source")
    plan = plan_of(kind, source, tmp_path / "plan")
    for to in formats(kind):
        convert(source, tmp_path / to, to, plan=plan, dtype=dtype, progress=False)
        for world_size in (1, 3):
            for rank in range(world_size):
                assert verify(source, tmp_path / to, plan, rank=rank, world_size=world_size, progress=False) is None
        assert verify(source, tmp_path / to, progress=False) is None  # by the plan that it carries, or none
        assert verify_record(tmp_path / to, progress=False) is None


def flip_bit(student: Path, row: bytes, byte: int, bit: int) -> None:
    """Flip a bit of the one place in the student's files that holds these bytes."""
    files = [file for file in student.rglob("*") if file.suffix in (".safetensors", ".distcp")]
    (file,) = (file for file in files if file.name != "plan.safetensors" and row in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.find(row) + byte] ^= 1 << bit
    file.write_bytes(content)


# Hugging Face's name and row of a student's tensor, ours of both; a byte of the row, a bit of that.
OF_LLAMA = (
    ("model.embed_tokens.weight", 258, EMBEDDING, 258, 3, 7),
    ("model.layers.2.mlp.down_proj.weight", 17, FC2.format(2), 17, 255, 0),
    ("model.layers.1.mlp.gate_proj.weight", 40, FC1.format(1) + "weight", 40, 96, 4),
)
PLACES: dict[str, tuple[tuple[str, int, str, int, int, int], ...]]
PLACES = dict.fromkeys(("select", "merged", "dense"), OF_LLAMA)
PLACES["groups"] = (  # a head, its key and its value, of 8 rows each
    ("model.layers.0.self_attn.k_proj.weight", 11, QKV.format(0) + "weight", 24 + 8 + 3, 7, 0),
    ("model.layers.2.self_attn.v_proj.weight", 4, QKV.format(2) + "weight", 16 + 4, 190, 6),
    ("model.layers.1.self_attn.o_proj.weight", 30, PROJECTION.format(1), 30, 0, 1),
)
PLACES["experts"] = (
    ("model.layers.1.mlp.experts.3.up_proj.weight", 5, EXPERT.format(1, 3) + "linear_fc1.weight", 64 + 5, 100, 2),
    ("model.layers.0.mlp.gate.weight", 2, "decoder.layers.0.mlp.router.weight", 2, 8, 0),
    ("model.layers.0.mlp.shared_expert.gate_proj.weight", 39, SHARED.format(0), 39, 4, 3),
)
PLACES["rotated"] = (
    OF_LLAMA[1],
    ("model.layers.0.self_attn.o_proj.weight", 12, PROJECTION.format(0), 12, 127, 0),
    ("lm_head.weight", 0, "output_layer.weight", 0, 191, 7),
)


@pytest.mark.parametrize(("kind", "to"), [(kind, to) for kind in KINDS for to in formats(kind)])
@pytest.mark.fast_cases(1)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, kind: str, to: str) -> None:
    source = source_of(kind, tmp_path / "source")
    plan = plan_of(kind, source, tmp_path / "plan")
    convert(source, tmp_path / "hf", "hf", plan=plan, progress=False)
    rows = weights(tmp_path / "hf")  # read by safetensors
    student = tmp_path / "student"
    for name, place, ours, row, byte, bit in PLACES[kind]:
        convert(source, student, to, plan=plan, progress=False)
        flip_bit(student, rows[name][place].numpy().tobytes(), byte, bit)
        found = verify(source, student, plan, progress=False)
        assert found is not None and found.text.startswith(f"{ours}: row {row}, column {byte // 4} holds "), found
        # One process of a job finds it.
        of_all = [verify(source, student, plan, rank=rank, world_size=3, progress=False) for rank in range(3)]
        assert [difference for difference in of_all if difference is not None] == [found]
        recorded = verify_record(student, progress=False)
        assert recorded is not None and recorded.text.startswith(f"{ours} is not what was written")


def test_the_first_of_several_differences_is_named(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "student", "megatron", progress=False)
    rows = weights(source)
    for name, row in (("lm_head.weight", 9), ("model.layers.1.mlp.up_proj.weight", 50)):
        flip_bit(tmp_path / "student", rows[name][row].numpy().tobytes(), 0, 0)
    found = verify(source, tmp_path / "student", progress=False)
    assert found is not None and found.text.startswith(FC1.format(1) + "weight: row 146, ")  # gate over up


def test_a_zero_of_the_other_sign_and_another_nan_are_other_bits(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3], tensors["model.norm.weight"][4] = 0.0, torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    for entry in (3, 4):
        convert(source, tmp_path / "student", "hf", progress=False)
        assert verify(source, tmp_path / "student", progress=False) is None
        flip_bit(tmp_path / "student", tensors["model.norm.weight"].numpy().tobytes(), 4 * entry + 3, 7)
        found = verify(source, tmp_path / "student", progress=False)
        assert found is not None and found.text.startswith(f"decoder.final_layernorm.weight: row {entry} holds ")


def other_order(columns: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The product of the columns that go, last to first, with a matrix whose rows are of the first to the last."""

    def wrong(maps: DenseMaps, name: str, block: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
        if maps.plan.matrices[name].kind == ADD:
            others = np.array([column for column in range(block.shape[1]) if column not in kept])
            block = block.clone()
            block[:, others] = block[:, others[::-1].copy()]
        return columns(maps, name, block, kept)

    return wrong


def in_bf16(columns: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrong(maps: DenseMaps, name: str, block: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
        return columns(maps, name, block.bfloat16() if maps.plan.matrices[name].kind == REPLACE else block, kept)

    return wrong


def other_rows(add_rotated: Callable[..., None]) -> Callable[..., None]:
    def wrong(maps: DenseMaps, result: torch.Tensor, block: torch.Tensor, first: int, rows: slice) -> None:
        add_rotated(maps, result, block.flip(0), first, rows)

    return wrong


# A plan, what is wrong with the writer's products, and the first tensor that shows it.
WRITERS: dict[str, tuple[str, str, Callable[..., Any], str]] = {
    "complement": ("dense", "columns", other_order, FC2.format(0)),
    "complement, rotated": ("rotated", "columns", other_order, FC2.format(0)),
    "precision": ("dense", "columns", in_bf16, QKV.format(0) + "weight"),
    "rotation": ("rotated", "add_rotated", other_rows, PROJECTION.format(0)),
}


@pytest.mark.parametrize("wrong", WRITERS)
def test_products_that_the_writer_has_wrong_are_found_though_verify_has_its_bits_from_there(
    wrong: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, method, change, named = WRITERS[wrong]
    plan = plan_of(kind, source, tmp_path / "plan")
    monkeypatch.setattr(dense, "BLOCK_BYTES", 2000)  # a matrix in several blocks
    monkeypatch.setattr(DenseMaps, method, change(getattr(DenseMaps, method)))
    convert(source, tmp_path / "student", "megatron", plan=plan, progress=False)
    found = verify(source, tmp_path / "student", plan, progress=False)
    assert found is not None and found.text.startswith(f"{named}: row "), found


def exchange(first: Path, second: Path) -> None:
    beside = first.with_name("beside")
    first.rename(beside)
    second.rename(first)
    beside.rename(second)


@pytest.mark.parametrize("to", ["hf", "megatron"])
@pytest.mark.fast_cases(1)
def test_truncated_and_exchanged_files_are_found(source: Path, tmp_path: Path, to: str) -> None:
    student, pattern = tmp_path / "student", {"hf": "*.safetensors", "megatron": "*.distcp"}[to]
    convert(source, student, to, progress=False)
    files = sorted(student.glob(pattern))
    pairs = [
        pair for pair in itertools.combinations(files, 2) if to == "hf" or len({f.stat().st_size for f in pair}) == 1
    ]
    assert pairs
    checks = (lambda: verify(source, student, progress=False), lambda: verify_record(student, progress=False))
    for first, second in pairs:
        exchange(first, second)
        for check in checks:
            with suppress(UserError):  # where their headers are of other tensors
                assert check() is not None
        exchange(first, second)
    assert verify(source, student, progress=False) is None
    files[1].write_bytes(files[1].read_bytes()[:-2000])
    for check in checks:
        with pytest.raises(UserError, match="truncated"):
            check()


@pytest.mark.parametrize("kind", ["select", "merged", "dense"])
def test_another_plan_or_another_source_is_found(source: Path, tmp_path: Path, kind: str) -> None:
    plan = plan_of(kind, source, tmp_path / "plan")
    convert(source, tmp_path / "student", "megatron", plan=plan, progress=False)

    def differs(plan: Plan, source: Path = source) -> str:
        found = verify(source, tmp_path / "student", plan, progress=False)
        assert found is not None
        return found.text

    assert plan.kept_ffn is not None
    dropped = min(set(range(96)) - set(plan.kept_ffn[1]))
    neurons = tuple(sorted({*plan.kept_ffn[1], dropped} - {max(plan.kept_ffn[1])}))
    assert differs(replace(plan, kept_ffn=(plan.kept_ffn[0], neurons, plan.kept_ffn[2]))).startswith(FC1.format(1))
    other = next(layer for layer in range(4) if layer not in plan.kept_layers)
    layers = tuple(sorted({*plan.kept_layers, other} - {plan.kept_layers[0]}))
    assert "layers.0." in differs(replace(plan, kept_layers=layers))
    foreign = write_tiny_llama(tmp_path / "other", seed=1)
    assert differs(plan, foreign).startswith("embedding.word_embeddings.weight: row 0")
    if kind == "merged":
        scales = {**plan.norm_scales, FC1.format(2) + "layer_norm_weight": 0.71}
        assert differs(replace(plan, norm_scales=scales)).startswith(FC1.format(2) + "layer_norm_weight: row 0 ")
        assert differs(replace(plan, merged_heads=None)).startswith(QKV.format(0) + "weight: row 0")


@pytest.mark.parametrize(("kind", "named"), [("groups", QKV.format(1)), ("experts", "decoder.layers.1.mlp.")])
def test_other_groups_and_other_experts_of_a_layer_are_found(tmp_path: Path, kind: str, named: str) -> None:
    source = source_of(kind, tmp_path / "source")
    plan = plan_of(kind, source, tmp_path / "plan")
    convert(source, tmp_path / "student", "megatron", plan=plan, progress=False)
    if kind == "groups":
        assert plan.kept_groups is not None and plan.kept_heads is not None
        others = tuple(sorted(set(range(4)) - set(plan.kept_groups[1])))
        groups = (plan.kept_groups[0], others, plan.kept_groups[2])
        heads = (plan.kept_heads[0], tuple(2 * group for group in others), plan.kept_heads[2])
        plan = replace(plan, kept_groups=groups, kept_heads=heads)
    else:
        assert plan.kept_experts is not None
        (out,) = set(range(5)) - set(plan.kept_experts[1])
        swapped = sorted({*plan.kept_experts[1], out} - {max(plan.kept_experts[1])})
        plan = replace(plan, kept_experts=(plan.kept_experts[0], tuple(swapped), plan.kept_experts[2]))
    found = verify(source, tmp_path / "student", plan, progress=False)
    assert found is not None and found.text.startswith(named)


def test_a_student_of_another_shape_is_a_difference_and_a_plan_for_another_model_an_error(
    source: Path, tmp_path: Path
) -> None:
    plan = plan_of("select", source, tmp_path / "plan")
    convert(source, tmp_path / "student", "megatron", plan=plan, progress=False)
    found = verify(source, tmp_path / "student", Plan.identity(plan.source), progress=False)
    assert found == Difference(-1, "its num_layers is 3, the plan's 4")
    with pytest.raises(UserError, match="the plan is for another model"):
        verify(write_tiny_llama(tmp_path / "other", num_layers=5), tmp_path / "student", plan, progress=False)


def test_where_nothing_is_recorded_it_says_what_to_give(source: Path) -> None:
    with pytest.raises(UserError, match="fingerprints.json: not there.*give the source as well"):
        verify_record(source, progress=False)


def test_the_command_line_says_what_differs_and_exits_with_1(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of("select", source, tmp_path / "plan")
    plan.save(tmp_path / "plan.json")
    student = tmp_path / "student"
    convert(source, student, "megatron", plan=plan, progress=False)
    for arguments in ([source, student], [source, student, "--plan", tmp_path / "plan.json"], [student]):
        assert main(["verify", *map(str, arguments)]) == 0
        assert f"[verify] {student}: every bit is " in capsys.readouterr().out
    fingerprints = json.loads((student / "fingerprints.json").read_text())
    assert list(fingerprints["files"]) == sorted(file.name for file in student.glob("*.distcp"))
    row = weights(source)["model.norm.weight"][list(plan.kept_hidden)]
    flip_bit(student, row.numpy().tobytes(), 20, 3)
    assert main(["verify", str(source), str(student)]) == 1
    assert f"{student}: DIFFERS: decoder.final_layernorm.weight: row 5 holds " in capsys.readouterr().out
    assert main(["verify", str(student)]) == 1
    (student / ".metadata").unlink()
    assert main(["verify", str(student)]) == 2
    assert main(["verify", str(student), "--plan", str(tmp_path / "plan.json")]) == 2
