"""`cache-teacher` and a training from its cache, from prepared text to weights, beside one with the teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from minitron_nemo.arch import Architecture
from minitron_nemo.chain import Chain
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import (
    CacheConfig,
    DataConfig,
    DistillConfig,
    ParallelConfig,
    PhaseConfig,
    Recipe,
    TeacherConfig,
    TextSource,
    TrainConfig,
    load_recipe,
)
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.distillation.cache_teacher import cache_teacher
from minitron_nemo.distillation.cached import check_cached
from minitron_nemo.distillation.train import train
from minitron_nemo.errors import UserError
from minitron_nemo.preflight import preflight
from minitron_nemo.steps import Step
from tests.e2e.chain import write_recipe
from tests.pool import run_distributed
from tests.text import write_documents
from tests.tiny import write_tiny_llama

PHASES = [PhaseConfig(steps=3), PhaseConfig(sequence_length=64, micro_batch_size=2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers, a student and prepared text."""
    root = tmp_path_factory.mktemp("place")
    write_documents(root / "text", 20)
    write_tiny_llama(root / "teacher_hf", num_layers=2, seed=1)
    write_tiny_llama(root / "student_hf", num_layers=2, ffn_hidden_size=64, seed=2)
    write_tiny_llama(root / "other_hf", num_layers=2, seed=3)
    for name in ("teacher", "student", "other"):
        convert(root / f"{name}_hf", root / name, "megatron")
    prepare_data(recipe(root).data, root / "teacher" / "tokenizer", root / "prepared")
    shutil.copytree(root / "teacher" / "tokenizer", root / "tokenizer")
    other = json.loads((root / "tokenizer" / "tokenizer.json").read_text())
    numbers = other["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    (root / "tokenizer" / "tokenizer.json").write_text(json.dumps(other))
    prepare_data(recipe(root).data, root / "tokenizer", root / "prepared_otherwise")
    return root


def recipe(root: Path, placement: str = "cached", **cache: Any) -> Recipe:
    return Recipe(
        name="tiny",
        run_dir=str(root / "run"),
        data=DataConfig(train=[TextSource(path=str(root / "text"))], heldout_fraction=0.2, sequence_length=32),
        teacher=TeacherConfig(placement=placement, cache=CacheConfig(**{"top_k": 4096, **cache})),
        train=TrainConfig(
            steps=6, global_batch_size=4, lr=1e-2, min_lr=1e-3, precision="fp32", phases=PHASES, adam_eps=1e-3
        ),
        parallel=ParallelConfig(pipeline_model_parallel_size=2),
    )


def trained(place: Path, work: Path, of: Recipe, teacher: str = "teacher", prepared: str = "prepared") -> None:
    run_distributed(
        2,
        train,
        of,
        student_dir=place / "student",
        teacher_dir=place / teacher,
        prepared=place / prepared,
        work_dir=work / "training",
        output_dir=work / "output",
        run_dir=work,
    )


def cached(place: Path, work: Path, of: Recipe, size: int = 2) -> None:
    run_distributed(
        size, cache_teacher, of, teacher_dir=place / "teacher", prepared=place / "prepared", summary=work / "cache.json"
    )


@pytest.mark.slow
def test_a_training_from_the_cache_ends_where_one_with_the_teacher_does(place: Path, tmp_path: Path) -> None:
    """Two sequence lengths; written by two replicas of one stage, read by a pipeline of two."""
    of = recipe(place, path=str(tmp_path / "cache"), tail_samples=0)
    cached(place, tmp_path, replace(of, parallel=ParallelConfig()))
    summary = json.loads((tmp_path / "cache.json").read_text())
    assert [each["sequence_length"] for each in summary["caches"]] == [32, 64]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    cached(place, tmp_path, of)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}, (
        "nothing was left to do"
    )
    trained(place, tmp_path / "cached", of)
    trained(place, tmp_path / "colocated", recipe(place, "colocated"))
    one, other = (weights(tmp_path / name / "output") for name in ("cached", "colocated"))
    for name, found in one.items():
        assert (found - other[name]).abs().max() <= 1e-5 * other[name].abs().max(), name


