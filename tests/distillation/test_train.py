"""`correct` and `distill` from checkpoint and prepared text to the weights they write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import (
    CorrectionConfig,
    DataConfig,
    ParallelConfig,
    PhaseConfig,
    PruneConfig,
    Recipe,
    TeacherConfig,
    TextSource,
    TrainConfig,
)
from minitron_nemo.data.dataset import open_heldout
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.distillation.train import train
from minitron_nemo.errors import UserError
from tests.pool import run_distributed
from tests.text import write_documents
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.slow
SEQUENCE = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student, a student with another vocabulary, and prepared text."""
    root = tmp_path_factory.mktemp("place")
    write_tiny_llama(root / "teacher_hf", num_layers=2, seed=1)
    write_tiny_llama(root / "student_hf", num_layers=2, ffn_hidden_size=64, seed=2)
    write_tiny_llama(root / "other_hf", num_layers=2, vocab_size=300, seed=3)
    for name in ("teacher", "student", "other"):
        convert(root / f"{name}_hf", root / name, "megatron")
    prepare_data(recipe(root).data, root / "teacher" / "tokenizer", root / "prepared")
    return root


def recipe(root: Path) -> Recipe:
    documents = root / "text"
    if not documents.exists():
        write_documents(documents, 20)
    return Recipe(
        name="tiny",
        data=DataConfig(train=[TextSource(path=str(documents))], heldout_fraction=0.2, sequence_length=SEQUENCE),
        prune=PruneConfig(),
        teacher=TeacherConfig(correction=CorrectionConfig(steps=12, lr=1e-2, min_lr=1e-3, warmup_steps=2)),
        train=TrainConfig(
            steps=12, global_batch_size=8, lr=1e-2, min_lr=1e-3, warmup_steps=2, precision="fp32", save_interval=5
        ),
        parallel=ParallelConfig(pipeline_model_parallel_size=2),
    )


def paths(place: Path, work: Path, student: str, teacher: str | None) -> dict[str, Any]:
    return {
        "student_dir": place / student,
        "teacher_dir": None if teacher is None else place / teacher,
        "prepared": place / "prepared",
        "work_dir": work / "training",
        "output_dir": work / "output",
        "run_dir": work,
    }


def heldout_losses(place: Path, model_dir: Path, work: Path) -> tuple[float, float]:
    """Cross-entropy of the held-out text, and the divergence from the teacher, by Hugging Face."""
    convert(model_dir, work / "hf", "hf")
    model = LlamaForCausalLM.from_pretrained(work / "hf", dtype=torch.float32)
    teacher = LlamaForCausalLM.from_pretrained(place / "teacher_hf", dtype=torch.float32)
    samples = open_heldout(place / "prepared", SEQUENCE, 8)
    tokens = torch.stack([sample["tokens"] for sample in samples])
    labels = torch.stack([sample["labels"] for sample in samples])
    with torch.no_grad():
        own, wanted = (some(tokens).logits.log_softmax(-1) for some in (model, teacher))
    divergence = (wanted.exp() * (wanted - own)).sum(-1).mean().item()
    return -own.gather(-1, labels.unsqueeze(-1)).mean().item(), divergence


def test_correction_lowers_the_heldout_loss_of_the_teacher(place: Path, tmp_path: Path) -> None:
    outcomes = run_distributed(2, train, recipe(place), **paths(place, tmp_path, "teacher", None))
    assert outcomes == ["done", "done"]
    before, _ = heldout_losses(place, place / "teacher", tmp_path / "before")
    after, _ = heldout_losses(place, tmp_path / "output", tmp_path / "after")
    assert after < before - 0.5
    assert (tmp_path / "output" / "tokenizer" / "tokenizer.json").exists()


def test_distillation_brings_the_student_nearer_to_the_teacher(place: Path, tmp_path: Path) -> None:
    outcomes = run_distributed(2, train, recipe(place), **paths(place, tmp_path, "student", "teacher"))
    assert outcomes == ["done", "done"]
    _, before = heldout_losses(place, place / "student", tmp_path / "before")
    _, after = heldout_losses(place, tmp_path / "output", tmp_path / "after")
    assert after < 0.7 * before


def test_a_phased_distillation_brings_the_student_nearer_to_the_teacher_too(place: Path, tmp_path: Path) -> None:
    """Half of the updates on half the length, in larger microbatches and batches."""
    whole = recipe(place)
    phases = [PhaseConfig(steps=6), PhaseConfig(sequence_length=16, global_batch_size=16, micro_batch_size=2)]
    phased = replace(whole, train=replace(whole.train, phases=phases))
    outcomes = run_distributed(2, train, phased, **paths(place, tmp_path, "student", "teacher"))
    assert outcomes == ["done", "done"]
    _, before = heldout_losses(place, place / "student", tmp_path / "before")
    _, after = heldout_losses(place, tmp_path / "output", tmp_path / "after")
    assert after < 0.7 * before
    saved = json.loads((tmp_path / "training" / "iter_0000010" / "training.json").read_text())
    assert saved["data"]["consumed_samples"] == 6 * 8 + 4 * 16
    assert [phase["micro_batch_size"] for phase in saved["settings"]["train.phases"]] == [None, None]
    assert saved["settings"]["train.phases"][1]["global_batch_size"] == 16


def test_correction_visits_samples_in_an_order_of_its_own(place: Path, tmp_path: Path) -> None:
    """The same seed for both would give distillation what the teacher has just seen."""
    first = recipe(place)
    orders = []
    for seed in (1, 2):
        correction = replace(first.teacher.correction, steps=3, seed=seed, warmup_steps=0)
        other = replace(first, teacher=replace(first.teacher, correction=correction))
        [losses] = run_distributed(1, logged_losses, other, tmp_path / str(seed), place)
        orders.append(losses)
    assert orders[0] != orders[1]


def logged_losses(recipe: Recipe, work: Path, place: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(recipe, parallel=ParallelConfig()), **paths(place, work, "teacher", None))
    events = EventAccumulator(str(work / "training" / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


@pytest.mark.parametrize(
    ("section", "wrong", "message"),
    [
        ("train", {"min_lr": 1.0}, "train.min_lr"),
        ("train", {"global_batch_size": 9, "micro_batch_size": 2}, "train.global_batch_size: 9"),
        ("parallel", {"pipeline_model_parallel_size": 1, "sequence_parallel": True}, "parallel.sequence_parallel"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_their_key(
    place: Path, tmp_path: Path, section: str, wrong: dict, message: str
) -> None:
    whole = recipe(place)
    changed = replace(whole, **{section: replace(getattr(whole, section), **wrong)})
    with pytest.raises(UserError, match=message):
        run_distributed(2, train, changed, **paths(place, tmp_path, "student", "teacher"))


def test_a_student_with_another_vocabulary_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other: vocab_size 300 is not the 259"):
        run_distributed(2, train, recipe(place), **paths(place, tmp_path, "other", "teacher"))
