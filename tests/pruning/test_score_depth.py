"""The step: what it reads, that it goes on where it was stopped, that it measures nothing twice; text and task."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import minitron_nemo
from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import CalibrationConfig, DataConfig, DepthConfig, PruneConfig, Recipe, TextSource
from minitron_nemo.data.dataset import open_train
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.data.sampler import Sampler
from minitron_nemo.models.branches import Branch, run_branches
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning import score_depth as step
from minitron_nemo.pruning.depth import choose
from minitron_nemo.pruning.depth_scores import DepthScores
from tests.importance.hugging_face import load
from tests.models.support import LAYOUTS
from tests.pool import run_distributed
from tests.pruning.layers_left_out import hugging_face_sums
from tests.text import write_documents
from tests.tiny import write_tiny_llama

LAYERS = 4
SAMPLES = 7


class Job(NamedTuple):
    hugging_face: Path
    teacher: Path
    prepared: Path
    recipe: Recipe

    def arguments(self, layout: Layout, path: Path, num_layers: int = 3, **depth: Any) -> tuple:
        """Of `score_depth`; `method` is leave_one_out, or what `depth` says."""
        method = depth.pop("method", "leave_one_out")
        config = replace(self.recipe.prune.depth, **depth)
        pruning = replace(self.recipe.prune, num_layers=num_layers, depth_method=method, depth=config)
        return self.teacher, self.prepared, replace(self.recipe, prune=pruning), layout, path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("job")
    hugging_face = write_tiny_llama(directory / "hf", num_layers=LAYERS)
    convert(hugging_face, directory / "teacher", "megatron", progress=False)
    text = write_documents(directory / "text", count=30)
    for file in text.iterdir():  # short ones: samples then have separators, which by default do not count
        file.write_text(file.read_text()[:80])
    pruning = PruneConfig(calibration=CalibrationConfig(samples=3), depth=DepthConfig(samples=SAMPLES))
    data = DataConfig(train=[TextSource(path=str(text))], heldout_fraction=0.0, sequence_length=32)
    recipe = Recipe(name="depth", data=data, prune=pruning)
    prepare_data(data, directory / "teacher" / "tokenizer", directory / "prepared", progress=False)
    return Job(hugging_face, directory / "teacher", directory / "prepared", recipe)


def run(*arguments: Any) -> dict[Branch, np.ndarray]:
    return step.score_depth(*arguments).sums


@pytest.mark.parametrize("world_size, layout", [LAYOUTS["tp1"], LAYOUTS["pp2-vpp2"], (2, Layout())])
@pytest.mark.fast_cases(1)
def test_the_first_samples_of_the_training_order_are_measured(
    world_size: int, layout: Layout, job: Job, tmp_path: Path
) -> None:
    by_rank = run_distributed(world_size, run, *job.arguments(layout, tmp_path / "depth.npz"))
    blend = open_train(job.recipe.data, job.prepared)
    samples = [blend.sample(index) for index in Sampler(blend, job.recipe.data.seed).next_batch(SAMPLES)]
    assert any((sample["token_weights"] == 0).any() for sample in samples)
    written = DepthScores.load(tmp_path / "depth.npz")
    for layer in range(LAYERS):
        expected = hugging_face_sums(job.hugging_face, {layer}, samples)
        for sums in (*by_rank, written.sums):
            np.testing.assert_allclose(sums[Branch({layer})], expected, rtol=1e-5)
    np.testing.assert_array_equal(written.weights, [float(sample["token_weights"].sum()) for sample in samples])


class Killed(Exception):
    pass


def killed_and_run_again(saves: int, *arguments: Any) -> tuple[int, int, dict[Branch, np.ndarray]]:
    """Runs of microbatches until the given number of files was written, and again until the end; what came out."""
    whole_save, whole_run = DepthScores.save, run_branches
    written = runs = 0

    def save(self: DepthScores, path: Path) -> None:
        nonlocal written
        if written == saves:
            raise Killed
        whole_save(self, path)
        written += 1

    def counted(*given: Any) -> Any:
        nonlocal runs
        runs += 1
        return whole_run(*given)

    with patch.object(step, "SAVED_MICROBATCHES", 2), patch.object(step, "run_branches", counted):
        with patch.object(DepthScores, "save", save), pytest.raises(Killed):
            step.score_depth(*arguments)
        first, runs = runs, 0
        sums = step.score_depth(*arguments).sums
    return first, runs, sums


@pytest.mark.slow
def test_a_measurement_that_was_killed_goes_on_where_it_was_and_ends_the_same(job: Job, tmp_path: Path) -> None:
    arguments = job.arguments(Layout(), tmp_path / "undisturbed.npz", method="greedy", num_layers=2)
    [undisturbed] = run_distributed(1, run, *arguments)
    for saves in (2, 5):  # of four parts in each of two rounds
        arguments = job.arguments(Layout(), tmp_path / f"{saves}.npz", method="greedy", num_layers=2)
        [(first, second, sums)] = run_distributed(1, killed_and_run_again, saves, *arguments)
        assert (first, second) == (saves + 1, 8 - saves)
        assert sums.keys() == undisturbed.keys()
        for branch, values in undisturbed.items():
            np.testing.assert_array_equal(sums[branch], values)


def no_model(*_: Any) -> None:
    raise AssertionError("there is nothing to measure")


def run_without_a_model(*arguments: Any) -> dict[Branch, np.ndarray]:
    with patch.object(step, "open_teacher", no_model):
        return run(*arguments)


def run_as_another_version(*arguments: Any) -> None:
    with patch.object(minitron_nemo, "__version__", "another"):
        run_without_a_model(*arguments)


def test_what_was_measured_serves_other_methods_and_depths(job: Job, tmp_path: Path) -> None:
    path = tmp_path / "depth.npz"
    [first] = run_distributed(1, run, *job.arguments(Layout(), path, num_layers=3))
    [again] = run_distributed(1, run_without_a_model, *job.arguments(Layout(), path, num_layers=2))
    assert again.keys() == first.keys()
    [block] = run_distributed(1, run_without_a_model, *job.arguments(Layout(), path, 3, method="best_block"))
    assert block.keys() == first.keys()
    [greedy] = run_distributed(1, run, *job.arguments(Layout(), path, num_layers=2, method="greedy"))
    for branch, values in first.items():
        np.testing.assert_array_equal(greedy[branch], values)
    assert len(greedy) == len(first) + LAYERS - 1
    with pytest.raises(AssertionError, match="there is nothing to measure"):  # other sequences
        run_distributed(1, run_without_a_model, *job.arguments(Layout(), path, samples=SAMPLES + 1))
    with pytest.raises(AssertionError, match="there is nothing to measure"):
        run_distributed(1, run_as_another_version, *job.arguments(Layout(), path, num_layers=2))
    teacher = shutil.copytree(job.teacher, tmp_path / "teacher")
    replace(Architecture.load(teacher), rotary_base=5e5).save(teacher)
    with pytest.raises(AssertionError, match="there is nothing to measure"):
        run_distributed(1, run_without_a_model, *job._replace(teacher=teacher).arguments(Layout(), path))


def test_what_other_runs_have_measured_is_copied_as_far_as_it_is_needed(job: Job, tmp_path: Path) -> None:
    lent = tmp_path / "lent.npz"
    [greedy] = run_distributed(1, run, *job.arguments(Layout(), lent, num_layers=2, method="greedy"))
    own = job.arguments(Layout(), tmp_path / "own" / "depth.npz", num_layers=1)
    [copied] = run_distributed(1, run_without_a_model, *own, [tmp_path / "nothing.npz", lent])
    written = DepthScores.load(tmp_path / "own" / "depth.npz").sums
    assert copied.keys() == written.keys() == {Branch(), *(Branch({layer}) for layer in range(LAYERS))}
    for branch, values in written.items():
        np.testing.assert_array_equal(values, greedy[branch])
    other = job.arguments(Layout(), tmp_path / "other.npz", samples=SAMPLES + 1)
    with pytest.raises(AssertionError, match="there is nothing to measure"):
        run_distributed(1, run_without_a_model, *other, [lent])


QUESTIONS: list[dict[str, Any]] = [
    {"context": "The quick brown fox", "choices": [" jumps", " sleeps under", " x"], "answer": 0},
    {"context": "Two and two are ", "choices": ["four", "seven"], "answer": 1},
    {"context": ["Ann", "Bob", "Cy"], "choices": [" went home."] * 3, "answer": 2},
    {"context": "", "choices": ["Yes, of course", "No"], "answer": 0},
]


def hugging_face_log_probabilities(directory: Path, left_out: int | None) -> list[list[float]]:
    """Of every choice, by the tokens that the tokenizer of bytes gives; the space in front belongs to the choice."""
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    if left_out is not None:
        model.model.layers = torch.nn.ModuleList(
            layer for number, layer in enumerate(model.model.layers) if number != left_out
        )
    found = []
    for question in QUESTIONS:
        values = []
        for place, choice in enumerate(question["choices"]):
            context = question["context"]
            context = context[place] if isinstance(context, list) else context
            before = tokenizer.encode(context.rstrip()) or [tokenizer.bos_token_id]
            after = tokenizer.encode(context[len(context.rstrip()) :] + choice)
            with torch.no_grad():
                log_p = model(torch.tensor([before + after]), use_cache=False).logits[0].log_softmax(-1)
            predicted = log_p[len(before) - 1 : -1].gather(-1, torch.tensor(after)[:, None])
            values.append(float(predicted.sum()))
        found.append(values)
    return found


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["tp1", "tp2-sp", "pp2"])
@pytest.mark.fast_cases(1)
def test_a_tasks_choices_are_as_likely_as_hugging_face_says_and_win_by_it(
    name: str, normalize: bool, job: Job, tmp_path: Path
) -> None:
    world_size, layout = LAYOUTS[name]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    depth = {"metric": "task", "task": str(tmp_path / "task.jsonl"), "normalize": normalize}
    run_distributed(world_size, run, *job.arguments(layout, tmp_path / "depth.npz", **depth))
    scores = DepthScores.load(tmp_path / "depth.npz")
    costs = {}
    for layer in (None, *range(LAYERS)):
        branch = Branch() if layer is None else Branch({layer})
        expected = hugging_face_log_probabilities(job.hugging_face, layer)
        np.testing.assert_allclose(-scores.sums[branch], np.concatenate(expected), rtol=1e-5)
        right, margins = 0, []
        for question, values in zip(QUESTIONS, expected, strict=True):
            if normalize:
                values = [v / len(c.strip()) for v, c in zip(values, question["choices"], strict=True)]
            answer = question["answer"]
            right += max(range(len(values)), key=values.__getitem__) == answer
            margins.append(values[answer] - max(v for place, v in enumerate(values) if place != answer))
        costs[branch] = (-right / len(QUESTIONS), -float(np.mean(margins)))
        assert scores.cost(branch, normalize) == pytest.approx(costs[branch], rel=1e-4)
    dropped, _ = choose(scores, "leave_one_out", 1, normalize)
    assert dropped == min((Branch({layer}) for layer in range(LAYERS)), key=costs.__getitem__)