def weights(model: Path) -> dict[str, Tensor]:
    convert(model, model.with_name("hf"), "hf")
    return LlamaForCausalLM.from_pretrained(model.with_name("hf"), dtype=torch.float32).state_dict()


@pytest.mark.slow
def test_a_cache_that_does_not_fit_is_refused(place: Path, tmp_path: Path) -> None:
    of = recipe(place, path=str(tmp_path / "cache"), top_k=8, tail_samples=4)
    with pytest.raises(UserError, match=r"cache/32/cache.json: not there; run `minitron cache-teacher`"):
        trained(place, tmp_path, of)
    cached(place, tmp_path, of)
    for other, words in (
        (replace(of, distill=DistillConfig(temperature=2.0)), "distill.temperature was 1.0 .* is 2.0 now"),
        (replace(of, data=replace(of.data, pack_seed=1)), "made for other data"),
        (replace(of, data=replace(of.data, seed=1)), "lacks .* of the .* samples"),
        (recipe(place, path=str(tmp_path / "cache"), top_k=9, tail_samples=4), "top_k was 8 .* is 9 now"),
    ):
        with pytest.raises(UserError, match=words):
            trained(place, tmp_path, other)
    with pytest.raises(UserError, match="cache.json: the teacher was"):
        trained(place, tmp_path, of, teacher="other")
    turned = shutil.copytree(place / "teacher", tmp_path / "turned")  # the same weights at other angles
    replace(Architecture.load(turned), rotary_base=5e5).save(turned)
    with pytest.raises(UserError, match="cache.json: the teacher was"):
        trained(place, tmp_path, of, teacher=str(turned))
    with pytest.raises(UserError, match="made for other data: .* the tokenizer changed"):
        trained(place, tmp_path, of, prepared="prepared_otherwise")
    shorter = replace(of, data=replace(of.data, sequence_length=16))
    with pytest.raises(UserError, match="cache/16/cache.json: not there; run `minitron cache-teacher`"):
        trained(place, tmp_path, shorter)
    shutil.copytree(tmp_path / "cache" / "32", tmp_path / "cache" / "16")
    with pytest.raises(UserError, match="cache/16/cache.json: data.sequence_length was 32 .* is 16 now"):
        trained(place, tmp_path, shorter)
    assert not (tmp_path / "training").exists(), "refused before anything was trained"
    with pytest.raises(UserError, match="distill.temperature was"):
        cached(place, tmp_path, replace(of, distill=DistillConfig(temperature=2.0)))
    trained(place, tmp_path, of)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distill": DistillConfig(divergence="jsd")}, "tail_samples: 16 draws are unbiased for .* forward_kl"),
        ({"teacher": TeacherConfig(cache=CacheConfig(tail_samples=-1))}, "tail_samples: -1 must not be negative"),
        ({"parallel": ParallelConfig(context_parallel_size=2)}, "context_parallel_size"),
    ],
)
def test_recipes_that_a_cache_cannot_serve_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_cached(replace(recipe(tmp_path), **change), with_pairs=False)


def test_pairs_need_states_that_a_cache_has_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill.intermediate.pairs: need the teacher's states"):
        check_cached(recipe(tmp_path), with_pairs=True)


@pytest.mark.slow
def test_the_chain_fills_the_cache_before_it_distils(tmp_path: Path) -> None:
    """The step looks itself what is left to do; the distillation depends on what it says, not on where it lies."""
    of = load_recipe(write_recipe(tmp_path), ["teacher.placement=cached", "distill.intermediate.pairs=[]"])
    steps = {step.name: step for step in run_distributed(1, chain_steps, of)[0]}
    names = list(steps)
    assert names[names.index("prune") :][:3] == ["prune", "cache-teacher", "distill"]
    assert [name for name, step in steps.items() if step.finds_out] == ["cache-teacher"]
    assert steps["distill"].inputs["cache"] == steps["cache-teacher"].output
    names = [step.name for step in run_distributed(1, chain_steps, replace(of, teacher=TeacherConfig()))[0]]
    assert "cache-teacher" not in names


def chain_steps(of: Recipe) -> list[Step]:
    return [replace(step, work=print) for step in Chain(preflight(of, 2)).steps()]
