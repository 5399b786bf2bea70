"""Phases and ramp-up: which samples every update sees, resuming in the middle, and what is refused."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.chain import Chain
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import CorrectionConfig, DataConfig, PhaseConfig, TrainConfig, load_recipe
from minitron_nemo.data.dataset import Blend, open_train
from minitron_nemo.data.sampler import Interleave, Sampler, stack
from minitron_nemo.data.shuffle import permutation
from minitron_nemo.distillation.phases import Segment, segment_at, segments, stretches
from minitron_nemo.distillation.train import correction_config
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.plan_text import text
from minitron_nemo.preflight import preflight
from tests.data.corpus import make_texts, prepare, write_jsonl
from tests.distillation.reference import expected_step
from tests.distillation.runs import Job, MadeUpSource, Result, assert_identical, run
from tests.e2e.chain import write_recipe
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

LENGTH, SEED = 32, 3


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 6, "global_batch_size": 4, **settings})


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Blend:
    """Three sources of a few dozen samples."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = [write_jsonl(folder / f"{seed}.jsonl", make_texts(6 * seed, seed)) for seed in (1, 2, 4)]
    for source, weight in zip(sources, (0.5, 0.2, 0.3), strict=True):
        source.weight = weight
    data = DataConfig(train=sources, sequence_length=LENGTH)
    return open_train(data, prepare(data, folder))


PHASES = [
    PhaseConfig(steps=9),
    PhaseConfig(steps=7, global_batch_size=6, weights=[0, 1, 3]),
    PhaseConfig(steps=8, sequence_length=2 * LENGTH, global_batch_size=2),
    PhaseConfig(steps=11, weights=[0.1, 0, 0.9]),
    PhaseConfig(global_batch_size=8),
]
PHASED = config(steps=60, phases=PHASES)


def sample_ids(sampler: Sampler, run: tuple[Segment, ...], updates: int) -> list[list[str]]:
    """The ids of the samples of every update from the sampler's position on, as the trainer asks for them."""
    batches = []
    for _ in range(updates):
        blend = sampler.blend_at(sampler.consumed_samples)
        size = segment_at(run, sampler.consumed_samples).global_batch_size
        batches.append([blend.sample(index)["id"] for index in sampler.next_batch(size)])
    return batches


def by_hand(blend: Blend) -> list[list[str]]:
    """PHASED, phase by phase: one sequence of turns for each set of weights, one pile for each source and length."""
    given = blend.weights
    phases = [
        (9, 4, LENGTH, given),
        (7, 6, LENGTH, (0.0, 0.25, 0.75)),
        (8, 2, 2 * LENGTH, given),
        (11, 4, LENGTH, (0.1, 0.0, 0.9)),
        (25, 8, LENGTH, given),
    ]
    longer = [source.resized(2 * LENGTH) for source in blend.sources]
    sources = {LENGTH: blend.sources, 2 * LENGTH: longer}
    turns: dict[Any, list[int]] = {}
    for _, _, length, weights in phases:
        interleave = Interleave(weights)
        turns[length, weights] = [interleave.source(position) for position in range(400)]
    piles = {
        (length, number): [
            source.sample(int(sample))["id"]
            for epoch in range(20)
            for sample in permutation(len(source), "order", SEED, number, epoch)
        ]
        for length, of_length in sources.items()
        for number, source in enumerate(of_length)
    }
    batches = []
    for steps, size, length, weights in phases:
        for _ in range(steps):
            batches.append([piles[length, turns[length, weights].pop(0)].pop(0) for _ in range(size)])
    return batches


def test_a_phased_run_sees_the_samples_that_are_counted_off_by_hand(blend: Blend) -> None:
    found = sample_ids(Sampler(blend, SEED, stretches(PHASED, blend)), segments(PHASED, LENGTH), PHASED.steps)
    assert found == by_hand(blend)


@pytest.mark.parametrize("done", [0, 1, 8, 9, 12, 16, 20, 24, 30, 35, 59])
@pytest.mark.fast_cases(5)
def test_a_sampler_resumed_after_any_update_goes_on_in_its_phase(blend: Blend, done: int) -> None:
    run = segments(PHASED, LENGTH)
    before = Sampler(blend, SEED, stretches(PHASED, blend))
    whole = sample_ids(before, run, done)
    after = Sampler(blend, SEED, stretches(PHASED, blend))
    after.load_state_dict(before.state_dict())
    assert whole + sample_ids(after, run, PHASED.steps - done) == by_hand(blend)


