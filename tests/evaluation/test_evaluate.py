"""What evaluation measures equals Hugging Face's logits through fp64 formulas, on every layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from minitron_nemo.arch.counts import non_embedding_parameters, parameters
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import DataConfig, recipe_of
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation import generation
from minitron_nemo.evaluation.documents import check_layout
from minitron_nemo.evaluation.evaluate import Measured, evaluate
from minitron_nemo.evaluation.heldout import HeldOut
from minitron_nemo.evaluation.report import summarise
from minitron_nemo.parallel.layout import Layout
from tests.data.corpus import make_texts, prepare, write_jsonl
from tests.models.support import architecture, huggingface_model
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

LENGTH = 24
# Prompts that are longer than the documents, and more rows than there are documents.
GENERATING = {"generate_tokens": 3, "generate_prompt_tokens": 30, "generate_batch_sizes": [1, 7]}
DOCUMENTS = 5  # odd: neither microbatches nor data-parallel ranks come out even

LAYOUTS = {
    "tp1": (1, Layout()),
    "dp2": (2, Layout()),
    "tp2": (2, Layout(tensor_model_parallel_size=2)),
    "tp2-sp": (2, Layout(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, Layout(pipeline_model_parallel_size=2)),
    "pp2-vpp2": (2, Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "tp2-pp2": (4, Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


class _Stored:
    """A random model in both formats."""

    def __init__(self, directory: Path, *, tied: bool, seed: int) -> None:
        self.huggingface = write_tiny_llama(directory / "hf", tied=tied, seed=seed)
        self.megatron = directory / "megatron"
        convert(self.huggingface, self.megatron, "megatron", progress=False)
        self.architecture = architecture(tied=tied)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, _Stored]:
    """A teacher, and a student with tied embeddings."""
    directory = tmp_path_factory.mktemp("evaluated")
    return {
        "teacher": _Stored(directory / "teacher", tied=False, seed=0),
        "pruned": _Stored(directory / "pruned", tied=True, seed=1),
    }


def _documents() -> list[dict[str, Any]]:
    """Random documents; the last one is half padding, one token has half a weight."""
    tokens = torch.randint(259, (DOCUMENTS, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    weights = torch.ones(DOCUMENTS, LENGTH)
    weights[:, 0] = 0.0
    weights[1, 5] = 0.5
    weights[-1, LENGTH // 2 :] = 0.0
    return [
        {"tokens": row[:-1], "labels": row[1:], "token_weights": weight, "id": str(index)}
        for index, (row, weight) in enumerate(zip(tokens, weights, strict=True))
    ]


def _evaluate(directories: dict[str, Path], layout: Layout, **options: Any) -> dict[str, Measured]:
    return evaluate(directories, _documents(), layout, **{"dtype": torch.float32, "micro_batch_size": 2, **options})


def _expected(student: Path, teacher: Path, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Sums per document from Hugging Face's logits."""
    documents = _documents()
    stacked = {key: torch.stack([document[key] for document in documents]) for key in ("tokens", "labels")}
    weights = torch.stack([document["token_weights"] for document in documents]).double()

    def log_p(directory: Path) -> Tensor:
        with torch.no_grad():
            return huggingface_model(directory, dtype)(stacked["tokens"]).logits.double().log_softmax(-1)

    p, q = log_p(student), log_p(teacher)
    kl = (q.exp() * (q - p)).sum(-1)
    values = {
        "ce": -p.gather(-1, stacked["labels"][..., None])[..., 0],
        "kl_to_teacher": kl,
        "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "weight": torch.ones_like(weights),
    }
    sums = {name: (value * weights).sum(1).numpy() for name, value in values.items()}
    # Of the positions 0, 1, 2-3, 4-7, 8-15, 16-23.
    spans = [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 8), slice(8, 16), slice(16, 24)]
    for name, value in (("kl_by_position", kl * weights), ("weight_by_position", weights)):
        sums[name] = torch.stack([value[:, span].sum(1) for span in spans]).numpy()
    return sums


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.fast_cases(2)
def test_sums_equal_hugging_face_on_every_layout_and_rank(name: str, stored: dict[str, _Stored]) -> None:
    world_size, layout = LAYOUTS[name]
    directories = {key: model.megatron for key, model in stored.items()}
    for results in run_distributed(world_size, _evaluate, directories, layout):
        for key, measured in results.items():
            expected = _expected(stored[key].huggingface, stored["teacher"].huggingface, torch.float64)
            for field, values in expected.items():
                np.testing.assert_allclose(getattr(measured, field), values, rtol=1e-5, atol=1e-5, err_msg=field)


