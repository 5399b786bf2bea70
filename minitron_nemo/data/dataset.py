"""Prepared documents as samples of a fixed length.

Training packs: a source's documents, in an order that depends on `pack_seed` and their texts alone, make one stream

    <sep> document <sep> document ...

and sample i is the s + 1 tokens from i * s on, so neighbours share one token and every token is predicted once. What
is left at the end is not used. Order of visits, epochs and weights come later (sampler.py) and change no sample.

Held-out samples do not pack: one sample is one document's beginning.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from minitron_nemo.config import DataConfig
from minitron_nemo.data.prepared import PreparedSource, Split, load_prepared
from minitron_nemo.data.shuffle import shuffled
from minitron_nemo.errors import UserError

# {"tokens": int64 [s], "labels": int64 [s], "token_weights": float32 [s], "id": sha256 hex, "source": name}
Sample = dict[str, Any]
SampleIndex = tuple[int, int]  # (source, sample within it)


class PackedDataset:
    """The packed samples of one source, read from memory-mapped files when asked for."""

    def __init__(
        self,
        prepared: Path,
        source: PreparedSource,
        *,
        pack_seed: int,
        sequence_length: int,
        separator_id: int,
        separator_weight: float,
    ) -> None:
        """Raises UserError if the source has less than one sample."""
        split = source.train
        if split is None:
            raise _too_short(source.path, 0, sequence_length)
        self.name = source.name
        self.path = source.path
        self.tokens = split.tokens
        self._stream = f"{split.sha256} {pack_seed}"
        self._cut(sequence_length)
        self._separator = (separator_id, separator_weight)
        self._documents = IndexedDataset(str(prepared / split.prefix))
        self._order = shuffled(id_words(prepared, split), "pack", pack_seed)
        self._ends = np.cumsum(self._documents.sequence_lengths[self._order], dtype=np.int64)

    def resized(self, sequence_length: int) -> PackedDataset:
        """The same stream cut into samples of another length; both share what they hold in memory.

        Raises UserError if it is less than one sample.
        """
        other = copy.copy(self)
        other._cut(sequence_length)
        return other

    def _cut(self, sequence_length: int) -> None:
        if self.tokens <= sequence_length:
            raise _too_short(self.path, self.tokens, sequence_length)
        self.sequence_length = sequence_length
        self.fingerprint = hashlib.sha256(f"{self._stream} {sequence_length}".encode()).hexdigest()

    def __len__(self) -> int:
        return (self.tokens - 1) // self.sequence_length

    def sample(self, index: int) -> Sample:
        """Sample `index` of range(len(self)); its id is the hash of its s + 1 token ids."""
        return make_sample(self._read(index), self.name, *self._separator)

    def _read(self, index: int) -> NDArray[np.int64]:
        """The sample's s + 1 token ids, pieced together from the documents they lie in."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.sequence_length
        stop = start + self.sequence_length + 1
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        pieces = []
        for place in range(first, last + 1):
            begin = self._ends[place - 1] if place else 0
            offset = max(start - begin, 0)
            length = min(stop, self._ends[place]) - begin - offset
            pieces.append(self._documents.get(int(self._order[place]), int(offset), int(length)))
        return np.concatenate(pieces, dtype=np.int64)


def _too_short(path: str, tokens: int, sequence_length: int) -> UserError:
    return UserError(
        f"{path}: its {tokens} training tokens are less than one sample of sequence_length {sequence_length} + 1; "
        "give more text or a shorter sequence_length"
    )


@dataclass(frozen=True)
class Blend:
    """Training sources and their shares (not negative, summing to 1)."""

    sources: tuple[PackedDataset, ...]
    weights: tuple[float, ...]

    def sample(self, index: SampleIndex) -> Sample:
        return self.sources[index[0]].sample(index[1])

    @property
    def sequence_length(self) -> int:
        return self.sources[0].sequence_length

    def resized(self, sequence_length: int) -> Blend:
        """The same text in samples of another length, with the same shares. Raises UserError where it is too short."""
        return Blend(tuple(source.resized(sequence_length) for source in self.sources), self.weights)

    @cached_property
    def fingerprint(self) -> str:
        """Of every sample and weight."""
        content = [source.fingerprint for source in self.sources], self.weights
        return hashlib.sha256(repr(content).encode()).hexdigest()