def test_no_sample_comes_back_before_its_epoch_is_over_though_the_weights_change(blend: Blend) -> None:
    """The second and the third phase leave out a source; the run of the same length goes on after a longer one."""
    drawn = [stack_id for batch in by_hand(blend)[:16] + by_hand(blend)[24:] for stack_id in batch]
    for source in blend.sources:
        own = [source.sample(index)["id"] for index in range(len(source))]
        visits = [id_ for id_ in drawn if id_ in set(own)]
        assert len(visits) > len(own)
        for start in range(0, len(visits) - len(own) + 1, len(own)):
            assert sorted(visits[start : start + len(own)]) == sorted(own)


def test_phases_that_change_nothing_or_batch_sizes_alone_change_no_sample(blend: Blend) -> None:
    plain = [id_ for batch in sample_ids(Sampler(blend, SEED), segments(config(steps=60), LENGTH), 60) for id_ in batch]
    same = config(steps=60, phases=[PhaseConfig(steps=7), PhaseConfig(steps=20), PhaseConfig(weights=[0.5, 0.2, 0.3])])
    sizes = config(steps=30, phases=[PhaseConfig(steps=10), PhaseConfig(global_batch_size=10)])
    ramp = config(steps=30, global_batch_size=12, rampup_batch_size=[4, 2, 30])
    for other in (same, sizes, ramp):
        sampler = Sampler(blend, SEED, stretches(other, blend))
        found = [id_ for batch in sample_ids(sampler, segments(other, LENGTH), other.steps) for id_ in batch]
        assert found[: len(plain)] == plain[: len(found)]
        assert sampler.state_dict()["blend"] == Sampler(blend, SEED).state_dict()["blend"]


def test_a_source_shorter_than_a_sample_of_a_phase_is_refused(blend: Blend) -> None:
    with pytest.raises(UserError, match=r"1\.jsonl: its \d+ training tokens are less than one sample of sequence_le"):
        stretches(config(phases=[PhaseConfig(steps=1), PhaseConfig(sequence_length=4096)]), blend)


def batch_sizes(of: TrainConfig) -> list[int]:
    return [part.global_batch_size for part in segments(of, LENGTH) for _ in range(part.steps)]


def test_a_ramp_up_has_the_sizes_of_a_table_made_by_hand() -> None:
    """From 4 to 12 by 4 over 20 samples: the size rises after 10 and after 20 samples, where an update ends there."""
    ramp = config(steps=8, global_batch_size=12, rampup_batch_size=[4, 4, 20])
    #                             samples before: 0  4  8  12 20  32
    assert batch_sizes(ramp) == [4, 4, 4, 8, 12, 12, 12, 12]
    assert batch_sizes(replace(ramp, steps=2)) == [4, 4]
    later = [PhaseConfig(steps=6), PhaseConfig(global_batch_size=4)]
    assert batch_sizes(replace(ramp, phases=later)) == [4, 4, 4, 8, 12, 12, 4, 4]
    # An update that is larger than the part of a size leaves the next sizes out.
    assert batch_sizes(config(steps=4, global_batch_size=20, rampup_batch_size=[8, 2, 6])) == [8, 20, 20, 20]


