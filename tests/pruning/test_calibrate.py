"""The step: which samples are read, and that it is the same whatever the job looks like."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

import minitron_nemo
from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.cli import main
from minitron_nemo.config import CalibrationConfig, DataConfig, PruneConfig, Recipe, TextSource
from minitron_nemo.data.dataset import open_train
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.data.sampler import Sampler
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ARRAYS, Scores
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import calibrate
from minitron_nemo.pruning.calibration_state import CalibrationState
from minitron_nemo.pruning.plan import make_plan
from tests.importance.hugging_face import reference_scores
from tests.importance.test_collect import assert_same
from tests.pool import run_distributed
from tests.text import write_documents
from tests.tiny import write_tiny_llama


class Job(NamedTuple):
    hugging_face: Path
    teacher: Path
    prepared: Path
    recipe: Recipe
    unfinished: Path

    def calibrated(self, layout: Layout, **calibration: object) -> tuple:
        config = replace(self.recipe.prune.calibration, **calibration)
        recipe = replace(self.recipe, prune=PruneConfig(calibration=config))
        return self.teacher, self.prepared, recipe, layout, self.unfinished

    def counting_separators(self) -> Job:
        return self._replace(recipe=replace(self.recipe, data=replace(self.recipe.data, separator_weight=1.0)))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("job")
    hugging_face = write_tiny_llama(directory / "hf", num_layers=4)
    convert(hugging_face, directory / "teacher", "megatron", progress=False)
    text = write_documents(directory / "text", count=30)
    for file in text.iterdir():  # short ones: samples then have separators, which by default do not count
        file.write_text(file.read_text()[:80])
    source = TextSource(path=str(text))
    recipe = Recipe(
        name="calibration",
        data=DataConfig(train=[source], heldout_fraction=0.0, sequence_length=48),
        prune=PruneConfig(calibration=CalibrationConfig(samples=5)),
    )
    prepare_data(recipe.data, directory / "teacher" / "tokenizer", directory / "prepared", progress=False)
    return Job(hugging_face, directory / "teacher", directory / "prepared", recipe, directory / "unfinished")


@pytest.mark.slow
def test_the_first_samples_of_the_training_order_are_scored(job: Job) -> None:
    scores = run_distributed(1, calibrate, *job.calibrated(Layout()))[0]
    blend = open_train(job.recipe.data, job.prepared)
    samples = [blend.sample(index) for index in Sampler(blend, job.recipe.data.seed).next_batch(5)]
    tokens, weights = (torch.stack([sample[key] for sample in samples]) for key in ("tokens", "token_weights"))
    assert (weights == 0).any()
    reference = reference_scores(job.hugging_face, tokens, weights)
    np.testing.assert_allclose(scores.get(Axis.HIDDEN), reference["norms", "mean", "l2"], rtol=1e-5)
    np.testing.assert_allclose(scores.get(Axis.FFN), reference["ffn", "mean", "l2"], rtol=1e-5)
    np.testing.assert_allclose(scores.get(Axis.HEADS), reference["heads", "mean", "l2"], rtol=1e-5)
    np.testing.assert_allclose(scores.get(Axis.LAYERS), reference["layers"], rtol=1e-5)
    assert (scores.sequences, scores.tokens) == (5, int((weights != 0).sum()))
    assert scores.model_fingerprint == fingerprint(job.teacher)
    expected = {"samples": 5, "precision": "fp32", "sequence_length": 48, "separators_counted": False}
    assert scores.settings == expected
    assert scores.sample_ids == tuple(sorted(sample["id"] for sample in samples))


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 2), (2, 1), (2, 2), (4, 4)])
@pytest.mark.fast_cases(2)
def test_a_number_of_samples_that_does_not_divide_is_scored_exactly(
    job: Job, world_size: int, micro_batch_size: int
) -> None:
    alone = run_distributed(1, calibrate, *job.calibrated(Layout()))[0]
    together = run_distributed(world_size, calibrate, *job.calibrated(Layout(), micro_batch_size=micro_batch_size))[-1]
    np.testing.assert_allclose(together.hidden, alone.hidden, rtol=1e-6)
    np.testing.assert_allclose(together.ffn, alone.ffn, rtol=1e-5)
    for name in ("sequences", "tokens", "model_fingerprint", "data_fingerprint", "settings", "sample_ids"):
        assert getattr(together, name) == getattr(alone, name)


def test_the_data_fingerprint_changes_with_what_is_read(job: Job) -> None:
    more = run_distributed(1, calibrate, *job.calibrated(Layout(), samples=6))[0]
    fewer = run_distributed(1, calibrate, *job.calibrated(Layout()))[0]
    assert more.data_fingerprint != fewer.data_fingerprint
    assert more.sequences == 6


def printed(*arguments: Any) -> list[str]:
    """What `calibrate` prints on this rank."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        calibrate(*arguments)
    return output.getvalue().splitlines()


