"""Seconds and FLOPs of whole steps in a plan, by hand; and which of them it says are not known."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path

import pytest

from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.cli import main
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.disk import disk
from minitron_nemo.planning.estimate import Estimate
from minitron_nemo.preflight import Preflight
from tests.planning.test_plan import RECIPES, WIDTH, plan

CACHED = "teacher.placement=cached"
PEAK = 1e15


def seconds(found: Preflight) -> dict[str, float]:
    """By step, at half of PEAK, in no time for messages."""
    device = Device(peak_flops=PEAK, calibration_peak_flops=PEAK, transformer_engine=True)
    steps = Estimate(found.job, device, found.flops).seconds
    assert steps is not None
    return steps


def test_the_pass_of_a_cached_teacher_is_in_time_and_flops() -> None:
    """Llama 3.1 8B on TP4 with SP: 9960 x 1152 samples in blocks of 64, which 64 replicas share."""
    colocated, cached = plan(WIDTH), plan(WIDTH, CACHED)
    assert cached.tokens["cache"] == cached.tokens["distillation"] == 9960 * 1152 * 8192
    assert cached.flops["cache"] == forward_flops_per_token(cached.teacher, 8192) * cached.tokens["cache"]
    assert cached.flops["cache"] + cached.flops["distillation"] == colocated.flops["distillation"]
    assert colocated.tokens["cache"] == colocated.flops["cache"] == 0

    computing = forward_flops_per_token(cached.teacher, 8192) * 8192 / 4 / (0.5 * 989e12)
    # Four messages of a layer, and the embedding's, three quarters of [8192, 4096] in bf16 each.
    sent = (4 * 32 + 1) * 0.75 * 8192 * 4096 * 2 / 450e9
    rounds = ceil(9960 * 1152 / 64 / 64)
    found, beside = cached.estimate.seconds, colocated.estimate.seconds
    assert found is not None and beside is not None and "cache-teacher" not in beside
    assert found["cache-teacher"] == pytest.approx(rounds * 64 * (computing + sent), rel=1e-9)
    assert sum(found.values()) == pytest.approx(sum(beside.values()), rel=0.001)  # the same work, elsewhere


@pytest.mark.parametrize(("stages", "virtual", "microbatches"), [(2, 1, 22), (2, 2, 22), (4, 2, 24)])
def test_every_block_of_a_cache_fills_the_pipeline_anew(stages: int, virtual: int, microbatches: int) -> None:
    """64 samples are 22 microbatches of 3, interleaved a multiple of the stages, the last of which has the output."""
    sizes = f"pipeline_model_parallel_size={stages}", f"virtual_pipeline_model_parallel_size={virtual}"
    keys = [f"parallel.{size}" for size in sizes[:virtual]]
    found = plan(WIDTH, CACHED, *keys, "train.micro_batch_size=3")
    output = 2 * 4096 * 128256
    layers = (forward_flops_per_token(found.teacher, 8192) - output) / stages
    block = microbatches * (layers + output) + (stages - 1) * layers / virtual
    replicas = 256 // 4 // stages
    rounds = ceil(9960 * 1152 / 64 / replicas)
    assert seconds(found)["cache-teacher"] == pytest.approx(rounds * block * 3 * 8192 / 4 / (0.5 * PEAK), rel=1e-9)


def test_a_cache_of_phases_has_blocks_of_each_length() -> None:
    """Two of three phases share a length, and blocks, of the larger of their microbatches."""
    lengths, sizes, steps = (4096, 8192, 4096), (1, 1, 3), (1, 1, 2)
    phases = ",".join(
        f"{{steps: {count}, sequence_length: {length}, micro_batch_size: {size}}}"
        for count, length, size in zip(steps, lengths, sizes, strict=True)
    )
    found = plan(WIDTH, CACHED, "train.steps=4", f"train.phases=[{phases}]", "train.warmup_steps=1")
    assert found.tokens["cache"] == 1152 * (3 * 4096 + 8192)
    # 18 blocks of 64 for 64 replicas: one round; 54 of the shorter samples: one as well, of 22 microbatches of 3.
    short, long = (
        count * forward_flops_per_token(found.teacher, length) * length / 4
        for count, length in ((22 * 3, 4096), (64, 8192))
    )
    assert seconds(found)["cache-teacher"] == pytest.approx((short + long) / (0.5 * PEAK), rel=1e-9)


def test_no_cache_is_planned_that_the_chain_does_not_fill() -> None:
    found = plan(WIDTH, CACHED, "distill.logits_weight=0", "distill.ce_weight=1")
    assert "cache-teacher" not in seconds(found)
    assert found.tokens["cache"] == found.flops["cache"] == 0
    assert found.flops["distillation"] == 3 * forward_flops_per_token(found.student, 8192) * 9960 * 1152 * 8192
    assert all("cache" not in each.what for each in disk(found.job))


@pytest.mark.parametrize("borrowed", [False, True])
def test_no_step_is_planned_that_a_file_or_another_run_spares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], borrowed: bool
) -> None:
    """Given Scores spare the calibration, `from_run` the correction and the converted teacher besides."""
    (tmp_path / "scores.npz").touch()
    key = f"from_run={tmp_path}" if borrowed else f"prune.scores={tmp_path / 'scores.npz'}"
    whole, spared = plan(WIDTH), plan(WIDTH, key)
    tokens = {"calibration": 0, **({"correction": 0} if borrowed else {})}
    assert spared.tokens == whole.tokens | tokens and all(whole.tokens[name] for name in tokens)
    assert spared.flops == whole.flops | tokens
    steps = {"calibrate", *(["correct"] if borrowed else [])}
    assert {step for step, taken in seconds(whole).items() if step in steps and taken} == steps
    assert not {step for step, taken in seconds(spared).items() if step in steps and taken}
    assert spared.estimate.memory == [each for each in whole.estimate.memory if each.step not in steps]
    files = {"teacher, converted", "teacher's correction, checkpoints", "teacher, corrected"} if borrowed else set()
    assert spared.estimate.disk == [each for each in whole.estimate.disk if each.what not in files]
    assert files <= {each.what for each in whole.estimate.disk}
    fp32 = "prune.calibration.precision=fp32"
    assert plan(WIDTH, fp32).estimate.untimed.keys() == {"calibrate", "repair"}
    assert plan(WIDTH, fp32, key).estimate.untimed.keys() == {"repair"}
    cut = "prune.repair.ffn=false", "prune.repair.hidden=false", "train.steps=0", "teacher.correction.steps=0"
    assert main(["plan", str(RECIPES / f"{WIDTH}.yaml"), *cut, key]) == 0
    assert f"{'memory':26}none planned: no step of this run calibrates, repairs or trains\n" in capsys.readouterr().out


def test_passes_are_timed_at_the_peak_of_the_precision_they_compute_in() -> None:
    """The data sheet's is of bf16, `train.peak_flops` of `train.precision`."""
    for keys, peak in (
        ((), 989e12),
        (("train.peak_flops=500e12",), 500e12),
        (("train.precision=fp32", "train.peak_flops=50e12"), 989e12),
        (("train.precision=fp32", "train.peak_flops=50e12", "prune.calibration.precision=fp32"), 50e12),
    ):
        found = plan(WIDTH, *keys)
        taken = found.estimate.seconds
        assert taken is not None and not found.estimate.untimed
        assert taken["calibrate"] == pytest.approx(found.flops["calibration"] / 256 / (0.5 * peak))
        # Five passes, which end before the logits, of 128 samples; not what they sum, in fp32.
        a_pass = forward_flops_per_token(found.source, 8192) - 2 * 128256 * 4096
        assert taken["repair"] == pytest.approx(5 * a_pass * 128 * 8192 / 256 / (0.5 * peak))


