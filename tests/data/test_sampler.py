"""Blends, epochs, resuming and the parts of data-parallel ranks."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron_nemo.config import DataConfig
from minitron_nemo.data import sampler as sampler_module
from minitron_nemo.data.dataset import Blend, open_train
from minitron_nemo.data.sampler import Interleave, Sampler, microbatches
from minitron_nemo.errors import UserError
from tests.data.corpus import make_texts, prepare, write_jsonl

LENGTH = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("corpus")
    sources = [write_jsonl(folder / f"{seed}.jsonl", make_texts(10 * seed, seed)) for seed in (1, 2, 4)]
    for source, weight in zip(sources, (0.5, 0.2, 0.3), strict=True):
        source.weight = weight
    return DataConfig(train=sources, sequence_length=LENGTH)


@pytest.fixture(scope="module")
def prepared(config: DataConfig) -> Path:
    return prepare(config, Path(config.train[0].path).parent)


@pytest.fixture
def blend(config: DataConfig, prepared: Path) -> Blend:
    return open_train(config, prepared)


def random_weights(count: int, seed: int) -> list[float]:
    generator = random.Random(seed)
    weights = [generator.random() ** 3 + 1e-9 for _ in range(count)]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    "weights",
    [[1.0], [0.5, 0.5], [0.999999, 0.000001], [0.7, 0.2, 0.1]] + [random_weights(n, n) for n in (3, 5, 8, 13)],
)
def test_every_prefix_holds_each_source_to_within_one_sample_of_its_share(weights: list[float]) -> None:
    interleave = Interleave(weights)
    length = 5000
    sources = np.array([interleave.source(position) for position in range(length)])
    for source, weight in enumerate(weights):
        counts = np.cumsum(sources == source)
        assert np.abs(counts - weight * np.arange(1, length + 1)).max() < 1.01
    for position in (0, 1, 17, length):
        assert interleave.counts(position) == [int((sources[:position] == s).sum()) for s in range(len(weights))]


def test_positions_beyond_the_period_go_on_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "PERIOD", 64)
    interleave = Interleave([0.6, 0.3, 0.1])
    assert sum(interleave.shares) == 64
    sources = [interleave.source(position) for position in range(300)]
    fresh = Interleave([0.6, 0.3, 0.1])
    assert [fresh.source(position) for position in reversed(range(300))] == sources[::-1]
    for position in range(300):
        counted = Counter(sources[:position])
        assert fresh.counts(position) == [counted[source] for source in range(3)]
        for source in range(3):
            assert abs(counted[source] - fresh.shares[source] * position / 64) < 1


def test_every_epoch_visits_every_sample_once_in_another_order(blend: Blend) -> None:
    sampler = Sampler(blend, seed=1)
    visited: list[list[int]] = [[] for _ in blend.sources]
    for source, sample in sampler.next_batch(8 * max(len(source) for source in blend.sources)):
        visited[source].append(sample)
    orders = []
    for dataset, samples in zip(blend.sources, visited, strict=True):
        epochs = [samples[start : start + len(dataset)] for start in range(0, len(samples), len(dataset))]
        assert len(epochs) > 2
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(len(dataset)))
        assert epochs[0] != epochs[1]
        orders.append(epochs[0])
    assert 1 < sampler.epoch() < 100
    other = [sample for source, sample in Sampler(blend, seed=2).next_batch(4 * len(blend.sources[0])) if source == 0]
    assert other[: len(blend.sources[0])] != orders[0]


@pytest.mark.parametrize("position", [0, 1, 37, 1000])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_resumed_sampler_goes_on_exactly_with_any_batch_size(
    config: DataConfig, prepared: Path, position: int, size: int
) -> None:
    expected = Sampler(open_train(config, prepared), seed=3).global_batch(0, position + 48)
    before = Sampler(open_train(config, prepared), seed=3)
    for _ in range(position):
        before.next_batch(1)
    state = json.loads(json.dumps(before.state_dict()))
    after = Sampler(open_train(config, prepared), seed=3)
    after.load_state_dict(state)
    assert [index for _ in range(48 // size) for index in after.next_batch(size)] == expected[position:]


def test_a_state_of_other_data_or_another_order_is_refused(config: DataConfig, prepared: Path, blend: Blend) -> None:
    state = Sampler(blend, seed=3).state_dict()
    with pytest.raises(UserError, match="data: seed changed"):
        Sampler(blend, seed=4).load_state_dict(state)
    other = Blend(blend.sources, (0.2, 0.5, 0.3))
    with pytest.raises(UserError, match="weights, pack_seed or sequence_length changed"):
        Sampler(other, seed=3).load_state_dict(state)


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 2), (3, 4), (4, 3), (12, 1)])
def test_the_ranks_share_out_one_global_batch_whatever_their_number(
    blend: Blend, dp_size: int, micro_batch_size: int
) -> None:
    batch = Sampler(blend, seed=3).next_batch(24)
    parts = [microbatches(blend, batch, rank, dp_size, micro_batch_size) for rank in range(dp_size)]
    assert {len(part) for part in parts} == {24 // (dp_size * micro_batch_size)}
    in_order = [microbatch for together in zip(*parts, strict=True) for microbatch in together]
    samples = [blend.sample(index) for index in batch]
    assert [id_ for microbatch in in_order for id_ in microbatch["sample_ids"]] == [sample["id"] for sample in samples]
    for key in ("tokens", "labels", "token_weights"):
        joined = torch.cat([microbatch[key] for microbatch in in_order])
        assert torch.equal(joined, torch.stack([sample[key] for sample in samples]))


def test_a_microbatch_has_what_models_expect(blend: Blend) -> None:
    (microbatch,) = microbatches(blend, [(0, 0), (1, 1)], 0, 1, 2)
    types: dict[str, Any] = {
        key: microbatch[key].dtype for key in ("tokens", "labels", "position_ids", "token_weights")
    }
    assert types == dict.fromkeys(("tokens", "labels", "position_ids"), torch.int64) | {"token_weights": torch.float32}
    assert microbatch["position_ids"].tolist() == [list(range(LENGTH))] * 2


def test_a_global_batch_that_does_not_divide_is_refused(blend: Blend) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch_size: 10 is not a multiple of micro_batch_size 2 x"):
        microbatches(blend, [(0, 0)] * 10, 0, 2, 2)
