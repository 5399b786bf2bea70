import math
from typing import Any

import pytest

from minitron_nemo.distillation.schedule import Schedule
from minitron_nemo.errors import UserError

SETTINGS: dict[str, Any] = {"peak": 1e-4, "floor": 1e-5, "warmup_steps": 40, "steps": 1000}


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine_to_the_floor() -> None:
    assert Schedule(**SETTINGS).learning_rate(1) == pytest.approx(1e-4 / 40)
    assert Schedule(**SETTINGS).learning_rate(20) == pytest.approx(0.5e-4)
    assert Schedule(**SETTINGS).learning_rate(40) == pytest.approx(1e-4)
    assert Schedule(**SETTINGS).learning_rate(520) == pytest.approx((1e-4 + 1e-5) / 2)
    quarter = 40 + 960 // 4
    assert Schedule(**SETTINGS).learning_rate(quarter) == pytest.approx(1e-5 + 9e-5 * (1 + math.sqrt(0.5)) / 2)
    assert Schedule(**SETTINGS).learning_rate(1000) == pytest.approx(1e-5)


def test_linear_decay_passes_the_middle_half_way() -> None:
    linear = Schedule(**SETTINGS, decay_style="linear")
    assert linear.learning_rate(40) == pytest.approx(1e-4)
    assert linear.learning_rate(520) == pytest.approx((1e-4 + 1e-5) / 2)
    assert linear.learning_rate(1000) == pytest.approx(1e-5)


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    wsd = Schedule(**SETTINGS, decay_style="WSD", wsd_decay_steps=200)
    assert {wsd.learning_rate(step) for step in range(40, 801)} == {1e-4}
    assert wsd.learning_rate(900) == pytest.approx((1e-4 + 1e-5) / 2)
    assert wsd.learning_rate(1000) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "style", [{}, {"decay_style": "linear"}, {"decay_style": "WSD", "wsd_decay_steps": 100}], ids=str
)
def test_no_update_is_made_with_a_rate_of_zero_or_above_the_peak(style: dict[str, Any]) -> None:
    for warmup in (0, 1, 40):
        rates = [Schedule(**{**SETTINGS, "warmup_steps": warmup, **style}).learning_rate(n) for n in range(1, 1001)]
        assert min(rates) > 0
        assert max(rates) <= 1e-4
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_a_run_shorter_than_its_warm_up_ends_within_it() -> None:
    short = {**SETTINGS, "steps": 3, "warmup_steps": 5}
    Schedule(**short).check("train")
    assert [Schedule(**short).learning_rate(step) for step in (1, 2, 3)] == [
        pytest.approx(1e-4 * step / 5) for step in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"steps": 0}, "train.steps"),
        ({"warmup_steps": -1}, "train.warmup_steps"),
        ({"floor": 2e-4}, "train.min_lr"),
        ({"floor": -1e-5}, "train.min_lr"),
        ({"decay_style": "sine"}, "train.lr_decay_style"),
        ({"decay_style": "WSD"}, "train.lr_wsd_decay_steps"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_by_its_key(wrong: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        Schedule(**{**SETTINGS, **wrong}).check("train")
