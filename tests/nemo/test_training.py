"""DistillationModel in NeMo's own trainer, on the CPU, compared with two Hugging Face models in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo.collections import llm
from nemo.lightning import io
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from minitron_nemo.checkpoint.transform import convert
from tests.distillation.reference import Expected, expected_step, random_microbatches, states_of
from tests.nemo.jobs import nemo, run_job, write_models, write_samples

OBJECTIVE = {"logits_weight": 1.0, "ce_weight": 0.5, "temperature": 2.0}
LAYOUTS = {
    "one process": (1, {}),
    "tp=2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp=2": (2, {"pipeline_model_parallel_size": 2, "pipeline_dtype": None}),
    "dp=2": (2, {}),
}


@dataclass
class Trained:
    logged: dict[str, float]
    expected: Expected
    student: Path  # Hugging Face, before the step
    checkpoint: Path  # NeMo, after it


@pytest.fixture(scope="module", params=["one process", "tp=2", "pp=2", pytest.param("dp=2", marks=pytest.mark.soak)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One step of SGD with rate 1 on 4 samples whose tokens have weights of their own."""
    directory = tmp_path_factory.mktemp("training")
    processes, layout = LAYOUTS[request.param]
    student, teacher = write_models(directory)
    batches = random_microbatches(4)
    write_samples(directory / "samples.pt", batches)
    settings: dict[str, Any] = {"teacher": str(nemo(teacher)), "objective": OBJECTIVE, "layout": layout}
    logged = run_job("train", directory / "job", student, directory / "samples.pt", processes=processes, **settings)
    expected = expected_step(student, teacher, batches, **OBJECTIVE)
    checkpoint = next((directory / "job" / "log").rglob("*-last"))
    return Trained(logged, expected, student, checkpoint)


def test_loss_and_its_parts_are_those_of_the_fp64_formula(trained: Trained) -> None:
    expected = trained.expected
    loss = (OBJECTIVE["logits_weight"] * expected.logits + OBJECTIVE["ce_weight"] * expected.ce) / expected.tokens
    wanted = {
        "reduced_train_loss": loss,
        "train/loss": loss,
        "train/logits": expected.logits / expected.tokens,
        "train/ce": expected.ce / expected.tokens,
    }
    assert {name: trained.logged[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_the_step_is_the_gradient_of_the_fp64_formula(trained: Trained, tmp_path: Path) -> None:
    assert_change_is_gradient(trained, tmp_path)


def assert_change_is_gradient(trained: Trained, tmp_path: Path) -> None:
    convert(trained.checkpoint, tmp_path / "hf", "hf", progress=False)
    before, after = (load_file(path / "model.safetensors") for path in (trained.student, tmp_path / "hf"))
    assert after.keys() == trained.expected.gradients.keys()
    for name, gradient in trained.expected.gradients.items():
        change = before[name].double() - after[name].double()
        # The change is the difference of fp32 weights of about 1.
        torch.testing.assert_close(
            change, gradient, rtol=1e-4, atol=2e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_checkpoint_is_the_plain_student(trained: Trained) -> None:
    context = trained.checkpoint / "context"
    files = [path for path in context.rglob("*") if path.is_file()]
    # NeMo itself pickles its precision plugin there; of this project there is nothing, in JSON or pickled.
    assert [path for path in files if b"minitron" in path.read_bytes()] == []
    loaded = io.load_context(context, subpath="model")
    assert type(loaded) is llm.LlamaModel
    assert (loaded.config.hidden_size, loaded.config.calculate_per_token_loss) == (48, False)
    assert loaded.optim.config.lr == 1e8  # what it was trained with


# Of a student of 2 layers and a teacher of 4: to the stage before, to the stage after, within the last.
PAIRS = [[2, -1], [0, 0], [3, 1]]


def expected_hidden(
    student: Path, teacher: Path, batches: list[dict[str, Any]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum over pairs and tokens of the cosine distance, and its gradient."""
    own, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (student, teacher))
    own_states, other_states = states_of(own), states_of(other)
    hidden = torch.zeros([], dtype=torch.float64)
    for batch in batches:
        own(batch["tokens"])
        other(batch["tokens"])
        for theirs, ours in PAIRS:
            apart = 1 - functional.cosine_similarity(own_states[ours], other_states[theirs].detach(), dim=-1)
            hidden = hidden + (batch["token_weights"].double() * apart).sum()
    hidden.backward()
    gradients = {name: weight.grad for name, weight in own.named_parameters() if weight.grad is not None}
    return hidden.item(), gradients


@pytest.mark.parametrize(
    "layout", ["one process", "pp=2", *(pytest.param(name, marks=pytest.mark.soak) for name in ("tp=2", "dp=2"))]
)
def test_dynamic_weights_and_intermediate_losses_are_those_of_the_fp64_formula(tmp_path: Path, layout: str) -> None:
    """The first step is weighed by the ratios of a forward pass over its own batch."""
    processes, settings = LAYOUTS[layout]
    student, teacher = write_models(tmp_path, depth=True)
    batches = random_microbatches(4)
    write_samples(tmp_path / "samples.pt", batches)
    logged = run_job(
        "train",
        tmp_path / "job",
        student,
        tmp_path / "samples.pt",
        processes=processes,
        teacher=str(nemo(teacher)),
        objective={"ce_weight": "dynamic"},
        intermediate={"pairs": PAIRS, "alpha": "dynamic"},
        layout=settings,
    )
    sums = expected_step(student, teacher, batches)
    hidden, hidden_gradients = expected_hidden(student, teacher, batches)
    ce_weight, alpha = sums.logits / sums.ce, sums.logits / hidden
    wanted = {
        "train/loss": 3 * sums.logits / sums.tokens,  # each part is weighed to be as large as the first
        "train/logits": sums.logits / sums.tokens,
        "train/ce": sums.ce / sums.tokens,
        "train/hidden": hidden / sums.tokens,
        "train/ce_weight": ce_weight,
        "train/alpha": alpha,
    }
    assert {name: logged[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    expected = expected_step(student, teacher, batches, ce_weight=ce_weight)
    gradients = {
        name: gradient + alpha * hidden_gradients.get(name, torch.zeros_like(gradient)) / sums.tokens
        for name, gradient in expected.gradients.items()
    }
    checkpoint = next((tmp_path / "job" / "log").rglob("*-last"))
    trained = Trained(logged, replace(expected, gradients=gradients), student, checkpoint)
    assert_change_is_gradient(trained, tmp_path)
