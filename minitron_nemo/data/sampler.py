"""Which sample is visited when, and samples as microbatches.

The order is a function of the position alone (samples consumed so far), whatever the data-parallel size and the batch
sizes: resuming needs no more than that number.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minitron_nemo.data.dataset import Blend, Sample, SampleIndex
from minitron_nemo.data.shuffle import permutation
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.device import current_device

# {"tokens", "labels", "position_ids": int64 [b, s], "token_weights": float32 [b, s], "sample_ids": list[str]}
Microbatch = dict[str, Any]

PERIOD = 2**20  # weights are kept as whole shares of this many samples


class Interleave:
    """The source of every position, such that each source is always within one sample of its share.

    Tijdeman's rule (The chairman assignment problem, Discrete Mathematics 32, 1980): of the sources that are at least
    1 / (2n - 2) of a sample behind, take the one that would first be a whole sample behind. Shares are multiples
    of 1 / PERIOD, so the choices repeat with that period, and any position is reached without walking to it.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = _whole_shares(weights)
        self._choices = array("H")  # of the first period, as far as needed yet
        self._counts = [0] * len(self.shares)

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` samples come from each source."""
        periods, rest = divmod(position, PERIOD)
        self._extend(rest)
        within = np.bincount(np.frombuffer(self._choices, np.uint16, rest), minlength=len(self.shares)) if rest else 0
        return (periods * np.array(self.shares) + within).tolist()

    def source(self, position: int) -> int:
        self._extend(position % PERIOD + 1)
        return self._choices[position % PERIOD]

    def _extend(self, length: int) -> None:
        shares, counts = self.shares, self._counts
        sources = range(len(shares))
        slack = max(2 * len(shares) - 2, 1)
        # In units of 1 / (slack * PERIOD) of a sample: exact in integers.
        for position in range(len(self._choices) + 1, length + 1):
            behind = [slack * (position * shares[i] - PERIOD * counts[i]) for i in sources]
            late = [i for i in sources if behind[i] >= PERIOD]
            choice = min(late, key=lambda i: ((slack * PERIOD - PERIOD - behind[i]) / shares[i], i))
            counts[choice] += 1
            self._choices.append(choice)


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """`weights` (summing to 1) in units of 1 / PERIOD, summing to PERIOD, each at least 1: largest remainders."""
    shares = [max(int(weight * PERIOD), 1) for weight in weights]
    by_remainder = sorted(range(len(shares)), key=lambda i: (shares[i] - weights[i] * PERIOD, i))
    for turn in range(PERIOD - sum(shares)):
        shares[by_remainder[turn % len(shares)]] += 1
    shares[shares.index(max(shares))] += PERIOD - sum(shares)  # where the minimum of 1 made the sum too large
    return shares


class Sampler:
    """Walks through a blend; every epoch of a source visits all its samples, in an order of its own."""

    def __init__(self, blend: Blend, seed: int) -> None:
        self.blend = blend
        self.seed = seed
        self.consumed_samples = 0
        self._interleave = Interleave(blend.weights)
        # One epoch's order for each source, and the next one's where a batch crosses the border.
        self._order = lru_cache(maxsize=2 * len(blend.sources))(self._make_order)

    def next_batch(self, size: int) -> list[SampleIndex]:
        """The next `size` samples; moves the position on."""
        batch = self.global_batch(self.consumed_samples, size)
        self.consumed_samples += size
        return batch

    def global_batch(self, position: int, size: int) -> list[SampleIndex]:
        """The samples of positions [position, position + size), wherever the sampler stands."""
        counts = self._interleave.counts(position)
        batch = []
        for place in range(position, position + size):
            source = self._interleave.source(place)
            epoch, within = divmod(counts[source], len(self.blend.sources[source]))
            batch.append((source, int(self._order(source, epoch)[within])))
            counts[source] += 1
        return batch

    def epoch(self) -> float:
        """Passes over the source that was passed over most."""
        counts = self._interleave.counts(self.consumed_samples)
        return max(count / len(source) for count, source in zip(counts, self.blend.sources, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed_samples, "seed": self.seed, "blend": self.blend.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError if it belongs to other data or another order."""
        if (state["seed"], state["blend"]) != (self.seed, self.blend.fingerprint):
            what = "seed" if state["seed"] != self.seed else "sources, weights, pack_seed or sequence_length"
            raise UserError(f"data: {what} changed since the training state was saved; change it back or start anew")
        self.consumed_samples = int(state["consumed_samples"])

    def _make_order(self, source: int, epoch: int) -> NDArray[np.int64]:
        return permutation(len(self.blend.sources[source]), "order", self.seed, source, epoch)


def microbatches(
    blend: Blend, indices: Sequence[SampleIndex], dp_rank: int, dp_size: int, micro_batch_size: int
) -> list[Microbatch]:
    """This data-parallel rank's part of a global batch, on the current device.

    Microbatch m of rank r holds `micro_batch_size` samples from m * dp_size * micro_batch_size + r * micro_batch_size
    on. Raises UserError if the global batch does not divide.
    """
    together = dp_size * micro_batch_size
    if len(indices) % together:
        raise UserError(
            f"train.global_batch_size: {len(indices)} is not a multiple of micro_batch_size {micro_batch_size} x "
            f"data-parallel size {dp_size}"
        )
    starts = range(dp_rank * micro_batch_size, len(indices), together)
    return [stack([blend.sample(index) for index in indices[start : start + micro_batch_size]]) for start in starts]


def stack(samples: Sequence[Sample]) -> Microbatch:
    """Samples of one length as a microbatch on the current device."""
    device = current_device()
    columns = {
        key: torch.stack([sample[key] for sample in samples]).to(device)  # [b, s]
        for key in ("tokens", "labels", "token_weights")
    }
    positions = torch.arange(columns["tokens"].shape[1], device=device).expand_as(columns["tokens"])
    return {**columns, "position_ids": positions, "sample_ids": [sample["id"] for sample in samples]}