@pytest.mark.slow
def test_passes_in_a_precision_without_a_known_peak_are_said_not_to_be_timed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In fp32, the default, which the data sheets' figures are not of."""
    recipe, fp32 = str(RECIPES / f"{WIDTH}.yaml"), "prune.calibration.precision=fp32"
    why = "no peak FLOP/s are known for prune.calibration.precision fp32"
    assert main(["plan", recipe, fp32, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["untimed"] == {"calibrate": why, "repair": why}
    assert set(found["seconds"]) == {"correct", "distill"}
    assert found["device_hours"] == pytest.approx(256 * sum(found["seconds"].values()) / 3600)
    assert main(["plan", recipe, fp32]) == 0
    printed = capsys.readouterr().out
    assert f"{'':26}without calibrate: {why}\n{'':26}without repair: {why}\n" in printed
    assert main(["plan", recipe, fp32, "train.steps=0", "teacher.correction.steps=0"]) == 0
    assert f"{'time':26}not known of any step\n{'':26}without calibrate: " in capsys.readouterr().out
    stages = str(RECIPES / "nemotron4_15b_to_8b_to_4b.yaml")
    for keys, lacks in (((), False), ((fp32,), True)):
        assert main(["plan", stages, *keys]) == 0
        total = capsys.readouterr().out.partition("all stages")[2]
        assert "device-hours" in total and ("without what is not known" in total) == lacks


@pytest.mark.slow
def test_choosing_layers_by_a_task_is_said_not_to_be_timed(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, task = str(RECIPES / f"{WIDTH}.yaml"), RECIPES / "tasks" / "opposites.jsonl"
    keys = "prune.num_layers=24", "prune.depth_method=greedy"
    assert plan(WIDTH, *keys).estimate.untimed == {}
    by_loss = plan(WIDTH, *keys).estimate.seconds
    assert by_loss is not None and by_loss["score-depth"] > 0
    assert main(["plan", recipe, *keys, "prune.depth.metric=task", f"prune.depth.task={task}"]) == 0
    said = "without score-depth: how long the questions of prune.depth.task are is not known"
    assert said in capsys.readouterr().out


def test_the_manual_says_what_solving_takes_in_the_recipe() -> None:
    """`memory, repair` of the width recipe, fullest where a linear_fc2's neurons are solved for."""
    (repair,) = [each for each in plan(WIDTH).estimate.memory if each.step == "repair"]
    assert repair.moment == "solve"
    manual = (RECIPES.parent / "docs" / "plan.md").read_text()
    assert f"{repair.parts['work'] / 1e9:.1f} GB for the neurons of Llama 3.1 8B cut to 9216" in manual
