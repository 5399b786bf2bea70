"""What a run reports: right, whole after an interruption, and without effect on the training."""

from __future__ import annotations

import errno
import json
import os
import signal
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import (
    DataConfig,
    EvaluateConfig,
    IntermediateConfig,
    ParallelConfig,
    Recipe,
    TextSource,
    TrainConfig,
)
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.distillation.checkpoints import BestCheckpoint
from minitron_nemo.distillation.metrics import EventsFile, MetricsFile, consumed_tokens
from minitron_nemo.distillation.phases import Segment
from minitron_nemo.distillation.records import read_metrics
from minitron_nemo.distillation.train import train
from minitron_nemo.evaluation.heldout import HeldOut
from minitron_nemo.evaluation.report import evaluate_models
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.distillation.reference import expected_step
from tests.distillation.runs import EventfulSampler, Job, Result, assert_identical, run
from tests.pool import run_distributed
from tests.text import write_documents
from tests.tiny import write_tiny_llama

slow = pytest.mark.slow
TP2 = Layout(tensor_model_parallel_size=2)
TP2_SP = replace(TP2, sequence_parallel=True)
PP2 = Layout(pipeline_model_parallel_size=2)
LAYOUTS = {"one process": (1, Layout()), "DP2": (2, Layout()), "TP2": (2, TP2), "TP2 SP": (2, TP2_SP), "PP2": (2, PP2)}
# Tags whose values are of the machine, not of the training.
OF_THE_MACHINE = ("speed/", "memory/", "teacher/", "checkpoint/")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student and teacher, their Hugging Face directories beside them."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "student_hf", num_layers=2, hidden_size=48, ffn_hidden_size=64, tied=True, seed=1)
    write_tiny_llama(root / "teacher_hf", num_layers=2, seed=2)
    for name in ("student", "teacher"):
        convert(root / f"{name}_hf", root / name, "megatron")
    return root / "student", root / "teacher"


def records(job: Job) -> list[dict[str, Any]]:
    return read_metrics(job.directory / "training" / "metrics.jsonl")


def of_the_training(job: Job) -> list[dict[str, Any]]:
    """The records without what another machine, or the same one at another time, would say otherwise."""
    kept = [
        {key: value for key, value in record.items() if key != "time" and not key.startswith(OF_THE_MACHINE)}
        for record in records(job)
    ]
    return [record for record in kept if record.keys() > {"iteration"}]


@slow
@pytest.mark.parametrize(
    ("world_size", "layout", "config"),
    [
        (2, Layout(), {"precision": "bf16", "overlap_param_gather": True}),
        (2, TP2_SP, {"recompute": True}),
        (2, PP2, {}),
    ],
    ids=["DP2 bf16 overlap", "TP2 SP recompute", "PP2"],
)
def test_a_run_with_validation_is_bit_for_bit_the_run_without(
    models: tuple[Path, Path], tmp_path: Path, world_size: int, layout: Layout, config: dict[str, Any]
) -> None:
    """With an intermediate loss, whose hooks see the validation's forward passes as well."""
    pairs = IntermediateConfig(pairs=[[-1, -1], [0, 0]])
    without = Job(*models, tmp_path / "without", layout, config, intermediate=pairs)
    validated = replace(without, directory=tmp_path / "with", config={**config, "eval_interval": 2})
    plain = run_distributed(world_size, run, without)
    assert_identical(plain, run_distributed(world_size, run, validated))
    trained = [record for record in of_the_training(validated) if "train/loss" in record]
    assert trained == of_the_training(without)
    assert [record["iteration"] for record in records(validated) if "validation/loss" in record] == [2, 4, 6]


def stopped_then_resumed(job: Job, update: int, leftovers: str) -> Result:
    """A signal during `update`; then `leftovers` at the end of the metrics, as of a run that went on and was killed."""
    assert run(job, {update: lambda: os.kill(os.getpid(), signal.SIGTERM)}).outcome == "stopped"
    if launch.rank() == 0:
        with (job.directory / "training" / "metrics.jsonl").open("a") as file:
            file.write(leftovers)
    launch.barrier()
    return run(job)


@slow
def test_metrics_are_whole_after_a_signal_and_a_resumption(models: tuple[Path, Path], tmp_path: Path) -> None:
    whole = Job(*models, tmp_path / "whole", config={"eval_interval": 3})
    interrupted = replace(whole, directory=tmp_path / "interrupted")
    run_distributed(2, run, whole)
    run_distributed(
        2, stopped_then_resumed, interrupted, 3, '{"iteration": 4, "train/loss": 1.0}\n{"iteration": 5, "tr'
    )
    assert of_the_training(interrupted) == of_the_training(whole)
    iterations = [record["iteration"] for record in of_the_training(whole)]
    assert iterations == [1, 2, 3, 3, 4, 5, 6, 6]  # a report and a validation
    lines = (tmp_path / "interrupted" / "training" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["time"] > 0 for line in lines)


