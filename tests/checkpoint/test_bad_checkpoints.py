"""Checkpoints that are broken or hostile end in one line, run nothing, and leave nothing under the final name."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.checkpoint.safe_pickle import check_metadata
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.errors import UserError
from tests.checkpoint.refusals import Hostile, refused
from tests.checkpoint.weights import same_weights
from tests.tiny import write_tiny_llama


def _truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def _cut_header(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 40)


def _edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return edit


def _index(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def _config(**changes: Any) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return write


UP = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_truncate, "truncated"),
        (_cut_header, "truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0[]"), "not a safetensors file"),
        (_edit(lambda t: t.pop(UP)), f"{UP} is missing"),
        (_edit(lambda t: t.update({UP: t[UP][:-1]})), rf"{UP} has shape \[95, 64\]"),
        (_edit(lambda t: t.update({UP: t[UP].bfloat16()})), "another data type"),
        (_edit(lambda t: t.update({UP: t[UP].int()})), "stored as I32"),
        (
            _edit(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
            "q_proj.bias is not part",
        ),
        (_index({"x": "../kept/model.safetensors"}), "outside the checkpoint"),
        (_index({"x": "model-2.safetensors"}), "not found"),
        (_config(vocab_size=258), r"shape \[259, 64\]"),
        (_config(model_type="gpt2"), "gpt2"),
        (_config(quantization_config={"bits": 4}), "quantised"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "only safetensors"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "not a tokenizer"),
    ],
)
def test_damaged_huggingface_directory(tmp_path: Path, damage: Callable[[Path], Any], named: str) -> None:
    source = write_tiny_llama(tmp_path / "source")
    damage(source)
    refused(source, named, tmp_path)


def test_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    refused(write_tiny_llama(tmp_path / "source", vocab_size=258), "259 entries.*wrong tokenizer size", tmp_path)


def test_tokenizer_smaller_than_the_vocabulary_is_fine(tmp_path: Path) -> None:
    convert(write_tiny_llama(tmp_path / "source", vocab_size=300), tmp_path / "out", "megatron", progress=False)
    assert open_source(tmp_path / "out").tokenizer_size() == 259


@pytest.mark.parametrize("path", ["nothing", "empty"])
def test_not_a_checkpoint(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / path, "checkpoint", tmp_path)


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    convert(write_tiny_llama(tmp_path / "hf"), source, "megatron", progress=False)
    return source


def _metadata(directory: Path, change: Callable[[Any], Any]) -> None:
    with open(directory / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    changed = change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata if changed is None else changed))


def _first_place(metadata: Any) -> Any:
    return metadata.storage_data[next(index for index in metadata.storage_data if index.offset is not None)]


@pytest.mark.parametrize(
    "call",
    [
        lambda marker: Hostile(os.system, f"touch {marker}"),
        lambda marker: Hostile(eval, f"open({str(marker)!r}, 'w')"),
        lambda marker: Hostile(subprocess.check_call, ["touch", str(marker)]),
        lambda marker: Hostile(torch.load, str(marker)),
    ],
)
def test_pickles_in_metadata_run_nothing(tmp_path: Path, megatron: Path, call: Callable[[Path], Any]) -> None:
    marker = tmp_path / "marker"
    for change in (
        lambda metadata: call(marker),
        lambda metadata: setattr(metadata, "planner_data", call(marker)),
        lambda metadata: metadata.state_dict_metadata.update(x=call(marker)),
    ):
        convert(tmp_path / "hf", megatron, "megatron", progress=False)
        _metadata(megatron, change)
        with pytest.raises(UserError, match="refused: it names"):
            check_metadata(megatron)
        refused(megatron, "refused: it names", tmp_path)
    assert not marker.exists()


def test_a_pickle_cannot_change_the_classes_it_names(megatron: Path) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    # Opcodes by hand: take the class itself and set an attribute on it through BUILD's slot state.
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (megatron / ".metadata").write_bytes(name + b"(N}S'hacked'\nI1\nst" + b"b.")
    with pytest.raises(UserError, match="refused"):
        check_metadata(megatron)
    assert not hasattr(Metadata, "hacked")


@pytest.mark.parametrize("where", ["../hf/model.safetensors", "/etc/passwd", "a/../../hf/model.safetensors"])
def test_paths_in_metadata_stay_inside(tmp_path: Path, megatron: Path, where: str) -> None:
    _metadata(megatron, lambda metadata: setattr(_first_place(metadata), "relative_path", where))
    with pytest.raises(UserError, match="outside the checkpoint"):
        check_metadata(megatron)
    refused(megatron, "outside the checkpoint", tmp_path)


def test_objects_that_megatron_would_unpickle_run_nothing(tmp_path: Path, megatron: Path) -> None:
    marker = tmp_path / "marker"
    check_metadata(megatron)  # as it is, it passes
    torch.save({"x": Hostile(os.system, f"touch {marker}")}, megatron / "common.pt")
    with pytest.raises(UserError, match="common.pt"):
        check_metadata(megatron)
    torch.save({}, megatron / "common.pt")
    blob = io.BytesIO()
    torch.save([Hostile(os.system, f"touch {marker}")], blob)
    (megatron / "__9_0.distcp").write_bytes(blob.getvalue())

    def point_extra_state_there(metadata: Any) -> None:
        place = metadata.storage_data[next(index for index in metadata.storage_data if "_extra_state" in index.fqn)]
        place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(blob.getvalue())

    _metadata(megatron, point_extra_state_there)
    with pytest.raises(UserError, match="__9_0.distcp"):
        check_metadata(megatron)
    assert not marker.exists()


def _rewrite_blob(directory: Path, write: Callable[[io.BytesIO, Any], None]) -> None:
    """Replace the blob of the embedding by what `write` makes of the tensor in it."""
    with open(directory / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    index = next(i for i in metadata.storage_data if i.fqn == "embedding.word_embeddings.weight")
    place = metadata.storage_data[index]
    content = (directory / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    blob = io.BytesIO()
    write(blob, torch.load(io.BytesIO(content), weights_only=True))
    (directory / "__8_0.distcp").write_bytes(blob.getvalue())
    place.relative_path, place.offset, place.length = "__8_0.distcp", 0, len(blob.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _compressed(blob: io.BytesIO, tensor: torch.Tensor) -> None:
    plain = io.BytesIO()
    torch.save(tensor, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(blob, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (_compressed, "compressed"),
        (lambda blob, tensor: torch.save(tensor[:-1].clone(), blob), r"\[258, 64\]"),
        (lambda blob, tensor: torch.save(tensor.double(), blob), "DoubleStorage"),
        (lambda blob, tensor: torch.save(tensor.t().contiguous().t(), blob), "strides"),
        (lambda blob, tensor: torch.save([Hostile(os.system, "true")], blob), "it names posix.system"),
        (lambda blob, tensor: torch.save(tensor, blob, _use_new_zipfile_serialization=False), "not a zip"),
    ],
)
def test_blobs_that_are_not_plain_rows_arerefused(
    tmp_path: Path, megatron: Path, write: Callable[[io.BytesIO, Any], None], named: str
) -> None:
    _rewrite_blob(megatron, write)
    refused(megatron, named, tmp_path)


def test_a_view_inside_a_larger_storage_reads_right(tmp_path: Path, megatron: Path) -> None:
    def write(blob: io.BytesIO, tensor: torch.Tensor) -> None:
        larger = torch.cat([torch.full_like(tensor, 9.0), tensor])
        torch.save(larger[tensor.shape[0] :], blob)

    _rewrite_blob(megatron, write)
    convert(megatron, tmp_path / "back", "hf", progress=False)
    assert same_weights(tmp_path / "hf", tmp_path / "back")


def test_truncated_torch_dist_file(tmp_path: Path, megatron: Path) -> None:
    file = megatron / "__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    refused(megatron, "truncated", tmp_path)


def test_missing_torch_dist_file(tmp_path: Path, megatron: Path) -> None:
    (megatron / "__0_0.distcp").unlink()
    refused(megatron, "not found", tmp_path)


def _without_a_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()


def _unknown_tensor(metadata: Any) -> None:
    tables = metadata.state_dict_metadata
    tables["decoder.layers.mlp.linear_fc1.bias"] = tables["decoder.layers.mlp.linear_fc1.weight"]
    for index, place in list(metadata.storage_data.items()):
        if index.fqn == "decoder.layers.mlp.linear_fc1.weight":
            metadata.storage_data[type(index)("decoder.layers.mlp.linear_fc1.bias", index.offset)] = place


def _other_depth(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].size = torch.Size([5, 64, 96])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_without_a_chunk, "incomplete"),
        (_unknown_tensor, "linear_fc1.bias is not part"),
        (lambda m: m.state_dict_metadata.pop("decoder.layers.mlp.linear_fc1.weight") and None, "fc1.weight is missing"),
        (_other_depth, r"\[5, 64, 96\]"),
        (lambda metadata: metadata.storage_data.clear(), "inconsistent"),
        (lambda metadata: {"state_dict_metadata": {}}, "refused"),
    ],
)
def test_damaged_metadata(tmp_path: Path, megatron: Path, change: Callable[[Any], Any], named: str) -> None:
    _metadata(megatron, change)
    refused(megatron, named, tmp_path)


def test_megatron_directory_without_its_architecture(tmp_path: Path, megatron: Path) -> None:
    (megatron / "architecture.json").unlink()
    refused(megatron, "architecture.json", tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, small_disk: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write_tiny_llama(tmp_path / "hf")  # 650 kB: one fits, two do not
    convert(original, small_disk / "out", to, progress=False)
    other = write_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="make room"):
        convert(other, small_disk / "out", to, progress=False)
    # The disk fills up after the check: somebody else writes at the same time.
    monkeypatch.setattr("minitron_nemo.checkpoint.sink._check_room", lambda *_: None)
    with pytest.raises(UserError, match="No space left on device") as caught:
        convert(other, small_disk / "out", to, progress=False)
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in small_disk.iterdir()] == ["out"]
    convert(small_disk / "out", tmp_path / "back", "hf", progress=False)
    assert same_weights(original, tmp_path / "back")
