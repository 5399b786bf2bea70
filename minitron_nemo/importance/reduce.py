"""From activations to small float64 sums: the arithmetic of calibration. No hooks, no process groups.

Tokens are reduced in spans that fit one scratch buffer, so that a pass holds little more than the bare forward does and
spans stay in the processor's cache. Products with a weight vector do the reductions: a weight of 0 leaves a token out,
and an RMSNorm is one more factor per token and one per channel, so that its output need not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from minitron_nemo.importance.scores import AGGREGATIONS

SCRATCH_ELEMENTS = 2**18


class Reducer:
    """The reductions that need scratch memory. It is allocated once: fresh memory costs more than the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = torch.empty(SCRATCH_ELEMENTS, dtype=torch.float32, device=device)

    def absolute_sums(
        self, rows: Tensor, weights: Tensor, function: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Sums over tokens of w|x| and of (w x)^2, fp64 [2, b, n]; x is `function` of the rows, where given.

        `rows` [s, b, n] in fp32 or less, `weights` fp32 [b, s]. `function` sees fp32 [t, b, n] of t tokens, and may
        write over it. Within a span sums are fp32, over spans fp64. The variance that follows from both has the
        relative error of fp32 times (mean of squares / variance).
        """
        return self._sums(rows, weights[:, None], function).squeeze(2)

    def sums_by_group(self, rows: Tensor, weights: Tensor) -> Tensor:
        """`absolute_sums` of rows [t, n] for each group of tokens, fp64 [2, g, n]; `weights` fp32 [g, t]."""
        return self._sums(rows[:, None], weights[None], None).squeeze(1)

    def _sums(self, rows: Tensor, weights: Tensor, function: Callable[[Tensor], Tensor] | None) -> Tensor:
        """`rows` [s, b, n], `weights` fp32 [b, g, s] -> fp64 [2, b, g, n]."""
        factors = torch.stack([weights, weights.square()])
        total: Tensor | None = None
        for span in _spans(rows):
            block = self._absolute(rows[span], function).transpose(0, 1)  # [b, t, n]
            first = torch.bmm(factors[0, ..., span], block)  # [b, g, n]
            second = torch.bmm(factors[1, ..., span], block.square_())
            both = torch.stack([first, second]).double()
            total = both if total is None else total.add_(both)
        assert total is not None  # there is one span at least
        return total

    def cosines(self, first: Tensor, second: Tensor, first_norms: Tensor) -> Tensor:
        """Cosine per token of two [s, b, n] in fp32; `first_norms` are `token_norms(first)`. 0 where a vector is 0."""
        dots = torch.empty_like(first_norms)
        for span in _spans(first):
            one, other = first[span], second[span]
            if one.dtype == torch.float32:
                products = torch.mul(one, other, out=self._room(one))
            else:
                products = self._room(one).copy_(one).mul_(other)
            torch.sum(products, dim=-1, out=dots[span])
        scale = (first_norms * token_norms(second)).clamp_(min=torch.finfo(torch.float32).tiny)
        return dots.div_(scale).clamp_(-1, 1)

    def _absolute(self, part: Tensor, function: Callable[[Tensor], Tensor] | None) -> Tensor:
        """|x| in fp32, in the scratch memory where `function` leaves it; x as of `absolute_sums`."""
        if function is None and part.dtype == torch.float32:
            return torch.abs(part, out=self._room(part))  # one pass less
        block = self._room(part).copy_(part)
        return (block if function is None else function(block)).abs_()

    def _room(self, part: Tensor) -> Tensor:
        """Scratch memory in fp32 of the shape of `part`."""
        if part.numel() > self.scratch.numel():  # a single token of many long sequences
            self.scratch = self.scratch.new_empty(part.numel())
        return self.scratch[: part.numel()].view(part.shape)


def token_norms(rows: Tensor) -> Tensor:
    """L2 norm of the last dim in fp32: [s, ..., n] -> [s, ...]."""
    parts = [torch.linalg.vector_norm(rows[span], dim=-1, dtype=torch.float32) for span in _spans(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def head_sums(rows: Tensor, weights: Tensor, kv_channels: int) -> Tensor:
    """`absolute_sums` of every head's L2 norm (2407.14679 section 2.2): [s, b, heads x kv] -> fp64 [2, b, heads].

    Norms of one head are much alike, so that fp32 sums would leave little of their variance; and they are few.
    """
    norms = token_norms(rows.unflatten(2, (-1, kv_channels))) * weights.t()[..., None]  # [s, b, heads]
    return torch.stack([norms.sum(dim=0, dtype=torch.float64), norms.double().square_().sum(dim=0)])


def sequence_moments(sums: Tensor, tokens: Tensor) -> Tensor:
    """Moments over sequences of every sequence aggregation, fp64 [2, 3, m, n] in the order of `Scores`.

    `sums` [m, 2, b, n] are those of whole sequences in m places, `tokens` fp64 [b] counts their tokens, [m, b] those
    that each place sees; a sequence without tokens adds nothing.
    """
    total, squares = sums.unbind(dim=1)  # [m, b, n]
    count = tokens.clamp(min=1)[..., None]
    mean = total / count
    values = {"mean": mean, "l2": squares.sqrt(), "var": (squares / count - mean**2).clamp_(min=0)}
    stacked = torch.stack([values[name] for name in AGGREGATIONS])  # [3, m, b, n]
    return torch.stack([stacked.sum(dim=2), stacked.square_().sum(dim=2)])


def _spans(rows: Tensor) -> Iterator[slice]:
    """Consecutive tokens that have at most SCRATCH_ELEMENTS values, one at least; an empty span where there is none."""
    length = max(1, SCRATCH_ELEMENTS // prod(rows.shape[1:]))
    for start in range(0, max(1, len(rows)), length):
        yield slice(start, start + length)