@slow
def test_a_stop_between_two_reports_reports_what_would_be_lost(models: tuple[Path, Path], tmp_path: Path) -> None:
    job = Job(*models, tmp_path, config={"log_interval": 4})
    run_distributed(1, stopped_then_resumed, job, 3, "")
    assert [record["iteration"] for record in of_the_training(job)] == [3, 4, 6]


@slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_norms_and_losses_of_the_first_update_are_those_of_one_process_in_fp64(
    models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """At a learning rate that changes nothing, so that the parameters are those of the checkpoint."""
    world_size, layout = LAYOUTS[name]
    job = Job(*models, tmp_path, layout, {"steps": 1, "lr": 1e-30, "min_lr": 0.0, "warmup_steps": 0})
    run_distributed(world_size, run, job)
    [record] = records(job)
    sampler = EventfulSampler(job.train_config(), {})
    samples = [sampler.blend.sample(index) for index in sampler.next_batch(4)]
    batches = [{key: sample[key][None] for key in ("tokens", "labels", "token_weights")} for sample in samples]
    hf = [model.with_name(f"{model.name}_hf") for model in models]
    expected = expected_step(hf[0], hf[1], batches, ce_weight=0.1)
    gradients = sum(gradient.square().sum() for gradient in expected.gradients.values())
    weights = sum(weight.double().square().sum() for weight in load_file(hf[0] / "model.safetensors").values())
    assert record["train/grad_norm"] == pytest.approx(float(gradients) ** 0.5, rel=1e-5)
    assert record["train/parameter_norm"] == pytest.approx(float(weights) ** 0.5, rel=1e-6)
    assert record["train/logits"] == pytest.approx(expected.logits / expected.tokens, rel=1e-5)
    assert record["train/ce"] == pytest.approx(expected.ce / expected.tokens, rel=1e-5)
    assert record["train/loss"] == pytest.approx(record["train/logits"] + 0.1 * record["train/ce"], rel=1e-12)
    assert (record["data/samples"], record["data/tokens"]) == (4, 4 * 16)


@slow
def test_speed_follows_from_tokens_seconds_and_the_arithmetic_of_flops(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    job = Job(*models, tmp_path, config={"peak_flops": 1e9, "log_interval": 2})
    run_distributed(2, run, job)
    student, teacher = (forward_flops_per_token(Architecture.load(model), 16) for model in models)
    for record in records(job):
        tokens = record["speed/tokens_per_second"]
        assert tokens * record["speed/seconds_per_update"] == pytest.approx(4 * 16)
        assert record["speed/tokens_per_second_per_rank"] == pytest.approx(tokens / 2)
        assert record["speed/tflops_per_rank"] == pytest.approx(tokens / 2 * (3 * student + teacher) / 1e12)
        assert record["speed/mfu"] == pytest.approx(record["speed/tflops_per_rank"] * 1e12 / 1e9)
        assert 0 < record["teacher/wait_seconds"] < record["speed/seconds_per_update"]
        assert record["memory/resident_bytes"] > 2**20


@slow
@pytest.mark.parametrize("layout", [PP2, TP2, Layout()], ids=["PP2", "TP2", "DP2"])
def test_validation_says_what_evaluate_says_of_the_weights(tmp_path: Path, layout: Layout) -> None:
    write_tiny_llama(tmp_path / "teacher_hf", num_layers=2, seed=1)
    write_tiny_llama(tmp_path / "student_hf", num_layers=2, ffn_hidden_size=64, seed=2)
    models = {name: tmp_path / name for name in ("teacher", "student")}
    for path in models.values():
        convert(path.with_name(f"{path.name}_hf"), path, "megatron")
    source = TextSource(path=str(write_documents(tmp_path / "text", 20)))
    recipe = Recipe(
        data=DataConfig(train=[source], heldout_fraction=0.2, sequence_length=32),
        train=TrainConfig(steps=3, global_batch_size=4, precision="fp32", warmup_steps=0, eval_interval=2),
        parallel=ParallelConfig(layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size),
        evaluate=EvaluateConfig(documents=3, sequence_length=24, micro_batch_size=2, generate_tokens=0),
    )
    prepare_data(recipe.data, models["teacher"] / "tokenizer", tmp_path / "prepared")
    run_distributed(2, trained, recipe, models, tmp_path, layout)
    models["distilled"] = tmp_path / "output"
    evaluation = run_distributed(2, evaluate_models, models, tmp_path / "prepared", recipe, layout)[0]
    found = read_metrics(tmp_path / "training" / "metrics.jsonl")
    validations = [record for record in found if "validation/loss" in record]
    assert [record["iteration"] for record in validations] == [2, 3]  # after the last update in any case
    for name in ("loss", "loss_se", "perplexity", "kl_to_teacher", "top1_agreement"):
        assert validations[-1][f"validation/{name}"] == evaluation["distilled"][name], name


def trained(recipe: Recipe, models: dict[str, Path], root: Path, layout: Layout) -> None:
    outcome = train(
        recipe,
        student_dir=models["student"],
        teacher_dir=models["teacher"],
        prepared=root / "prepared",
        work_dir=root / "training",
        output_dir=root / "output",
        run_dir=root,
        heldout=partial(HeldOut.from_recipe, recipe, root / "prepared", layout),
    )
    assert outcome == "done"


@slow
def test_without_a_teacher_only_the_loss_is_measured_and_the_best_checkpoint_stays(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """A learning rate that soon does harm: the best checkpoint is not among the last."""
    config = {"steps": 6, "lr": 1.0, "warmup_steps": 3, "save_interval": 1, "keep_last": 1, "eval_interval": 1}
    job = Job(models[1], None, tmp_path, config=config)
    run_distributed(1, run, job)
    validations = [record for record in records(job) if "validation/loss" in record]
    assert all("validation/kl_to_teacher" not in record for record in validations)
    losses = {record["iteration"]: record["validation/loss"] for record in validations if record["iteration"] < 6}
    best = min(losses, key=losses.__getitem__)
    assert best < 5
    named = json.loads((tmp_path / "training" / "best_checkpoint.json").read_text())
    assert (named["checkpoint"], named["validation_loss"]) == (f"iter_{best:07d}", losses[best])
    kept = sorted(path.name for path in (tmp_path / "training").glob("iter_*"))
    assert kept == [f"iter_{best:07d}", "iter_0000005"]


def test_the_best_checkpoint_is_one_that_was_measured_and_is_there(tmp_path: Path) -> None:
    for iteration in (5, 10, 20, 30):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    best = BestCheckpoint(tmp_path)
    best.measured(5, float("nan"))  # which no later loss is lower than
    assert best.published(5) is None
    best.measured(10, 3.0)
    assert best.published(10) == 10
    best.measured(15, 1.0)  # no checkpoint of it
    best.measured(20, float("nan"))
    assert best.published(20) == 10
    again = BestCheckpoint(tmp_path)  # after a resumption
    assert again.published(25) == 10
    again.measured(30, 2.0)
    assert again.published(30) == 30
    assert BestCheckpoint(tmp_path).published(20) is None  # 30 is of updates that are made again
    (tmp_path / "iter_0000030").rmdir()
    assert BestCheckpoint(tmp_path).published(40) is None


def test_what_a_full_disk_refuses_follows_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, write = [20], os.write

    def limited(file: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, content[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    file = MetricsFile(tmp_path / "training" / "metrics.jsonl", 0)
    assert "No space left" in file.append(1, {"train/loss": 1.0})
    assert "No space left" in file.append(2, {"train/loss": float("inf")})
    room[0] = 10**6
    assert file.append(3, {"train/loss": 3.0}) is None
    file.close()
    found = read_metrics(tmp_path / "training" / "metrics.jsonl")
    assert [(record["iteration"], record["train/loss"]) for record in found] == [(1, 1.0), (2, None), (3, 3.0)]


def test_tensorboard_goes_on_after_a_full_disk(small_disk: Path) -> None:
    """With all that was written meanwhile, and in the same file, whose last record was cut off."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventsFile(small_disk, 0)
    assert events.append(1, {"train/loss": 1.0}) is None
    with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    values = {f"train/{number}": 0.5 for number in range(1000)}
    assert all("No space left" in events.append(update, values) for update in range(2, 12))
    (small_disk / "ballast").unlink()
    assert events.append(20, {"train/loss": 20.0}) is None
    events.close()
    found = EventAccumulator(str(small_disk))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1.0), (20, 20.0)]
    for tag in values:
        assert [(event.step, event.value) for event in found.Scalars(tag)] == [(update, 0.5) for update in range(2, 12)]


def test_a_run_that_starts_over_forgets_all_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n\x00\x00\n[]\n{"iteration": 2}\n{"iterat')
    MetricsFile(path, 1).close()
    assert read_metrics(path) == [{"iteration": 1}]
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


def test_tokens_are_counted_through_phases() -> None:
    run = [Segment(2, 16, 4, 1), Segment(3, 32, 2, 1), Segment(1, 8, 8, 1)]
    expected = {0: 0, 3: 48, 8: 128, 10: 192, 14: 320, 22: 384, 30: 448}
    assert {samples: consumed_tokens(run, samples) for samples in expected} == expected
