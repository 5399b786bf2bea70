"""The arithmetic of calibration against plain fp64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minitron_nemo.importance import reduce
from minitron_nemo.importance.reduce import absolute_sums, cosines, head_norms, sequence_moments, token_norms


@pytest.fixture(params=[None, 40], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 2 tokens (of 17: the last one is short), or one for everything."""
    if request.param:
        monkeypatch.setattr(reduce, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("blocks")
def test_sums_over_tokens_equal_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(17, 2, 8).to(dtype)
    before = rows.clone()
    weights = torch.rand(2, 17)
    x, w = rows.double(), weights.double().t()[..., None]
    sums = absolute_sums(rows, weights)
    torch.testing.assert_close(sums[0], (w * x.abs()).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[1], (w * x).square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(token_norms(rows).double(), x.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(head_norms(rows, 4), x.view(17, 2, 2, 4).norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(rows, before)


@pytest.mark.usefixtures("blocks")
def test_cosines_equal_the_formula_and_are_zero_for_a_zero_vector() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(17, 2, 8), torch.randn(17, 2, 8) * 1e-12
    first[3, 1] = 0
    expected = torch.nn.functional.cosine_similarity(first.double(), second.double() * 1e12, dim=-1)
    torch.testing.assert_close(cosines(first, second, token_norms(first)).double(), expected, rtol=1e-5, atol=1e-7)
    assert cosines(first, second, token_norms(first))[3, 1] == 0


def test_moments_over_sequences_are_those_of_numpy_and_leave_out_empty_sequences() -> None:
    generator = np.random.default_rng(0)
    lengths = [9, 4, 0, 1]
    sequences = [np.abs(generator.standard_normal((length, 5))) for length in lengths]
    sums = torch.tensor(np.array([[s.sum(0) for s in sequences], [(s**2).sum(0) for s in sequences]]))
    moments = sequence_moments(sums, torch.tensor(lengths, dtype=torch.float64)).numpy()
    filled = [s for s in sequences if len(s)]
    for place, values in enumerate(
        ([s.mean(0) for s in filled], [np.sqrt((s**2).sum(0)) for s in filled], [s.var(0) for s in filled])
    ):
        np.testing.assert_allclose(moments[0, place], np.sum(values, axis=0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(moments[1, place], np.square(values).sum(axis=0), rtol=1e-12, atol=1e-14)