def test_progress_is_shown_by_one_rank(job: Job) -> None:
    layout = Layout(pipeline_model_parallel_size=2)
    lines = run_distributed(2, printed, *job.calibrated(layout, micro_batch_size=2))
    assert len(lines[0]) == 1 and lines[0][0].startswith("[calibrate] 3/3 microbatches in 0:00:")
    assert lines[1] == []


def test_context_parallelism_is_refused_in_one_line(job: Job) -> None:
    with pytest.raises(UserError, match="parallel.context_parallel_size: 2 is not supported by calibration") as error:
        calibrate(*job.calibrated(Layout(context_parallel_size=2)))
    assert "\n" not in str(error.value)


class Killed(Exception):
    """Raised on every rank, where a job would be killed."""


def interrupted(saves: int, *arguments: Any) -> list[str]:
    """Calibrate up to the save after `saves` others, which rank 0 alone completes; returns the files that are there."""
    save, done = CalibrationState.save, 0

    def killed(self: CalibrationState, *args: Any) -> None:
        nonlocal done
        done += 1
        if done <= saves:
            return save(self, *args)
        if launch.rank() == 0:
            with patch.object(launch, "barrier", side_effect=Killed):  # its file is written, the others' are not
                save(self, *args)
        raise Killed

    with patch.object(CalibrationState, "save", killed), contextlib.suppress(Killed):
        calibrate(*arguments)
    launch.barrier()
    return sorted(file.name for file in arguments[-1].iterdir())


