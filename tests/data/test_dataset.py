"""Packing, sample ids and held-out samples, against the texts that went in."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_nemo.config import DataConfig
from minitron_nemo.data.dataset import Blend, PackedDataset, open_heldout, open_train
from minitron_nemo.data.shuffle import permutation
from minitron_nemo.errors import UserError
from tests.data.corpus import SEPARATOR, decode, make_texts, prepare, stored_documents, write_jsonl

LENGTH = 64


def config_for(folder: Path) -> DataConfig:
    return DataConfig(
        train=[write_jsonl(folder / f"{seed}.jsonl", make_texts(80, seed)) for seed in (1, 2)],
        heldout_fraction=0.1,
        sequence_length=LENGTH,
    )


def ids(dataset: PackedDataset) -> list[str]:
    return [dataset.sample(i)["id"] for i in range(len(dataset))]


def ids_by_source(blend: Blend) -> dict[str, list[str]]:
    return {source.name: ids(source) for source in blend.sources}


def test_every_token_of_every_document_is_predicted_once_but_for_the_tail(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    prepared = prepare(config, tmp_path)
    for number, source in enumerate(open_train(config, prepared).sources):
        stream = [int(source.sample(0)["tokens"][0])]
        for i in range(len(source)):
            sample = source.sample(i)
            assert sample["tokens"].shape == sample["labels"].shape == (LENGTH,)
            assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
            assert int(sample["tokens"][0]) == stream[-1]
            stream += sample["labels"].tolist()
        borders = [place for place, token in enumerate(stream) if token == SEPARATOR]
        assert borders[0] == 0
        *complete, cut = (decode(stream[i + 1 : j]) for i, j in zip(borders, [*borders[1:], len(stream)], strict=True))
        documents = stored_documents(prepared, "train", number)
        rest = Counter(documents) - Counter(complete)
        assert sum(rest.values()) == len(documents) - len(complete)
        assert any(document.startswith(cut) for document in rest)
        unused = sum(len(document) + 1 for document in rest) - (len(cut) + 1)
        assert 0 <= unused < LENGTH


def test_a_sample_is_named_by_the_hash_of_its_tokens(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    sample = open_train(config, prepare(config, tmp_path)).sample((1, 3))
    tokens = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
    assert sample["id"] == hashlib.sha256(struct.pack(f"<{LENGTH + 1}i", *tokens)).hexdigest()
    assert sample["source"] == config.train[1].path


def test_samples_do_not_depend_on_order_seed_weights_or_the_other_sources(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    expected = ids_by_source(open_train(config, prepare(config, tmp_path)))
    config.seed, config.separator_weight = 99, 1.0
    config.train[0].weight, config.train[1].weight = 0.9, 0.3
    assert ids_by_source(open_train(config, tmp_path / "prepared")) == expected
    alone = dataclasses.replace(config, train=config.train[1:])
    name = config.train[1].path
    assert ids_by_source(open_train(alone, prepare(alone, tmp_path, "alone"))) == {name: expected[name]}


def test_packing_depends_on_the_texts_and_not_on_their_order_in_the_files(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    expected = ids_by_source(open_train(config, prepare(config, tmp_path)))
    lines = (tmp_path / "1.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "1.jsonl").write_text("".join(reversed(lines)))
    assert ids_by_source(open_train(config, prepare(config, tmp_path))) == expected


@pytest.mark.parametrize("change", [{"pack_seed": 5}, {"sequence_length": LENGTH // 2}])
def test_pack_seed_and_sequence_length_make_other_samples(tmp_path: Path, change: dict[str, int]) -> None:
    config = config_for(tmp_path)
    prepared = prepare(config, tmp_path)
    first, second = (open_train(c, prepared) for c in (config, dataclasses.replace(config, **change)))  # type: ignore[arg-type]
    assert first.fingerprint != second.fingerprint
    assert not set(ids(first.sources[0])) & set(ids(second.sources[0]))


def test_predictions_from_the_separator_alone_have_their_own_weight(tmp_path: Path) -> None:
    config = dataclasses.replace(config_for(tmp_path), separator_weight=0.25)
    source = open_train(config, prepare(config, tmp_path)).sources[0]
    for i in range(len(source)):
        sample = source.sample(i)
        expected = [0.25 if token == SEPARATOR else 1.0 for token in sample["tokens"].tolist()]
        assert sample["token_weights"].tolist() == expected
        assert sample["token_weights"].dtype == torch.float32


def test_blends_are_by_tokens_unless_weights_say_otherwise(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    prepared = prepare(config, tmp_path)
    blend = open_train(config, prepared)
    lengths = [len(source) for source in blend.sources]
    assert blend.weights == pytest.approx([length / sum(lengths) for length in lengths])
    config.train[0].weight, config.train[1].weight = 3.0, 1.0
    assert open_train(config, prepared).weights == (0.75, 0.25)
    config.train[1].weight = None
    with pytest.raises(UserError, match=r"2\.jsonl has no weight"):
        open_train(config, prepared)
    config.train[1].weight = -1.0
    with pytest.raises(UserError, match="weight -1.0 is not positive"):
        open_train(config, prepared)


def test_data_that_does_not_fit_the_recipe_is_refused(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    with pytest.raises(UserError, match="run `minitron prepare` first"):
        open_train(config, tmp_path / "nothing")
    prepared = prepare(config, tmp_path)
    with pytest.raises(UserError, match=r"1\.jsonl: its \d+ training tokens are less than one sample"):
        open_train(dataclasses.replace(config, sequence_length=100_000), prepared)
    with pytest.raises(UserError, match="made for other sources"):
        open_train(dataclasses.replace(config, train=config.train[:1]), prepared)


def test_held_out_samples_are_beginnings_of_different_documents_spread_over_the_sources(tmp_path: Path) -> None:
    counts = {"a": 40, "b": 9, "c": 40}
    texts = {name: make_texts(count, seed) for seed, (name, count) in enumerate(counts.items())}
    config = DataConfig(
        train=[write_jsonl(tmp_path / "train.jsonl", make_texts(30, 77))],
        heldout=[write_jsonl(tmp_path / f"{name}.jsonl", texts[name]) for name in counts],
        heldout_fraction=0.0,
    )
    prepared = prepare(config, tmp_path)
    samples = open_heldout(prepared, LENGTH, 30)
    assert [sample["id"] for sample in samples] == [sample["id"] for sample in open_heldout(prepared, LENGTH, 30)]
    assert [sample["id"] for sample in samples[:12]] == [sample["id"] for sample in open_heldout(prepared, LENGTH, 12)]
    beginnings = {
        name: {text[:LENGTH] for text in texts[name] if len(text) >= LENGTH} for name in counts
    }  # the separator and LENGTH characters are LENGTH + 1 tokens
    chosen: Counter[str] = Counter()
    for sample in samples:
        name = Path(sample["source"]).stem
        chosen[name] += 1
        assert int(sample["tokens"][0]) == SEPARATOR
        assert sample["token_weights"].tolist() == [0.0] + [1.0] * (LENGTH - 1)
        beginnings[name].remove(decode(sample["labels"].tolist()))  # each once
    long = len([text for text in texts["b"] if len(text) >= LENGTH])
    assert long < 10
    assert chosen["b"] == long
    assert abs(chosen["a"] - chosen["c"]) <= 1


def test_short_held_out_documents_come_last_and_their_padding_has_no_weight(tmp_path: Path) -> None:
    texts = ["x" * 100, "short", "y" * LENGTH, "z" * (LENGTH - 1)]
    config = DataConfig(
        train=[write_jsonl(tmp_path / "train.jsonl", make_texts(30, 77))],
        heldout=[write_jsonl(tmp_path / "heldout.jsonl", texts)],
        heldout_fraction=0.0,
    )
    samples = open_heldout(prepare(config, tmp_path), LENGTH, 10, separator_weight=0.5)
    assert len(samples) == 4
    assert {decode(sample["labels"].tolist()) for sample in samples[:2]} == {"x" * LENGTH, "y" * LENGTH}
    for sample in samples[2:]:
        length = 5 if "s" in decode(sample["tokens"][1:2].tolist()) else LENGTH - 1
        assert sample["token_weights"].tolist() == [0.5] + [1.0] * (length - 1) + [0.0] * (LENGTH - length)
        assert sample["labels"][length:].tolist() == [SEPARATOR] * (LENGTH - length)


def test_no_held_out_document_at_all_is_an_error(tmp_path: Path) -> None:
    config = dataclasses.replace(config_for(tmp_path), heldout_fraction=0.0)
    with pytest.raises(UserError, match="no held-out documents"):
        open_heldout(prepare(config, tmp_path), LENGTH, 4)


def test_orders_are_the_same_everywhere() -> None:
    """By the published algorithm in Python's integers, since NumPy's own shuffles change between its versions."""
    mask = 2**64 - 1

    def finalise(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    seed = int.from_bytes(hashlib.sha256(b"('order', 3)").digest()[:8], "big")
    keys = [finalise(finalise((value + 0x9E3779B97F4A7C15) & mask) ^ seed) for value in range(1000)]
    assert permutation(1000, "order", 3).tolist() == sorted(range(1000), key=keys.__getitem__)
    assert permutation(6, "order", 3).tolist() != permutation(6, "order", 4).tolist()
    assert np.array_equal(np.sort(permutation(1000, "a")), np.arange(1000))