@pytest.mark.parametrize("ramp", [[2, 2, 300], [4, 12, 1000], [8, 4, 7], [1, 1, 64], [6, 6, 77]])
def test_a_ramp_up_is_megatrons(ramp: list[int]) -> None:
    peer = RampupBatchsizeNumMicroBatchesCalculator(64 - 64 % ramp[1] + ramp[0] % ramp[1], 1, 1, False, 1, *ramp)
    sizes = batch_sizes(config(steps=100, global_batch_size=peer.global_batch_size, rampup_batch_size=ramp))
    for consumed, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        peer.update(consumed, consistency_check=False)
        assert size == peer.get_current_global_batch_size(), consumed
    assert sizes[-1] == peer.global_batch_size


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("recipe"),
        cluster={"launcher": "none", "processes_per_node": 2},
        parallel={"pipeline_model_parallel_size": 1},
        train={"steps": 6, "global_batch_size": 4, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1},
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.phases=[{steps: 2}, {steps: 3}]", "train.phases: their steps add up to 5, but train.steps is 6"),
        ("train.phases=[{}, {steps: 3}]", r"train.phases\[0\].steps: required"),
        ("train.phases=[{steps: 6}, {}]", r"train.phases\[1\].steps: 0 must be greater than 0; the phases before"),
        ("train.phases=[{steps: 2, batch: 3}]", "batch"),
        ("train.phases=[{steps: 2}, {sequence_length: 0}]", r"train.phases\[1\].sequence_length: 0"),
        ("train.phases=[{steps: 2}, {sequence_length: 1024}]", r"train.phases\[1\]: sequence_length 1024 is longer"),
        ("train.phases=[{steps: 2}, {global_batch_size: 5}]", r"train.phases\[1\]: train.global_batch_size: 5 is not"),
        ("train.phases=[{steps: 2}, {micro_batch_size: 4}]", r"train.phases\[1\]: .* 4 x data-parallel size 2"),
        ("train.phases=[{weights: [1, 1]}]", r"train.phases\[0\].weights: 2 weights for the 1 sources"),
        ("train.phases=[{weights: [-1]}]", r"train.phases\[0\].weights: \[-1.0\] must not be negative"),
        ("train.phases=[{weights: [0]}]", r"train.phases\[0\].weights: \[0.0\] must not be"),
        ("train.rampup_batch_size=[2, 2]", r"train.rampup_batch_size: \[2, 2\] is not \[start, increment, samples\]"),
        ("train.rampup_batch_size=[2, 0, 8]", r"train.rampup_batch_size: \[2, 0, 8\] is not"),
        ("train.rampup_batch_size=[4, 2, 8]", "train.rampup_batch_size: steps of 2 from 4 do not lead"),
        ("train.rampup_batch_size=[1, 2, 8]", "train.rampup_batch_size: steps of 2 from 1 do not lead"),
        ("train.rampup_batch_size=[1, 1, 8]", "train.rampup_batch_size: train.global_batch_size: 1 is not a multiple"),
        (
            "train.rampup_batch_size=[2, 2, 8] train.phases=[{steps: 2}, {}]",
            "train.rampup_batch_size: the ramp-up does not end within the 2 updates of the first phase",
        ),
        ("teacher.correction.global_batch_size=3", "teacher.correction: train.global_batch_size: 3 is not"),
        ("teacher.correction.global_batch_size=0", "teacher.correction.global_batch_size: 0"),
        ("teacher.correction.lr_decay_style=sine", "teacher.correction.lr_decay_style: 'sine'"),
    ],
)
@pytest.mark.fast_cases(1)
def test_bad_phases_are_refused_in_one_line_before_anything_runs(recipe: Path, override: str, message: str) -> None:
    overrides = [f"train.{part}" for part in override.split("train.") if part] if override.startswith("train") else None
    with pytest.raises(UserError, match=message) as refusal:
        preflight(load_recipe(recipe, [part.strip() for part in overrides or [override]]))
    assert "\n" not in str(refusal.value)


def test_plan_counts_tokens_and_flops_phase_by_phase(recipe: Path) -> None:
    phases = "train.phases=[{steps: 4}, {sequence_length: 128, global_batch_size: 2}]"
    plan = preflight(load_recipe(recipe, [phases, "teacher.correction.global_batch_size=8"]))
    assert plan.tokens["distillation"] == 4 * 4 * 64 + 2 * 2 * 128
    assert plan.tokens["correction"] == 4 * 8 * 64
    assert plan.flops["distillation"] == sum(
        tokens * (forward_flops_per_token(plan.teacher, length) + 3 * forward_flops_per_token(plan.student, length))
        for tokens, length in ((1024, 64), (512, 128))
    )
    said = text(plan)
    assert "4 of 256 tokens (4 x 64" in said
    assert "2 of 256 tokens (2 x 128" in said


def test_the_correction_has_a_schedule_of_its_own(recipe: Path) -> None:
    """2408.11796: warm-up of 120 steps, a fifth of the teacher's peak rate, its batch size, floor and decay."""
    own = CorrectionConfig(steps=500, global_batch_size=8, lr=6e-5, min_lr=3e-6)
    overrides = ["train.lr_decay_style=WSD", "train.lr_wsd_decay_steps=2", "train.phases=[{sequence_length: 128}]"]
    whole = load_recipe(recipe, overrides)
    whole.teacher.correction = own
    found = correction_config(whole)
    assert (found.steps, found.global_batch_size, found.lr, found.min_lr) == (500, 8, 6e-5, 3e-6)
    assert (found.warmup_steps, found.lr_decay_style, found.phases) == (120, "cosine", [])
    assert found.weight_decay == whole.train.weight_decay
    whole.teacher.correction = replace(own, global_batch_size=None)
    assert correction_config(whole).global_batch_size == whole.train.global_batch_size


def test_the_distillations_phases_and_rates_are_no_reason_to_correct_again(recipe: Path) -> None:
    launch.join_job()

    def settings(*overrides: str) -> dict[str, Any]:
        chain = Chain(preflight(load_recipe(recipe, overrides)))
        return {step.name: step.settings for step in chain.steps()}

    first, second = settings(), settings("train.phases=[{steps: 2}, {sequence_length: 128}]", "train.lr=2e-3")
    assert first["correct"] == second["correct"]
    assert first["calibrate"] == second["calibrate"]
    assert first["distill"] != second["distill"]
    assert first["correct"] != settings("teacher.correction.seed=1")["correct"]