def open_train(config: DataConfig, prepared: Path) -> Blend:
    """The training samples of `config` from what `prepare_data` wrote.

    Raises UserError when the data was prepared for other sources, or a source or its weight is unusable.
    """
    content = load_prepared(prepared)
    sources = [source for source in content.sources if not source.held_out]
    if [source.path for source in sources] != [source.path for source in config.train]:
        raise UserError(
            f"{prepared}/prepared.json: made for other sources than data.train; run `minitron prepare` again"
        )
    datasets = tuple(
        PackedDataset(
            prepared,
            source,
            pack_seed=config.pack_seed,
            sequence_length=config.sequence_length,
            separator_id=content.separator_id,
            separator_weight=config.separator_weight,
        )
        for source in sources
    )
    # Without weights, so that all sources end their epochs together.
    shares = given_weights(config) or [float(len(dataset)) for dataset in datasets]
    return Blend(datasets, tuple(share / sum(shares) for share in shares))


def given_weights(config: DataConfig) -> list[float]:
    """Weights of the blend in the order of its sources; none where the recipe gives none. Raises UserError."""
    given = [source.weight for source in config.train if source.weight is not None]
    if given and len(given) < len(config.train):
        lacking = next(source.path for source in config.train if source.weight is None)
        raise UserError(f"data.train: {lacking} has no weight, but others have; give all of them one or none")
    if given and min(given) <= 0:
        raise UserError(f"data.train: weight {min(given)} is not positive; remove the source instead")
    return given


def open_heldout(prepared: Path, sequence_length: int, documents: int, separator_weight: float = 0.0) -> list[Sample]:
    """The beginnings of up to `documents` held-out documents, one sample each, starting with the separator.

    Sources take turns, each in the order of its documents' hashes; documents of at least sequence_length + 1 tokens
    come first, shorter ones are padded with separators of weight 0. Raises UserError if nothing was held out.
    """
    content = load_prepared(prepared)
    splits = [(source, source.heldout) for source in content.sources if source.heldout is not None]
    if not splits:
        raise UserError(f"{prepared}: no held-out documents; give data.heldout sources or a larger heldout_fraction")
    datasets = [IndexedDataset(str(prepared / split.prefix)) for _, split in splits]
    candidates = []
    for number, ((_, split), dataset) in enumerate(zip(splits, datasets, strict=True)):
        order = np.argsort(id_words(prepared, split), kind="stable")
        short = dataset.sequence_lengths[order] <= sequence_length
        for is_short in (False, True):
            turns = enumerate(order[short == is_short])
            candidates += [(is_short, turn, number, int(document)) for turn, document in turns]
    samples = []
    for _, _, number, document in sorted(candidates)[:documents]:
        tokens = datasets[number].get(
            document, 0, min(sequence_length + 1, datasets[number].sequence_lengths[document])
        )
        padded = np.full(sequence_length + 1, content.separator_id, dtype=np.int64)
        padded[: tokens.size] = tokens
        sample = make_sample(padded, splits[number][0].name, content.separator_id, separator_weight)
        sample["token_weights"][tokens.size - 1 :] = 0.0  # predictions of padding
        samples.append(sample)
    return samples


def make_sample(token_ids: NDArray[np.int64], source: str, separator_id: int, separator_weight: float) -> Sample:
    """Inputs, labels and weights of s + 1 token ids; the id is the sha256 of them as 32-bit little-endian integers."""
    tokens = torch.from_numpy(token_ids)
    weights = torch.ones(len(tokens) - 1, dtype=torch.float32)
    weights[tokens[:-1] == separator_id] = separator_weight
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "token_weights": weights,
        "id": hashlib.sha256(token_ids.astype("<i4").tobytes()).hexdigest(),
        "source": source,
    }


def id_words(prepared: Path, split: Split) -> NDArray[np.uint64]:
    """The first 8 bytes of every document's id, as numbers."""
    ids = np.fromfile(prepared / f"{split.prefix}.ids", dtype=">u8")
    return ids[::4].astype(np.uint64)