def resumed(*arguments: Any) -> tuple[Scores, list[str]]:
    """Scores, and what is printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        scores = calibrate(*arguments)
    return scores, output.getvalue().splitlines()


STAGES = Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
SHARDS = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
STARTS_AGAIN = "is of another model, data, setting, layout or version: starts again"


@pytest.mark.parametrize(("world_size", "layout"), [(1, Layout()), (2, STAGES), (4, SHARDS)], ids=str)
@pytest.mark.fast_cases(1)
def test_an_interrupted_pass_goes_on_and_ends_with_the_same_bits(
    job: Job, tmp_path: Path, world_size: int, layout: Layout
) -> None:
    job = job._replace(unfinished=tmp_path / "unfinished")
    whole = run_distributed(world_size, calibrate, *job.calibrated(layout, samples=14))[0]
    assert not job.unfinished.exists()
    arguments = job.calibrated(layout, samples=14, save_interval=2)
    left = run_distributed(world_size, interrupted, 2, *arguments)[0]
    assert left == sorted([f"00000004-rank_{rank}.pt" for rank in range(world_size)] + ["00000006-rank_0.pt"])
    by_rank = run_distributed(world_size, resumed, *arguments)
    scores, lines = by_rank[0]
    # Where only one process works, its sixth microbatch is known to all of them.
    done = 6 if world_size == 1 else 4
    assert lines[0] == f"[calibrate] goes on after {done} microbatches of each rank"
    assert all(not said for _, said in by_rank[1:])
    for array in ARRAYS:
        np.testing.assert_array_equal(getattr(scores, array), getattr(whole, array), err_msg=array)
    assert (scores.sequences, scores.tokens, scores.sample_ids) == (whole.sequences, whole.tokens, whole.sample_ids)


@pytest.mark.slow
def test_a_pass_of_another_layout_or_setting_starts_again_and_says_so(job: Job, tmp_path: Path) -> None:
    job = job._replace(unfinished=tmp_path / "unfinished")
    run_distributed(2, interrupted, 1, *job.calibrated(STAGES, samples=8, save_interval=2))
    cases = [
        (job, SHARDS, {"samples": 8}),
        (job, STAGES, {"samples": 7}),
        (job, STAGES, {"samples": 8, "first_sample": 1}),
        (job.counting_separators(), STAGES, {"samples": 8}),
    ]
    for changed, layout, other in cases:
        arguments = changed.calibrated(layout, save_interval=50, **other)
        scores, lines = run_distributed(2, resumed, *arguments)[0]
        assert lines[0] == f"[calibrate] {job.unfinished} {STARTS_AGAIN}"
        fresh = changed._replace(unfinished=tmp_path / "none").calibrated(layout, **other)
        whole = run_distributed(2, calibrate, *fresh)[0]
        for array in ARRAYS:
            np.testing.assert_array_equal(getattr(scores, array), getattr(whole, array), err_msg=array)


@pytest.mark.slow
def test_a_pass_that_is_killed_twice_in_one_save_keeps_what_it_wrote(job: Job, tmp_path: Path) -> None:
    arguments = job._replace(unfinished=tmp_path / "unfinished").calibrated(Layout(), samples=10, save_interval=1)
    left = run_distributed(2, interrupted, 2, *arguments)[0]
    assert left == ["00000002-rank_0.pt", "00000002-rank_1.pt", "00000003-rank_0.pt"]
    left = run_distributed(2, interrupted, 1, *arguments)[0]  # goes on after 2 and writes that of 3 once more
    assert left == ["00000003-rank_0.pt", "00000003-rank_1.pt", "00000004-rank_0.pt"]
    _, lines = run_distributed(2, resumed, *arguments)[0]
    assert lines[0] == "[calibrate] goes on after 3 microbatches of each rank"


def test_a_pass_over_the_same_samples_with_other_weights_starts_again(job: Job, tmp_path: Path) -> None:
    """Over two samples of each of two texts, more than once: as a set they are the same whatever the weights."""
    [document] = write_documents(tmp_path / "text", count=1).iterdir()
    for start, name in enumerate(("a.txt", "b.txt")):
        (tmp_path / name).write_text(document.read_text()[200 * start :][:120])

    def of(*weights: float) -> Job:
        names = zip(("a.txt", "b.txt"), weights, strict=True)
        text = [TextSource(path=str(tmp_path / name), weight=weight) for name, weight in names]
        recipe = replace(job.recipe, data=replace(job.recipe.data, train=text, heldout_fraction=0.0))
        return job._replace(recipe=recipe, prepared=tmp_path / "prepared", unfinished=tmp_path / "unfinished")

    first, second = of(1, 3), of(3, 1)
    prepare_data(first.recipe.data, job.teacher / "tokenizer", first.prepared, progress=False)
    run_distributed(1, interrupted, 1, *first.calibrated(Layout(), samples=8, save_interval=2))
    scores, lines = run_distributed(1, resumed, *second.calibrated(Layout(), samples=8, save_interval=20))[0]
    whole, fresh = (
        run_distributed(1, calibrate, *of_one._replace(unfinished=tmp_path / "none").calibrated(Layout(), samples=8))[0]
        for of_one in (first, second)
    )
    assert set(whole.sample_ids) == set(fresh.sample_ids) and len(fresh.sample_ids) == fresh.sequences == 8
    assert lines[0] == f"[calibrate] {second.unfinished} {STARTS_AGAIN}"
    for array in ARRAYS:
        np.testing.assert_array_equal(getattr(scores, array), getattr(fresh, array), err_msg=array)
    assert scores.data_fingerprint == fresh.data_fingerprint != whole.data_fingerprint


def resumed_by_another_version(*arguments: Any) -> tuple[Scores, list[str]]:
    with patch.object(minitron_nemo, "__version__", "another"):
        return resumed(*arguments)


def test_a_pass_of_another_version_starts_again(job: Job, tmp_path: Path) -> None:
    arguments = job._replace(unfinished=tmp_path / "unfinished").calibrated(Layout(), samples=6, save_interval=2)
    run_distributed(1, interrupted, 1, *arguments)
    _, lines = run_distributed(1, resumed_by_another_version, *arguments)[0]
    assert lines[0] == f"[calibrate] {tmp_path / 'unfinished'} {STARTS_AGAIN}"


def test_a_pass_of_the_same_weights_with_another_configuration_starts_again(job: Job, tmp_path: Path) -> None:
    job = job._replace(unfinished=tmp_path / "unfinished", teacher=shutil.copytree(job.teacher, tmp_path / "teacher"))
    arguments = job.calibrated(Layout(), samples=6, save_interval=2)
    run_distributed(1, interrupted, 1, *arguments)
    replace(Architecture.load(job.teacher), rotary_base=5e5).save(job.teacher)
    _, lines = run_distributed(1, resumed, *arguments)[0]
    assert lines[0] == f"[calibrate] {job.unfinished} {STARTS_AGAIN}"


def test_a_damaged_state_is_named(job: Job, tmp_path: Path) -> None:
    job = job._replace(unfinished=tmp_path / "unfinished")
    arguments = job.calibrated(Layout(), samples=8, save_interval=2)
    (name, *_) = run_distributed(1, interrupted, 1, *arguments)[0]
    file = job.unfinished / name
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(UserError, match=f"{name}: cannot be loaded .*; remove .*unfinished and calibrate again"):
        run_distributed(1, calibrate, *arguments)


@pytest.mark.slow
def test_merged_passes_are_one_pass_over_all_samples(job: Job, tmp_path: Path) -> None:
    whole = run_distributed(1, calibrate, *job.calibrated(Layout(), samples=9))[0]
    first = run_distributed(1, calibrate, *job.calibrated(Layout(), samples=4))[0]
    second = run_distributed(1, calibrate, *job.calibrated(Layout(), samples=5, first_sample=4))[0]
    assert not set(first.sample_ids) & set(second.sample_ids)
    for scores, name in ((first, "first"), (second, "second")):
        scores.save(tmp_path / f"{name}.npz")
    files = [str(tmp_path / f"{name}.npz") for name in ("first", "second", "merged")]
    assert main(["merge-scores", *files[:2], "--out", files[2]]) == 0
    merged = Scores.load(tmp_path / "merged.npz")
    assert_same(merged, whole, 1e-6)
    for name in ("model_fingerprint", "data_fingerprint", "settings", "sample_ids"):
        assert getattr(merged, name) == getattr(whole, name), name
    config = PruneConfig(hidden_size=48, ffn_hidden_size=64, num_attention_heads=4, num_layers=3)
    plans = [make_plan(scores, scores.architecture, config) for scores in (merged, whole)]
    assert replace(plans[0], gaps={}) == replace(plans[1], gaps={})
    elsewhere = run_distributed(2, calibrate, *job.calibrated(SHARDS, samples=5, first_sample=4))[0]
    assert_same(Scores.merge([elsewhere, first]), whole)  # what layouts agree to
    assert main(["merge-scores", files[0], files[2], "--out", str(tmp_path / "twice.npz")]) == 2
    assert not (tmp_path / "twice.npz").exists()
    arguments = job.counting_separators().calibrated(Layout(), samples=5, first_sample=4)
    with pytest.raises(UserError, match="separators_counted is True, that of pass 1 False; merge passes of one kind"):
        Scores.merge([first, run_distributed(1, calibrate, *arguments)[0]])
