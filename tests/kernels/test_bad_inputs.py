"""What the losses over hidden states do with input that is wrong, not finite, masked out or empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_nemo.kernels import linear_kd_loss, token_statistics
from tests.kernels.inputs import DIVERGENCES, VOCAB_SIZE, inputs

NAMES = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "labels", "token_weights")


def _named(**changes: Any) -> dict[str, Any]:
    return {**dict(zip(NAMES, inputs(), strict=True)), "vocab_size": VOCAB_SIZE, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "js"}, "divergence 'js'"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, "jsd_beta 1.0"),
        ({"vocab_size": 1000}, "vocab_size is 1000"),
        ({"teacher_weight": torch.zeros(200, 48)}, "200 vocabulary rows"),
        ({"teacher_weight": None}, "give both or neither"),
        ({"student_hidden": torch.zeros(23, 32)}, "student_hidden: .*must be .24, 32"),
        ({"student_hidden": torch.zeros(24, 31)}, "student_hidden: .*must be .24, 32"),
        ({"student_hidden": torch.zeros(6, 4, 32)}, "student_hidden: .*must be .24, 32"),
        ({"teacher_hidden": torch.zeros(25, 48)}, "teacher_hidden: .*must be .24, 48"),
        ({"labels": torch.zeros(6, 4, dtype=torch.int64)}, "labels: torch.int64 .6, 4"),
        ({"labels": torch.zeros(24, dtype=torch.int32)}, "labels: torch.int32"),
        ({"labels": torch.zeros(23, dtype=torch.int64)}, "token_weights: .*must be float32 .23"),
        ({"token_weights": torch.ones(24, 1)}, "token_weights: .*must be float32 .24"),
        ({"token_weights": torch.ones(24, dtype=torch.bool)}, "token_weights: torch.bool"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        linear_kd_loss(**_named(**change))
    assert "\n" not in str(refused.value)


def test_statistics_refuse_labels_of_another_kind() -> None:
    student, weight, teacher, teacher_weight, labels, _ = inputs()
    with pytest.raises(ValueError, match=r"labels: torch.int64 \(6, 4\)"):
        token_statistics(student, weight, teacher, teacher_weight, labels.view(6, 4), vocab_size=VOCAB_SIZE)
    with pytest.raises(ValueError, match="student_hidden"):
        token_statistics(student[1:], weight, teacher, teacher_weight, labels, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", ["student_hidden", "teacher_hidden"])
def test_every_token_with_a_state_that_is_not_finite_is_counted(divergence: dict[str, Any], name: str) -> None:
    arguments = _named(ce_weight=0.5, **divergence)
    states = arguments[name].detach().clone()
    states[1, 3], states[2], states[7, 0] = float("nan"), float("inf"), -float("inf")
    arguments[name] = states
    assert arguments["token_weights"][2] == 0  # masked tokens included: their states spoil the gradients as well
    total, sums = linear_kd_loss(**arguments)
    assert sums.nonfinite.dtype == torch.int64 and sums.nonfinite.item() == 3
    assert not torch.isfinite(total)


def test_finite_tokens_are_not_counted_as_not_finite() -> None:
    assert linear_kd_loss(**_named(ce_weight=0.5))[1].nonfinite.item() == 0


@pytest.mark.parametrize("label", [-1, -100, VOCAB_SIZE, 10**6])
def test_a_counted_label_outside_the_vocabulary_is_infinite_and_counted(label: int) -> None:
    arguments = _named(ce_weight=1.0)
    arguments["labels"][[1, 2, 3]] = label  # 2 has no weight; a padding row exists for VOCAB_SIZE
    total, sums = linear_kd_loss(**arguments)
    assert total.item() == sums.ce.item() == float("inf")
    assert sums.nonfinite.item() == 2
    assert torch.isfinite(sums.logits)


def _loss_and_gradients(arguments: dict[str, Any]) -> tuple[Tensor, Any]:
    total, sums = linear_kd_loss(**arguments)
    total.backward()
    return total, sums


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_all_tokens_masked_is_no_loss_and_no_gradient(divergence: dict[str, Any]) -> None:
    arguments = _named(
        labels=torch.full((24,), -100), token_weights=torch.zeros(24), ce_weight=0.5, temperature=2.0, **divergence
    )
    total, sums = _loss_and_gradients(arguments)
    assert [total.item(), sums.logits.item(), sums.ce.item(), sums.weight.item()] == [0, 0, 0, 0]
    assert sums.tokens.item() == sums.nonfinite.item() == 0
    for name in ("student_hidden", "student_weight"):
        assert arguments[name].grad.abs().max() == 0  # NaN would not be


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_no_tokens_is_no_loss_and_no_gradient(divergence: dict[str, Any]) -> None:
    arguments = dict(zip(NAMES, inputs(tokens=0), strict=True))
    total, sums = _loss_and_gradients({**arguments, "vocab_size": VOCAB_SIZE, "ce_weight": 0.5, **divergence})
    assert [total.item(), sums.logits.item(), sums.ce.item(), sums.weight.item()] == [0, 0, 0, 0]
    assert sums.tokens.item() == sums.nonfinite.item() == 0
    hidden, weight = arguments["student_hidden"], arguments["student_weight"]
    assert hidden.grad is not None and hidden.grad.shape == (0, 32)
    assert weight.grad is not None and weight.grad.shape == weight.shape and weight.grad.abs().max() == 0
    assert [len(column) for column in token_statistics(*inputs(tokens=0)[:5], vocab_size=VOCAB_SIZE)] == [0, 0, 0]
