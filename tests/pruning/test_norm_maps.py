"""What is fitted behind a LayerNorm and what becomes of it in the student, on made-up states, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from minitron_nemo.arch import Axis
from minitron_nemo.importance.counted import Norm
from minitron_nemo.importance.places import Place
from minitron_nemo.importance.second_moments import fit
from minitron_nemo.pruning.norm_maps import SMALLEST, student_norm


def regression(x: np.ndarray, y: np.ndarray, kept: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """M and b that minimise |x - y M^T - b|^2 + lam |M - c S|^2: one system for numpy, lam's rows below, b unknown."""
    around = y - y.mean(axis=0)
    constant = ((x[:, kept] - x[:, kept].mean(axis=0)) * around).sum() / (around**2).sum()
    lam = ridge * (around**2).sum() / len(kept)
    plain = np.zeros((x.shape[1], len(kept)))
    plain[kept, np.arange(len(kept))] = constant
    rows = np.block([[y, np.ones((len(y), 1))], [np.sqrt(lam) * np.eye(len(kept)), np.zeros((len(kept), 1))]])
    solution = np.linalg.lstsq(rows, np.concatenate([x, np.sqrt(lam) * plain.T]), rcond=None)[0]
    return solution[:-1].T, solution[-1]


def random_norm(generator: torch.Generator, channels: int) -> Norm:
    gain, bias = torch.rand(2, channels, generator=generator)
    return Norm(gain + 0.1, bias - 0.5)


def totals_of(states: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised x [t, h] and y [t, k], and the sums of their products, a 1 behind each."""
    x = functional.layer_norm(states, states.shape[-1:])
    y = functional.layer_norm(states[:, kept], (len(kept),))
    ones = torch.ones(len(states), 1, dtype=states.dtype)
    return x, y, torch.cat([y, x, ones], dim=1).t() @ torch.cat([y, ones], dim=1)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1e12])
def test_sums_that_are_singular_along_the_ones_are_solved_at_any_ridge(ridge: float) -> None:
    """Entries of y sum to 0: M makes of (1, ..., 1) what the plain cut makes of it, and the constant is met exactly."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    states = torch.randn(500, 12, dtype=torch.float64, generator=generator) @ mixing + mixing[0]
    kept = torch.tensor([0, 1, 4, 5, 7, 10])
    x, y, totals = totals_of(states, kept)
    place = Place("reader", 0, "norm", kept.numpy(), Axis.HIDDEN)
    second = y.t() @ y - len(y) * torch.outer(y.mean(dim=0), y.mean(dim=0))
    assert torch.linalg.eigvalsh(second)[0].abs() < 1e-9 * second.diagonal().mean()
    fitted = fit(place, totals, ridge)
    slopes, constant = regression(x.numpy(), y.numpy(), kept.numpy(), ridge)
    np.testing.assert_allclose(fitted[:, -1], constant, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fitted[:, :-1], slopes, rtol=0, atol=1e-6)
    of_ones = fitted[:, :-1].sum(dim=1)
    removed = [channel for channel in range(12) if channel not in kept]
    np.testing.assert_allclose(of_ones[removed], 0, atol=1e-6)
    np.testing.assert_allclose(of_ones[kept], float(of_ones[0]), atol=1e-6)
    norm = random_norm(generator, 12)
    found = student_norm(fitted, norm, zero_centered_gamma=True)
    assert found.bias is not None
    actual = (y * (found.gain + 1) + found.bias) @ found.readers.t()
    np.testing.assert_allclose(actual, (y @ fitted[:, :-1].t() + fitted[:, -1]) * norm.gain + norm.bias, atol=1e-9)


@pytest.mark.parametrize(("gain", "bias"), [(0.5, 0.0), (0.0, 1.0), (0.001, 0.0)])
def test_a_norm_that_no_token_came_to_keeps_the_plain_cut_and_is_finite(gain: float, bias: float) -> None:
    """Whatever there is to reach: no constant, nothing but a constant, gains that are next to nothing."""
    place = Place("reader", 0, "norm", np.array([0, 2, 3]), Axis.HIDDEN)
    fitted = fit(place, torch.zeros(9, 4, dtype=torch.float64), 0.01)
    np.testing.assert_array_equal(fitted, np.eye(5)[:, [0, 2, 3, 1]] * [1, 1, 1, 0])
    norm = Norm(torch.full((5,), gain), torch.full((5,), bias))
    found = student_norm(fitted, norm, zero_centered_gamma=True)
    assert found.bias is not None and all(bool(part.isfinite().all()) for part in found)
    np.testing.assert_allclose((found.bias @ found.readers.t())[0], norm.bias, atol=1e-12)
    assert float(found.gain.min()) >= SMALLEST - 1  # at -1, which is stored for 0, no reader could make up for it
