"""The arithmetic of calibration against plain fp64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minitron_nemo.importance import reduce
from minitron_nemo.importance.reduce import Reducer, head_sums, sequence_moments, token_norms

CPU = torch.device("cpu")


@pytest.fixture(params=[None, 40, 4], ids=["one span", "many spans", "less than a token"])
def spans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens at once; 2 at a time (of 17: the last one is alone); one at a time."""
    if request.param:
        monkeypatch.setattr(reduce, "SCRATCH_ELEMENTS", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("spans")
def test_sums_over_tokens_equal_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(17, 2, 8).to(dtype)
    before = rows.clone()
    weights = torch.rand(2, 17)
    x, w = rows.double(), weights.double().t()[..., None]
    sums = Reducer(CPU).absolute_sums(rows, weights)
    torch.testing.assert_close(sums[0], (w * x.abs()).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[1], (w * x).square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(token_norms(rows).double(), x.norm(dim=-1), rtol=1e-6, atol=0)
    norms = x.view(17, 2, 2, 4).norm(dim=-1)
    of_heads = head_sums(rows, weights, kv_channels=4)
    torch.testing.assert_close(of_heads[0], (w * norms).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(of_heads[1], (w * norms).square().sum(0), rtol=1e-6, atol=0)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("spans")
def test_sums_by_group_equal_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(17, 8).to(dtype)
    weights = torch.rand(3, 17) * (torch.rand(3, 17) > 0.5)
    weights[2] = 0
    sums = Reducer(CPU).sums_by_group(rows, weights)
    torch.testing.assert_close(sums[0], weights.double() @ rows.double().abs(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[1], weights.double().square() @ rows.double().square(), rtol=1e-6, atol=0)
    assert torch.equal(Reducer(CPU).sums_by_group(rows[:0], weights[:, :0]), torch.zeros(2, 3, 8).double())


@pytest.mark.usefixtures("spans")
def test_cosines_equal_the_formula_and_are_zero_for_a_zero_vector() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(17, 2, 8), torch.randn(17, 2, 8) * 1e-12
    first[3, 1] = 0
    expected = torch.nn.functional.cosine_similarity(first.double(), second.double() * 1e12, dim=-1)
    cosines = Reducer(CPU).cosines(first, second, token_norms(first))
    torch.testing.assert_close(cosines.double(), expected, rtol=1e-5, atol=1e-7)
    assert cosines[3, 1] == 0


def test_moments_over_sequences_are_those_of_numpy_and_leave_out_empty_sequences() -> None:
    generator = np.random.default_rng(0)
    lengths = [9, 4, 0, 1]
    places = [[np.abs(generator.standard_normal((length, 5))) for length in lengths] for _ in range(3)]
    sums = [[[x.sum(0) for x in sequences], [(x**2).sum(0) for x in sequences]] for sequences in places]
    moments = sequence_moments(torch.tensor(np.array(sums)), torch.tensor(lengths, dtype=torch.float64)).numpy()
    assert moments.shape == (2, 3, 3, 5)
    for place, sequences in enumerate(places):
        filled = [x for x in sequences if len(x)]
        for aggregation, values in enumerate(
            ([x.mean(0) for x in filled], [np.sqrt((x**2).sum(0)) for x in filled], [x.var(0) for x in filled])
        ):
            total, squares = np.sum(values, axis=0), np.square(values).sum(axis=0)
            np.testing.assert_allclose(moments[0, aggregation, place], total, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(moments[1, aggregation, place], squares, rtol=1e-12, atol=1e-14)