def test_the_teacher_does_not_diverge_from_itself(stored: dict[str, _Stored]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        teacher = run_distributed(1, _evaluate, {"teacher": stored["teacher"].megatron}, Layout(), dtype=dtype)[0]
        assert np.abs(teacher["teacher"].kl_to_teacher).max() < 1e-9
        assert np.array_equal(teacher["teacher"].agreement, teacher["teacher"].weight)


def test_bf16_is_measured_in_bf16(stored: dict[str, _Stored]) -> None:
    directories = {key: model.megatron for key, model in stored.items()}
    rounded = run_distributed(1, _evaluate, directories, Layout(), dtype=torch.bfloat16)[0]["pruned"]
    exact = _expected(stored["pruned"].huggingface, stored["teacher"].huggingface, torch.float64)
    np.testing.assert_allclose(rounded.ce, exact["ce"], rtol=0.02)
    assert np.abs(rounded.ce - exact["ce"]).max() > 1e-4


@pytest.mark.parametrize("name", ["tp1", "pp2"])
def test_generation_speed_is_the_same_number_on_all_ranks(name: str, stored: dict[str, _Stored]) -> None:
    world_size, layout = LAYOUTS[name]
    ranks = run_distributed(world_size, _evaluate, {"teacher": stored["teacher"].megatron}, layout, **GENERATING)
    speeds = {rank["teacher"].speeds for rank in ranks}
    assert len(speeds) == 1
    assert [speed.batch_size for speed in speeds.copy().pop()] == [1, 7]
    assert all(speed.tokens_per_second > 0 and speed.peak_memory_bytes > 2**20 for speed in speeds.pop())


def _timed(prompt_tokens: int) -> list[tuple[list[list[int]], int]]:
    """On a rank: the prompts that are timed, and how many tokens they are to be continued by."""
    given = []

    def generate(model: None, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        given.append(([list(prompt) for prompt in prompts], new_tokens))

    with patch.object(generation, "generate", generate):
        generation.measure_speed(None, _documents(), prompt_tokens, 5, [1, 7])  # type: ignore[arg-type]
    return given


@pytest.mark.parametrize("prompt_tokens", [10, 50])
def test_what_is_timed_has_prompts_of_the_length_asked_for(prompt_tokens: int) -> None:
    rows = [document["tokens"].tolist() for document in _documents()]
    rows = [(3 * row)[:prompt_tokens] for row in [*rows, *rows]]
    assert run_distributed(1, _timed, prompt_tokens) == [[(rows[:1], 5), (rows[:7], 5)]]


@pytest.mark.parametrize("name", ["tp2-sp", "pp2"])
@pytest.mark.fast_cases(1)
def test_continuations_are_those_of_hugging_face(name: str, stored: dict[str, _Stored]) -> None:
    world_size, layout = LAYOUTS[name]
    directories = {key: model.megatron for key, model in stored.items()}
    for results in run_distributed(world_size, _evaluate, directories, layout, generate_tokens=4):
        for key, measured in results.items():
            model = huggingface_model(stored[key].huggingface, torch.float32)
            prompts = [document["tokens"][:16] for document in _documents()[:3]]
            assert [prompt for prompt, _ in measured.continuations] == [prompt.tolist() for prompt in prompts]
            for prompt, (_, continuation) in zip(prompts, measured.continuations, strict=True):
                for token in continuation:
                    with torch.no_grad():
                        assert token == int(model(prompt[None]).logits[0, -1].argmax())
                    prompt = torch.cat([prompt, torch.tensor([token])])


def test_counts_come_from_the_architecture(stored: dict[str, _Stored]) -> None:
    directories = {key: model.megatron for key, model in stored.items()}
    evaluation = summarise(run_distributed(1, _evaluate, directories, Layout())[0])
    for key, model in stored.items():
        built = huggingface_model(model.huggingface, torch.float32)
        assert evaluation[key]["parameters"] == sum(parameter.numel() for parameter in built.parameters())
        assert evaluation[key]["parameters"] == parameters(model.architecture)
        assert evaluation[key]["non_embedding_parameters"] == non_embedding_parameters(model.architecture)
        assert evaluation[key]["generation_tokens_per_second"] is None


def test_a_model_with_another_vocabulary_is_refused(stored: dict[str, _Stored], tmp_path: Path) -> None:
    other = tmp_path / "other"
    run_distributed(1, _store_with_vocabulary, other, 300)
    with pytest.raises(UserError, match=r"vocab_size 300 is not the teacher's 259"):
        run_distributed(1, _evaluate, {"teacher": stored["teacher"].megatron, "pruned": other}, Layout())


def _store_with_vocabulary(directory: Path, vocab_size: int) -> None:
    from dataclasses import replace

    from minitron_nemo.models.build import build_model
    from minitron_nemo.models.checkpoint import save_model
    from minitron_nemo.parallel import launch

    launch.initialize(Layout(), seed=1)
    model = build_model(replace(architecture(), vocab_size=vocab_size), Layout(), dtype=torch.float32)
    save_model(model, directory, write_tiny_llama(directory.parent / "hf"))


def test_a_sequence_that_sequence_parallelism_cannot_split_is_refused(stored: dict[str, _Stored]) -> None:
    with pytest.raises(UserError, match=r"evaluate\.sequence_length: 23 "):
        run_distributed(2, _evaluate_odd, stored["teacher"].megatron)


def _evaluate_odd(directory: Path) -> None:
    cut = [
        {key: value[:23] if isinstance(value, Tensor) else value for key, value in document.items()}
        for document in _documents()
    ]
    evaluate({"teacher": directory}, cut, LAYOUTS["tp2-sp"][1], dtype=torch.float32)


def test_a_validation_beside_a_teacher_splits_its_states_on_every_layout(tmp_path: Path) -> None:
    """The teacher's are chunked over tensor-parallel ranks, with sequence parallelism or without."""
    tp2, tp2_sp = LAYOUTS["tp2"][1], LAYOUTS["tp2-sp"][1]
    text = [write_jsonl(tmp_path / "text.jsonl", make_texts(20, seed=1))]
    prepared = prepare(DataConfig(train=text, heldout_fraction=0.5), tmp_path)
    words = r"^evaluate\.sequence_length: 63 is not a multiple of parallel\.tensor_model_parallel_size 2"
    distilled = ["train.steps=2", "train.eval_interval=1", "evaluate.sequence_length=63"]
    with pytest.raises(UserError, match=words):
        HeldOut.from_recipe(recipe_of(distilled), prepared, tp2)
    with pytest.raises(UserError, match=words):
        check_layout(tp2_sp, 63)
    check_layout(tp2, 63)
    check_layout(tp2, 64, compared=True)
