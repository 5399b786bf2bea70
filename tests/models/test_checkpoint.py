"""Loading what was saved at another layout or dtype, and refusing what is of another model."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.models.support import LAYOUTS, TinyModel, megatron_order, weights
from tests.pool import run_distributed


def _through(
    layout: Layout, tiny: TinyModel, dtype: torch.dtype, directory: Path, tokenizer_from: Path
) -> list[Tensor]:
    """Load at `layout` and `dtype`, save again; the rows that pad this rank's vocabulary."""
    from megatron.core import parallel_state

    from minitron_nemo.models.build import build_model
    from minitron_nemo.models.checkpoint import load_model, save_model

    launch.initialize(layout, seed=1)
    model = build_model(tiny.architecture, layout, dtype=dtype)
    with torch.no_grad():
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    load_model(model, tiny.megatron)
    save_model(model, directory, tokenizer_from)
    padding = []
    for module in model.modules:
        for name, parameter in module.named_parameters():
            if "embedding" in name or "output_layer" in name:
                start = parallel_state.get_tensor_model_parallel_rank() * len(parameter)
                padding.append(parameter.detach()[max(0, tiny.architecture.vocab_size - start) :].clone())
    return padding


def _load(directory: Path, architecture: Architecture) -> None:
    weights(directory, architecture)


class _Opens:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["tied", "untied"])
@pytest.mark.fast_cases(1)
def test_weights_survive_every_layout_bit_for_bit(
    tiny_models: dict[str, TinyModel], tmp_path: Path, shape: str, layout: str
) -> None:
    tiny = tiny_models[shape]
    world_size, sizes = LAYOUTS[layout]
    paddings = run_distributed(world_size, _through, sizes, tiny, torch.float32, tmp_path / "again", tiny.megatron)
    assert sum(padding.numel() for rank in paddings for padding in rank) > 0
    assert all(not padding.any() for rank in paddings for padding in rank)
    found = run_distributed(1, weights, tmp_path / "again", tiny.architecture)[0]
    expected = megatron_order(load_file(tiny.huggingface / "model.safetensors"), tiny.architecture)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name][: len(weight)], weight), name
    assert Architecture.load(tmp_path / "again") == tiny.architecture
    tokenizer = tmp_path / "again" / "tokenizer" / "tokenizer.json"
    assert tokenizer.read_bytes() == (tiny.huggingface / "tokenizer.json").read_bytes()


def test_loading_converts_the_dtype(tiny_models: dict[str, TinyModel], tmp_path: Path) -> None:
    tiny = tiny_models["untied"]
    run_distributed(1, _through, Layout(), tiny, torch.bfloat16, tmp_path / "bf16", tiny.huggingface)
    assert (tmp_path / "bf16" / "tokenizer" / "tokenizer.json").exists()
    back = run_distributed(1, weights, tmp_path / "bf16", tiny.architecture)[0]
    expected = megatron_order(load_file(tiny.huggingface / "model.safetensors"), tiny.architecture)
    for name, weight in expected.items():
        assert torch.equal(back[name][: len(weight)], weight.bfloat16().float()), name


def test_a_checkpoint_of_another_architecture_is_refused(tiny_models: dict[str, TinyModel]) -> None:
    tiny = tiny_models["untied"]
    with pytest.raises(UserError, match=r"architecture.json: ffn_hidden_size is 96, the model's is 64"):
        run_distributed(1, _load, tiny.megatron, replace(tiny.architecture, ffn_hidden_size=64))


def test_a_checkpoint_that_contradicts_its_architecture_is_refused(
    tiny_models: dict[str, TinyModel], tmp_path: Path
) -> None:
    tiny = tiny_models["untied"]
    for changed, message in (
        (replace(tiny.architecture, num_layers=6), "not a checkpoint of this model"),
        (replace(tiny.architecture, vocab_size=260), "embedding.word_embeddings.weight has 259 rows, fewer than"),
    ):
        directory = shutil.copytree(tiny.megatron, tmp_path / str(changed.vocab_size))
        changed.save(directory)
        with pytest.raises(UserError, match=message):
            run_distributed(1, _load, directory, changed)


def test_a_missing_checkpoint_is_refused(tiny_models: dict[str, TinyModel], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        run_distributed(1, _load, tmp_path, tiny_models["untied"].architecture)


def test_loading_executes_no_code_of_the_checkpoint(tiny_models: dict[str, TinyModel], tmp_path: Path) -> None:
    tiny = tiny_models["untied"]
    directory = shutil.copytree(tiny.megatron, tmp_path / "model")
    (directory / ".metadata").write_bytes(pickle.dumps(_Opens(tmp_path / "executed")))
    with pytest.raises(UserError, match="refused"):
        run_distributed(1, _load, directory, tiny.architecture)
    assert not (tmp_path / "executed").exists()
