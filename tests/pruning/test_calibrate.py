"""The step: which samples are read, and that it is the same whatever the job looks like."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from minitron_nemo.arch import Axis
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import CalibrationConfig, DataConfig, PruneConfig, Recipe, TextSource
from minitron_nemo.data.dataset import open_train
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.data.sampler import Sampler
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import calibrate
from tests.importance.hugging_face import reference_scores
from tests.pool import run_distributed
from tests.text import write_documents
from tests.tiny import write_tiny_llama


class Job(NamedTuple):
    hugging_face: Path
    teacher: Path
    prepared: Path
    recipe: Recipe

    def calibrated(self, layout: Layout, **calibration: object) -> tuple:
        config = replace(self.recipe.prune.calibration, **calibration)
        recipe = replace(self.recipe, prune=PruneConfig(calibration=config))
        return self.teacher, self.prepared, recipe, layout


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("job")
    hugging_face = write_tiny_llama(directory / "hf", num_layers=2)
    convert(hugging_face, directory / "teacher", "megatron", progress=False)
    text = write_documents(directory / "text", count=30)
    for file in text.iterdir():  # short ones: samples then have separators, which by default do not count
        file.write_text(file.read_text()[:80])
    source = TextSource(path=str(text))
    recipe = Recipe(
        name="calibration",
        data=DataConfig(train=[source], sequence_length=48),
        prune=PruneConfig(calibration=CalibrationConfig(samples=5)),
    )
    prepare_data(recipe.data, directory / "teacher" / "tokenizer", directory / "prepared", progress=False)
    return Job(hugging_face, directory / "teacher", directory / "prepared", recipe)


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
    assert scores.settings == {"samples": 5, "precision": "fp32", "sequence_length": 48}


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 2), (2, 1), (2, 2), (4, 4)])
def test_a_number_of_samples_that_does_not_divide_is_scored_exactly(
    job: Job, world_size: int, micro_batch_size: int
) -> None:
    alone = run_distributed(1, calibrate, *job.calibrated(Layout()))[0]
    together = run_distributed(world_size, calibrate, *job.calibrated(Layout(), micro_batch_size=micro_batch_size))[-1]
    np.testing.assert_allclose(together.hidden, alone.hidden, rtol=1e-6)
    np.testing.assert_allclose(together.ffn, alone.ffn, rtol=1e-5)
    for name in ("sequences", "tokens", "model_fingerprint", "data_fingerprint", "settings"):
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
    assert lines == [[f"[calibrate] {number}/3 microbatches" for number in range(1, 4)], []]


def test_context_parallelism_is_refused_in_one_line(job: Job) -> None:
    with pytest.raises(UserError, match="parallel.context_parallel_size: 2 is not supported by calibration") as error:
        calibrate(*job.calibrated(Layout(context_parallel_size=2)))
    assert "\n" not in str(error.value)