RUNS = {
    "one process": (1, Layout()),
    "DP2": (2, Layout()),
    "PP2": (2, Layout(pipeline_model_parallel_size=2)),
    "PP2 VPP2": (2, Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "TP2 SP": (2, Layout(tensor_model_parallel_size=2, sequence_parallel=True)),
}
# 16 tokens, then 24 in larger microbatches, then 8; the made-up samples of a length are functions of their number.
THREE_PHASES = [
    PhaseConfig(steps=3),
    PhaseConfig(steps=3, sequence_length=24, global_batch_size=8, micro_batch_size=2),
    PhaseConfig(sequence_length=8),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student and teacher; `_hf` beside them is what they were made from."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "student_hf", hidden_size=48, ffn_hidden_size=64, tied=True, seed=1)
    write_tiny_llama(root / "teacher_hf", seed=2)
    for name in ("student", "teacher"):
        convert(root / f"{name}_hf", root / name, "megatron")
    return root / "student", root / "teacher"


def interrupted_twice(job: Job, first: int, second: int) -> list[Result]:
    """A run that gets SIGTERM during update `first`, its continuation that gets it during `second`, and the end."""

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    return [run(job, {first: interrupt}), run(job, {second: interrupt}), run(job)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_in_two_phases_ends_bit_for_bit_as_an_undisturbed_one(
    models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """In the middle of the first phase and of the second; teacher windows differ between the phases."""
    world_size, layout = RUNS[name]
    job = Job(*models, tmp_path / "whole", layout, {"steps": 8, "phases": THREE_PHASES}, buffer_bytes=20_000)
    whole = run_distributed(world_size, run, job)
    parts = run_distributed(world_size, interrupted_twice, replace(job, directory=tmp_path / "parts"), 2, 5)
    for results in parts:
        assert [result.outcome for result in results] == ["stopped", "stopped", "done"]
        assert [report.iteration for result in results for report in result.reports] == list(range(1, 9))
    assert_identical(whole, [results[-1] for results in parts])


def interrupted(job: Job, update: int) -> str:
    return run(job, {update: lambda: os.kill(os.getpid(), signal.SIGTERM)}).outcome


@pytest.mark.slow
def test_a_run_goes_on_in_its_second_phase_with_another_number_of_ranks(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    job = Job(*models, tmp_path / "whole", config={"steps": 8, "phases": THREE_PHASES})
    [whole] = run_distributed(1, run, job)
    moved = replace(job, directory=tmp_path / "moved")
    assert set(run_distributed(2, interrupted, moved, 4)) == {"stopped"}
    [resumed] = run_distributed(1, run, moved)
    for one, other in zip(whole.reports[4:], resumed.reports, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one process", "DP2"])
def test_every_update_trains_on_the_samples_of_its_phase(models: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """At a learning rate of 0 the losses of every update are those of its samples in fp64, whatever the ranks."""
    world_size, layout = RUNS[name]
    settings = {"steps": 8, "lr": 0.0, "min_lr": 0.0, "phases": THREE_PHASES}
    found = run_distributed(world_size, run, Job(*models, tmp_path, layout, settings))[0].reports
    student, teacher = (path.with_name(f"{path.name}_hf") for path in models)
    updates = [(3, 4, 16), (3, 8, 24), (2, 4, 8)]
    for steps, size, length in updates:
        source = MadeUpSource(length)
        order = [int(sample) for epoch in range(2) for sample in permutation(64, "order", 7, 0, epoch)]
        for step in range(steps):
            batch = stack([source.sample(sample) for sample in order[step * size : (step + 1) * size]])
            wanted = expected_step(student, teacher, [batch], ce_weight=0.1)
            report = found.pop(0)
            assert report.ce == pytest.approx(wanted.ce / wanted.tokens, rel=1e-5)
            assert report.logits == pytest.approx(wanted.logits / wanted.tokens, rel=1e-5)


@pytest.mark.slow
def test_identical_phases_are_one_phase_bit_for_bit(models: tuple[Path, Path], tmp_path: Path) -> None:
    job = Job(*models, tmp_path / "one")
    phases = [PhaseConfig(steps=2), PhaseConfig(steps=1, weights=[3.0]), PhaseConfig()]
    other = replace(job, directory=tmp_path / "three", config={"phases": phases})
    [one], [three] = run_distributed(1, run, job), run_distributed(1, run, other)
    assert_identical([one], [three])
    assert [report.loss for report in one.reports] == [report.loss for report in three.reports]


@pytest.mark.slow
def test_a_run_interrupted_in_its_ramp_up_ends_bit_for_bit_as_an_undisturbed_one(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {"steps": 7, "global_batch_size": 8, "rampup_batch_size": [2, 2, 24]}
    job = Job(*models, tmp_path / "whole", RUNS["DP2"][1], settings)
    whole = run_distributed(2, run, job)
    parts = run_distributed(2, interrupted_twice, replace(job, directory=tmp_path / "parts"), 2, 5)
    assert_identical(whole, [results[-1] for results in parts])
