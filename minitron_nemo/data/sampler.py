"""Which sample is visited when, and samples as microbatches.

The order is a function of the position alone (samples consumed so far), whatever the data-parallel size and the batch
sizes: resuming needs no more than that number. Where the blend changes on the way, positions belong to stretches; what
was visited in one counts as visited in the others of the same sequence length.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minitron_nemo.data.dataset import Blend, Sample, SampleIndex
from minitron_nemo.data.shuffle import permutation
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.device import current_device

# {"tokens", "labels", "position_ids": int64 [b, s], "token_weights": float32 [b, s], "sample_ids": list[str]};
# those of `microbatches` have "position": int, the place of their first sample in the order
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
    """`weights` (summing to 1) in units of 1 / PERIOD, summing to PERIOD: largest remainders.

    Each is at least 1, but for a weight of 0.
    """
    shares = [max(int(weight * PERIOD), 1) if weight else 0 for weight in weights]
    present = [i for i, weight in enumerate(weights) if weight]
    by_remainder = sorted(present, key=lambda i: (shares[i] - weights[i] * PERIOD, i))
    for turn in range(PERIOD - sum(shares)):
        shares[by_remainder[turn % len(present)]] += 1
    shares[shares.index(max(shares))] += PERIOD - sum(shares)  # where the minimum of 1 made the sum too large
    return shares


@dataclass(frozen=True)
class Stretch:
    """`samples` consecutive positions that one blend serves. A run's last stretch goes on as long as it is asked."""

    blend: Blend
    samples: int


class Sampler:
    """Walks through a blend; every epoch of a source visits all its samples, in an order of its own.

    With `stretches` the blend changes on the way; all have the sources of `blend`. A source goes on with its epoch
    where an earlier stretch of the same sequence length left it, and equal weights go on with their interleaving: a
    border between equal blends changes nothing. At another length the samples are others, and so is the count.
    """

    def __init__(self, blend: Blend, seed: int, stretches: Sequence[Stretch] = ()) -> None:
        self.blend = blend
        self.seed = seed
        self.consumed_samples = 0
        self._stretches = tuple(stretches) or (Stretch(blend, 0),)
        self._interleaves = {stretch.blend.weights: Interleave(stretch.blend.weights) for stretch in self._stretches}
        # One epoch's order for each source, and the next one's where a batch crosses the border.
        self._order = lru_cache(maxsize=2 * len(blend.sources))(self._make_order)

    def next_batch(self, size: int) -> list[SampleIndex]:
        """The next `size` samples; moves the position on."""
        batch = self.global_batch(self.consumed_samples, size)
        self.consumed_samples += size
        return batch

    def blend_at(self, position: int) -> Blend:
        """The blend that the sample index of `position` refers to."""
        return self._stretches[self._locate(position)[0]].blend

    def global_batch(self, position: int, size: int) -> list[SampleIndex]:
        """The samples of positions [position, position + size), wherever the sampler stands."""
        batch: list[SampleIndex] = []
        while len(batch) < size:
            number, offset = self._locate(position + len(batch))
            last = number == len(self._stretches) - 1
            rest = size - len(batch)
            batch += self._walk(number, offset, rest if last else min(rest, self._stretches[number].samples - offset))
        return batch

    def epoch(self) -> float:
        """Passes over the source that was passed over most, over all sequence lengths."""
        number, offset = self._locate(self.consumed_samples)
        blends = {stretch.blend.sequence_length: stretch.blend for stretch in self._stretches[: number + 1]}
        passes = np.zeros(len(self.blend.sources))
        for length, blend in blends.items():
            visited = self._visited(length, number, offset)
            passes += [count / len(source) for count, source in zip(visited, blend.sources, strict=True)]
        return float(passes.max())

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed_samples, "seed": self.seed, "blend": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError if it belongs to other data or another order."""
        if (state["seed"], state["blend"]) != (self.seed, self._fingerprint()):
            what = "seed" if state["seed"] != self.seed else "sources, weights, pack_seed or sequence_length"
            raise UserError(f"data: {what} changed since the training state was saved; change it back or start anew")
        self.consumed_samples = int(state["consumed_samples"])

    def _locate(self, position: int) -> tuple[int, int]:
        """The stretch that `position` lies in, and the position within it."""
        for number, stretch in enumerate(self._stretches[:-1]):
            if position < stretch.samples:
                return number, position
            position -= stretch.samples
        return len(self._stretches) - 1, position

    def _drawn(self, length: int, number: int, offset: int) -> Counter[tuple[float, ...]]:
        """Samples of this length drawn with each set of weights before position `offset` of stretch `number`."""
        drawn: Counter[tuple[float, ...]] = Counter()
        for earlier, stretch in enumerate(self._stretches[: number + 1]):
            if stretch.blend.sequence_length == length:
                drawn[stretch.blend.weights] += stretch.samples if earlier < number else offset
        return drawn

    def _visited(self, length: int, number: int, offset: int) -> list[int]:
        """How many samples of this length each source has given before position `offset` of stretch `number`."""
        counts = np.zeros(len(self.blend.sources), np.int64)
        for weights, drawn in self._drawn(length, number, offset).items():
            counts += self._interleaves[weights].counts(drawn)
        return counts.tolist()

    def _walk(self, number: int, offset: int, size: int) -> Iterator[SampleIndex]:
        """`size` samples from position `offset` of stretch `number` on, which does not end before."""
        blend = self._stretches[number].blend
        counts = self._visited(blend.sequence_length, number, offset)
        interleave = self._interleaves[blend.weights]
        start = self._drawn(blend.sequence_length, number, offset)[blend.weights]
        for place in range(start, start + size):
            source = interleave.source(place)
            epoch, within = divmod(counts[source], len(blend.sources[source]))
            yield source, int(self._order(source, epoch, len(blend.sources[source]))[within])
            counts[source] += 1

    def _fingerprint(self) -> str:
        """Of everything that decides the order but the seed."""
        if len(self._stretches) == 1:
            return self._stretches[0].blend.fingerprint
        content = [(stretch.blend.fingerprint, stretch.samples) for stretch in self._stretches]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def _make_order(self, source: int, epoch: int, samples: int) -> NDArray[np.int64]:
        return permutation(samples, "order", self.seed, source, epoch)


def microbatches(
    blend: Blend,
    indices: Sequence[SampleIndex],
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    position: int = 0,
) -> list[Microbatch]:
    """This data-parallel rank's part of a global batch, on the current device; `indices` start at `position`.

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
    return [
        stack([blend.sample(index) for index in indices[start : start + micro_batch_size]])
        | {"position": position + start}
        for start in starts
    ]


def stack(samples: Sequence[Sample]) -> Microbatch:
    """Samples of one length as a microbatch on the current device."""
    device = current_device()
    columns = {
        key: torch.stack([sample[key] for sample in samples]).to(device)  # [b, s]
        for key in ("tokens", "labels", "token_weights")
    }
    positions = torch.arange(columns["tokens"].shape[1], device=device).expand_as(columns["tokens"])
    return {**columns, "position_ids": positions, "sample_ids": [sample["id"] for sample in samples]}
