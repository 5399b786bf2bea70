"""`verify` says yes to what the transform writes, and names whatever is done to it afterwards."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.arch import Plan
from minitron_nemo.arch.matrix import ADD, GAIN, REPLACE
from minitron_nemo.arch.plan import FILE_NAME
from minitron_nemo.checkpoint import blocks, huggingface
from minitron_nemo.checkpoint.dense import MatrixFile
from minitron_nemo.checkpoint.sink import FORMATS
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.checkpoint.verify import Difference, verify, verify_record
from minitron_nemo.cli import main
from minitron_nemo.errors import UserError
from tests.checkpoint.weights import architecture_of, random_plan, weights
from tests.tiny import write_tiny_llama

QKV = "decoder.layers.{}.self_attention.linear_qkv."
FC1 = "decoder.layers.{}.mlp.linear_fc1."
FC2 = "decoder.layers.{}.mlp.linear_fc2.weight"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a tensor, parts a checkpoint, files."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(blocks, "PART_BYTES", 50_000)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 100_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "source")


def plan_of(kind: str, source: Path, directory: Path) -> Plan:
    """Cuts of all axes; "merged": with merges of heads and factors on norms; "dense": with matrices as well."""
    model = architecture_of(source)
    if kind == "identity":
        return Plan.identity(model)
    plan = random_plan(model)
    layers = range(plan.target.num_layers)
    if kind == "select":
        return plan
    heads = tuple(tuple((head, head ^ 1) for head in kept) for kept in plan.kept_heads or ())  # a group has two
    norms = tuple(name.format(layer) + "layer_norm_weight" for layer in layers for name in (QKV, FC1))
    plan = replace(plan, merged_heads=heads, norm_scales={name: 0.7 + place for place, name in enumerate(norms)})
    if kind == "merged":
        return plan
    before, after = plan.source, plan.target
    shapes = {FC2.format(layer): (ADD, (before.ffn_hidden_size - after.ffn_hidden_size, 64)) for layer in layers}
    for name, layer in itertools.product((QKV, FC1), layers):
        shapes[name.format(layer) + "weight"] = REPLACE, (before.hidden_size, after.hidden_size)
    directory.mkdir()
    shapes |= dict.fromkeys(norms, (GAIN, (1, after.hidden_size)))
    file = MatrixFile(directory, {name: shape for name, (_, shape) in shapes.items()})
    file.prepare()
    generator = torch.Generator().manual_seed(1)
    matrices = {
        name: file.write(name, how, torch.randn(shape, generator=generator)) for name, (how, shape) in shapes.items()
    }
    replace(plan, matrices=matrices, norm_scales={}).save(directory / FILE_NAME)
    return Plan.load(directory / FILE_NAME)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["identity", "select", "merged", "dense"])
def test_what_the_transform_writes_is_what_the_plan_says(
    source: Path, tmp_path: Path, kind: str, dtype: torch.dtype | None
) -> None:
    plan = plan_of(kind, source, tmp_path / "plan")
    for to in FORMATS:
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


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", ["select", "merged", "dense"])
def test_a_flipped_bit_is_found_wherever_it_is(source: Path, tmp_path: Path, kind: str, to: str) -> None:
    plan = plan_of(kind, source, tmp_path / "plan")
    convert(source, tmp_path / "hf", "hf", plan=plan, progress=False)
    rows = weights(tmp_path / "hf")  # read by safetensors
    student = tmp_path / "student"
    for name, ours, row, byte, bit in (
        ("model.embed_tokens.weight", "embedding.word_embeddings.weight", 258, 3, 7),
        ("model.layers.2.mlp.down_proj.weight", FC2.format(2), 17, 255, 0),
        ("model.layers.1.mlp.gate_proj.weight", FC1.format(1) + "weight", 40, 96, 4),
    ):
        convert(source, student, to, plan=plan, progress=False)
        flip_bit(student, rows[name][row].numpy().tobytes(), byte, bit)
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


def exchange(first: Path, second: Path) -> None:
    beside = first.with_name("beside")
    first.rename(beside)
    second.rename(first)
    beside.rename(second)


@pytest.mark.parametrize("to", ["hf", "megatron"])
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
