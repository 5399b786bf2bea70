"""From activations to small float64 sums: the arithmetic of calibration. No hooks, no process groups.

Tokens are reduced block by block through one scratch buffer, so that a pass holds little more than the bare
forward does, and blocks stay in the processor's cache. Products with a weight vector do the reductions: a weight of 0
leaves a token out, and an RMSNorm is one more factor per token and one per channel, so that its output need not exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minitron_nemo.importance.scores import AGGREGATIONS

BLOCK_ELEMENTS = 2**18  # fp32 values of scratch


def absolute_sums(rows: Tensor, weights: Tensor) -> Tensor:
    """Sums over tokens of w|x| and of (w x)^2, fp64 [2, b, n].

    `rows` [s, b, n] in any floating dtype, `weights` [b, s]. Within a block sums are fp32 (fp64 for fp64 rows), over
    blocks fp64. The variance that follows from both has that precision's error times (mean of squares / variance).
    """
    sums = torch.zeros(2, *rows.shape[1:], dtype=torch.float64, device=rows.device)
    for block, start in _blocks(rows):
        factors = weights[:, None, start : start + len(block)].to(block.dtype)  # [b, 1, t]
        sums[0] += torch.bmm(factors, block.abs_().transpose(0, 1))[:, 0]
        sums[1] += torch.bmm(factors.square(), block.square_().transpose(0, 1))[:, 0]
    return sums


def token_norms(rows: Tensor) -> Tensor:
    """L2 norm of the last dim in fp32: [s, b, n] -> [s, b]."""
    norms = torch.empty(rows.shape[:2], dtype=torch.float32, device=rows.device)
    for block, start in _blocks(rows):
        torch.linalg.vector_norm(block, dim=-1, out=norms[start : start + len(block)])
    return norms


def head_norms(rows: Tensor, kv_channels: int) -> Tensor:
    """L2 norm of every head per token (2407.14679 section 2.2): [s, b, heads x kv] -> [s, b, heads].

    Computed in fp32 and given in fp64: norms of one head are all alike, so that little is left of their variance when
    it is taken as a difference of fp32 sums, and they are few.
    """
    heads = rows.shape[2] // kv_channels
    norms = torch.empty(*rows.shape[:2], heads, dtype=torch.float64, device=rows.device)
    for block, start in _blocks(rows):
        norms[start : start + len(block)] = torch.linalg.vector_norm(block.unflatten(2, (heads, kv_channels)), dim=-1)
    return norms


def cosines(first: Tensor, second: Tensor, first_norms: Tensor) -> Tensor:
    """Cosine per token in fp32 of two [s, b, n]; `first_norms` are `token_norms(first)`. 0 where a vector is 0."""
    dots = torch.empty_like(first_norms)
    for block, start in _blocks(first):
        torch.sum(block.mul_(second[start : start + len(block)]), dim=-1, out=dots[start : start + len(block)])
    # In fp64 the product of norms neither overflows nor vanishes.
    scale = first_norms.double() * token_norms(second).double()
    return (dots / scale.clamp(min=torch.finfo(torch.float64).tiny)).clamp(-1, 1).float()


def sequence_moments(sums: Tensor, tokens: Tensor) -> Tensor:
    """Moments over sequences of every sequence aggregation, fp64 [2, 3, n] in the order of `Scores`.

    `sums` [2, b, n] are `absolute_sums` of whole sequences, `tokens` fp64 [b] counts their tokens; a sequence without
    tokens adds nothing.
    """
    count = tokens.clamp(min=1)[:, None]
    mean = sums[0] / count
    values = {"mean": mean, "l2": sums[1].sqrt(), "var": (sums[1] / count - mean**2).clamp(min=0)}
    stacked = torch.stack([values[name] for name in AGGREGATIONS])  # [3, b, n]
    return torch.stack([stacked.sum(dim=1), stacked.square().sum(dim=1)])


def _blocks(rows: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Copies of consecutive tokens in one reused buffer of at least fp32, and where they start."""
    length = max(1, BLOCK_ELEMENTS // rows[0].numel())
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scratch = torch.empty(min(length, len(rows)), *rows.shape[1:], dtype=dtype, device=rows.device)
    for start in range(0, len(rows), length):
        part = rows[start : start + length]
        yield scratch[: len(part)].copy_(part), start
