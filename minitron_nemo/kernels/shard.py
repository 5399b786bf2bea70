"""One rank's part of the vocabulary, and the collectives over the tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Renamed in torch 2.13; the containers of NVIDIA carry older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Shard:
    """Rows [first_row, first_row + rows) of the vocabulary, its padding left out; the whole of it without a group."""

    group: dist.ProcessGroup | None
    size: int
    rank: int
    first_row: int
    rows: int

    @staticmethod
    def of(padded_rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> Shard:
        """`padded_rows`: of this rank, the same on every rank. Raises ValueError if they do not hold the vocabulary."""
        size = 1 if group is None else group.size()
        rank = 0 if group is None else group.rank()
        if padded_rows * size < vocab_size:
            raise ValueError(f"{padded_rows * size} vocabulary rows over {size} rank(s), vocab_size is {vocab_size}")
        first_row = rank * padded_rows
        return Shard(group, size, rank, first_row, min(padded_rows, max(0, vocab_size - first_row)))

    def gather(self, tensor: Tensor) -> Tensor:
        """[n, k] of each rank -> [tp * n, k] on every rank, in rank order."""
        if self.size == 1:
            return tensor
        gathered = tensor.new_empty(self.size * tensor.shape[0], tensor.shape[1])
        _all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def gather_statistics(self, statistics: Tensor) -> Tensor:
        """[n, k] of each rank -> [tp, n, k] on every rank: summed locally, so that all ranks get the same bits."""
        return self.gather(statistics).view(self.size, *statistics.shape)

    def sum_hidden_grad(self, grad: Tensor, sequence_parallel: bool) -> Tensor:
        """Sum of all ranks' [tokens, h]: whole on every rank, or [tokens/tp, h] of each with sequence parallelism."""
        if self.size == 1:
            return grad
        if not sequence_parallel:
            dist.all_reduce(grad, group=self.group)
            return grad
        part = grad.new_empty(grad.shape[0] // self.size, grad.shape[1])
        _reduce_scatter(part, grad, group=self.group)
        return part

    def owned(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which vocabulary ids this shard holds (bool), and their row here, 0 where it does not."""
        local = ids - self.first_row
        held = (local >= 0) & (local < self.rows)
        return held, torch.where(held, local, 0)
