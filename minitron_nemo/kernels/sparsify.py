"""A teacher's distributions cut down to a few entries per token, from hidden states and vocabulary shards.

    hidden states, output weight -> [a chunk of tokens: fp32 logits -> the shard's k largest -> all-gather of the
    candidates -> the k largest of all; what is left of the chunk is the tail -> all-gather of its sums -> draws from
    it, each by the shard that holds it -> all-gather of the draws]

With y = logits / T and M its maximum, everything is a sum of exp(y - M), in fp64 over fp32 terms: the tail's mass is
the sum of its entries, never 1 minus the others, so a mass of 1e-12 keeps its digits.

Draws are stratified: draw j of m takes the entry at which the tail's cumulative mass, in the order of token ids,
passes (j + u_j) / m, u_j uniform on [0, 1). Each entry i is then drawn m p_i / tail times in the mean, as by m
independent draws (2503.16870), and no statistic of the draws has a larger variance than theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels.linear_kd import project
from minitron_nemo.kernels.shard import Shard
from minitron_nemo.kernels.sparse import SparseTeacher

_BLOCK = 64  # entries whose cumulative sums are written out, per draw; of the others only the blocks' sums


@dataclass(frozen=True)
class SparseEntries:
    """The likeliest entries of every token, draws from the rest, and the rest's mass; at the temperature they had.

    token_ids: int64 [tokens, k + m], the k likeliest first; log_probs: fp32 [tokens, k + m], -inf for an unused entry;
    tail_log_probs: fp32 [tokens], log of the mass outside the first k.
    """

    token_ids: Tensor
    log_probs: Tensor
    tail_log_probs: Tensor
    top_k: int

    def teacher(self) -> SparseTeacher:
        """The sampled form where there are draws, else the bucket form.

        The draws' importance weights are tail / m each, the others' their probabilities.
        """
        draws = self.token_ids.shape[1] - self.top_k
        if draws == 0:
            return SparseTeacher(self.token_ids, self.log_probs, self.tail_log_probs)
        weights = self.log_probs.exp()
        weights[:, self.top_k :] = (self.tail_log_probs.exp() / draws).unsqueeze(1)
        return SparseTeacher(self.token_ids, self.log_probs, weights=weights)


def sparse_entries(
    hidden: Tensor,
    weight: Tensor,
    *,
    top_k: int,
    uniforms: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
) -> SparseEntries:
    """The `top_k` likeliest entries per token and a sample of the rest; the same on all ranks of `tp_group`.

    hidden: [tokens, h] after the final norm; with `sequence_parallel` [tokens/tp, h], as `linear_kd_loss` takes them.
    weight: this rank's rows of the output weight, [padded_vocab/tp, h]; rows from `vocab_size` on take no part.
    uniforms: fp64 [tokens, m] in [0, 1), whole on every rank: one per draw, none for the bucket form. A token's draws
        are a function of its own uniforms and logits.
    top_k: at least 1; at most `vocab_size`, which leaves no tail.
    chunk_bytes: of fp32 logits held at once; None as for `linear_kd_loss`.

    Raises ValueError for shapes that do not fit and a `top_k` or temperature out of range.
    """
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k {top_k} is not between 1 and vocab_size {vocab_size}")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive")
    tokens, draws = uniforms.shape
    with torch.no_grad():
        projections = project(hidden, weight, None, None, tokens, vocab_size, tp_group, sequence_parallel, chunk_bytes)
        token_ids = torch.empty(tokens, top_k + draws, dtype=torch.int64, device=hidden.device)
        log_probs = torch.empty(tokens, top_k + draws, dtype=torch.float32, device=hidden.device)
        tail_log_probs = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        for chunk, logits, _ in projections.chunks():
            scaled = logits.div_(temperature)
            ids, top = _largest(scaled, top_k, projections.shard)
            highest = top[:, :1]
            masses = _tail_masses(scaled, ids, highest, projections.shard)
            cumulative = _block_sums(masses).cumsum(1)
            tails = projections.shard.gather_statistics(cumulative[:, -1:]).squeeze(2)  # [tp, n]
            tail = tails.sum(0)
            log_sum = ((top - highest).exp().sum(1) + tail).log().unsqueeze(1)
            token_ids[chunk, :top_k] = ids
            log_probs[chunk, :top_k] = top - highest - log_sum
            tail_log_probs[chunk] = tail.log() - log_sum.squeeze(1)
            if draws:
                drawn, mass = _draw(masses, cumulative, tails, uniforms[chunk], projections.shard)
                token_ids[chunk, top_k:] = drawn
                log_probs[chunk, top_k:] = mass.log() - log_sum
    return SparseEntries(token_ids, log_probs, tail_log_probs, top_k)


def _largest(logits: Tensor, k: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """Ids and values (fp64) of the k largest of the whole vocabulary, [n, k] each, the largest first."""
    count = min(k, shard.rows)
    values, rows = logits.topk(count, dim=1)
    candidates = logits.new_full((len(logits), 2 * k), -float("inf"), dtype=torch.float64)
    candidates[:, :count] = values
    candidates[:, k : k + count] = rows + shard.first_row  # exact: ids are far below 2^53
    values, ids = shard.gather_statistics(candidates).tensor_split(2, dim=2)
    values, ids = (tensor.transpose(0, 1).flatten(1) for tensor in (values, ids))  # [n, tp * k]
    top, places = values.topk(k, dim=1)
    return ids.gather(1, places).long(), top


def _tail_masses(scaled: Tensor, ids: Tensor, highest: Tensor, shard: Shard) -> Tensor:
    """exp(y - M) of this shard's entries, 0 at those in `ids`; fp32 [n, rows], in the logits' memory."""
    masses = scaled.sub_(highest.to(scaled.dtype)).exp_()
    if shard.rows:
        held, local = shard.owned(ids)
        # Taking the minimum with infinity leaves an entry alone, wherever the ids of other shards point.
        masses.scatter_reduce_(1, local, torch.where(held, 0.0, float("inf")).to(masses.dtype), "amin")
    return masses


def _block_sums(masses: Tensor) -> Tensor:
    """fp64 [n, blocks]: the sums of every `_BLOCK` entries and, last, of what is left, which may be nothing."""
    whole = masses.shape[1] // _BLOCK * _BLOCK
    blocks = masses[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)).sum(2, dtype=torch.float64)
    return torch.cat([blocks, masses[:, whole:].sum(1, keepdim=True, dtype=torch.float64)], 1)


def _draw(masses: Tensor, cumulative: Tensor, tails: Tensor, uniforms: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Ids and masses (fp64) of the draws, [n, m] each; where there is no tail the mass is 0.

    `tails` are the shards' tail masses, [tp, n], the same bits on every rank: so each draw is one shard's.
    """
    n, m = uniforms.shape
    ends = tails.cumsum(0)
    positions = (torch.arange(m, device=uniforms.device) + uniforms) / m
    targets = _below(positions * ends[-1].unsqueeze(1), ends[-1].unsqueeze(1))
    owners = torch.searchsorted(ends.t().contiguous(), targets, right=True)
    starts = ends[shard.rank] - tails[shard.rank]
    drawn = targets.new_zeros(n, 2 * m)
    if shard.rows:
        rows, mass = _find(masses, cumulative, targets - starts.unsqueeze(1))
        mine = (owners == shard.rank).double()
        drawn = torch.cat([(rows + shard.first_row) * mine, mass * mine], 1)
    ids, mass = shard.gather_statistics(drawn).sum(0).tensor_split(2, dim=1)
    return ids.long(), mass


def _find(masses: Tensor, cumulative: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The row of this shard at which its cumulative mass passes each target, and the mass there; [n, m] each."""
    targets = _below(targets.clamp_min(0.0), cumulative[:, -1:])
    block = torch.searchsorted(cumulative, targets, right=True).clamp_max(cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    columns = block.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK, device=masses.device)  # [n, m, block]
    inside = columns < masses.shape[1]
    columns = columns.clamp_max(masses.shape[1] - 1)
    entries = masses.gather(1, columns.flatten(1)).view(columns.shape).double() * inside
    running = entries.cumsum(2)
    # Rounding may put the rest at the block's end. The first entry that passes it has some mass, so none of 0 is drawn.
    rest = _below((targets - before).clamp_min(0.0), running[:, :, -1])
    place = torch.searchsorted(running, rest.unsqueeze(2), right=True).clamp_max(_BLOCK - 1)
    return columns.gather(2, place).squeeze(2), entries.gather(2, place).squeeze(2)


def _below(values: Tensor, bounds: Tensor) -> Tensor:
    """The largest numbers that are at most `values` and less than `bounds`; where a bound is 0, something below it."""
    return torch.minimum(values, torch.nextafter(bounds, torch.full_like(bounds, -1.0)))
