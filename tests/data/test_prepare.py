"""Tokenised data: what Megatron reads back, the split, and that no interruption shows in the bytes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from minitron_nemo.config import DataConfig, TextSource
from minitron_nemo.data import prepare as prepare_module
from minitron_nemo.data.prepare import inputs_stamp
from minitron_nemo.data.prepared import PreparedSource, load_prepared
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError
from tests.data.corpus import SEPARATOR, decode, make_texts, prepare, stored_documents, write_jsonl, write_tokenizer


def content(directory: Path) -> dict[str, str]:
    """Hash of every file; the hidden leftovers of a killed atomic write are not content."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def overlapping_config(folder: Path) -> tuple[DataConfig, list[str], list[str]]:
    """Two training sources and a held-out one that share texts; all texts, and those of the held-out source."""
    shared, first, second, held_out = (make_texts(40, seed) for seed in range(4))
    config = DataConfig(
        train=[
            write_jsonl(folder / "first.jsonl", first + shared + first[:7]),
            write_jsonl(folder / "second.jsonl", second + shared[:30] + held_out[:5]),
        ],
        heldout=[write_jsonl(folder / "heldout.jsonl", held_out + shared[:3])],
        heldout_fraction=0.2,
    )
    return config, shared + first + second + held_out, held_out + shared[:3]


def test_every_text_is_stored_once_and_none_is_on_both_sides(tmp_path: Path) -> None:
    config, everything, whole = overlapping_config(tmp_path)
    prepared = prepare(config, tmp_path)
    train, heldout = (stored_documents(prepared, split) for split in ("train", "heldout"))
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(everything)
    assert set(whole) <= set(heldout)
    assert 0.1 < (len(heldout) - len(whole)) / (len(everything) - len(whole)) < 0.3


def test_the_side_of_a_text_does_not_depend_on_what_else_there_is(tmp_path: Path) -> None:
    config, _, whole = overlapping_config(tmp_path)
    both = stored_documents(prepare(config, tmp_path), "heldout")
    config.train.reverse()
    config.heldout = []
    reverse = stored_documents(prepare(config, tmp_path, "reversed"), "heldout")
    assert set(both) - set(whole) == set(reverse) - set(whole)


def test_prepared_json_counts_what_is_stored(tmp_path: Path) -> None:
    config, _, _ = overlapping_config(tmp_path)
    prepared = prepare(config, tmp_path)
    record = load_prepared(prepared)
    assert (record.separator_id, record.vocab_size) == (SEPARATOR, 259)
    for source in record.sources:
        for split in filter(None, (source.train, source.heldout)):
            dataset = IndexedDataset(str(prepared / split.prefix))
            assert split.documents == len(dataset)
            assert split.tokens == sum(dataset[i].size for i in range(len(dataset)))
            assert split.characters == split.tokens - split.documents  # one token a byte


def test_names_of_special_tokens_in_a_text_stay_text(tmp_path: Path) -> None:
    text = "before <|endoftext|> after <|bos|>"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    assert tokenizer.separator_id == SEPARATOR
    assert SEPARATOR not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prepared = prepare(DataConfig(train=[write_jsonl(tmp_path / "a.jsonl", [text])], heldout_fraction=0.0), tmp_path)
    assert stored_documents(prepared, "train") == [text]


def test_the_separator_is_the_end_token_where_the_vocabulary_has_no_document_separator(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = directory / name
        path.write_text(path.read_text().replace("<|endoftext|>", "</s>"))
    assert load_tokenizer(directory).separator_id == SEPARATOR
    record = json.loads((directory / "tokenizer_config.json").read_text())
    del record["eos_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="no end token"):
        load_tokenizer(directory)


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"^{directory}: no "):
            load_tokenizer(directory)


class _Tokenizer:
    """The little that Megatron's GPTDataset asks of one."""

    eod = SEPARATOR
    pad = SEPARATOR
    vocab_size = 259
    unique_identifiers = {"class": "bytes"}


def test_megatron_trains_on_the_files_as_they_are(tmp_path: Path) -> None:
    texts = make_texts(60, seed=5)
    prepared = prepare(DataConfig(train=[write_jsonl(tmp_path / "a.jsonl", texts)], heldout_fraction=0.0), tmp_path)
    prefix = str(prepared / load_prepared(prepared).sources[0].train.prefix)  # type: ignore[union-attr]
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=128,
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=0.005,
    )
    indexed = IndexedDataset(prefix)
    dataset = GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), None, Split.train, config)
    whole = 0
    for i in range(len(dataset)):
        tokens = dataset[i]["tokens"].tolist()
        borders = [place for place, token in enumerate(tokens) if token == SEPARATOR]
        for begin, end in zip(borders, borders[1:], strict=False):
            assert decode(tokens[begin + 1 : end]) in texts
            whole += 1
    assert whole > 10


def test_nothing_is_done_again_unless_text_tokenizer_or_split_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, _ = overlapping_config(tmp_path)
    prepared = prepare(config, tmp_path)
    before = content(prepared)
    done: list[str] = []
    original: Callable[..., PreparedSource] = prepare_module._prepare_source

    def recorded(source: TextSource, *rest: Any) -> PreparedSource:
        done.append(Path(source.path).name)
        return original(source, *rest)

    monkeypatch.setattr(prepare_module, "_prepare_source", recorded)
    config.seed, config.pack_seed, config.sequence_length, config.separator_weight = 7, 8, 9, 0.5
    config.train[0].weight = config.train[1].weight = 0.5
    prepare(config, tmp_path)
    assert done == []
    assert content(prepared) == before

    second = Path(config.train[1].path)
    stamp = inputs_stamp(config)
    second.write_text(second.read_text() + '{"text": "one more"}\n')
    assert inputs_stamp(config) != stamp
    prepare(config, tmp_path)
    assert done == ["second.jsonl"]
    assert "one more" in stored_documents(prepared, "train") + stored_documents(prepared, "heldout")

    done.clear()
    config.heldout_fraction = 0.3
    prepare(config, tmp_path)
    assert done == ["first.jsonl", "second.jsonl"]

    done.clear()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(
        (tmp_path / "tokenizer" / "tokenizer.json").read_text().replace("<|pad|>", "<|fill|>")
    )
    prepare(config, tmp_path)
    assert done == ["heldout.jsonl", "first.jsonl", "second.jsonl"]


def test_a_changed_held_out_source_takes_its_texts_out_of_training(tmp_path: Path) -> None:
    config, everything, whole = overlapping_config(tmp_path)
    prepared = prepare(config, tmp_path)
    moved = stored_documents(prepared, "train")[0]
    assert moved not in whole
    write_jsonl(Path(config.heldout[0].path), [*whole, moved])
    prepare(config, tmp_path)
    assert moved not in stored_documents(prepared, "train")
    assert moved in stored_documents(prepared, "heldout")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "blank.md"])
def test_a_source_without_text_is_named_and_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("" if name.startswith("empty") else "\n \n# Title\n")
    with pytest.raises(UserError, match=f"{name}: no text in it"):
        prepare(DataConfig(train=[TextSource(str(tmp_path / name))]), tmp_path)
    assert list((tmp_path / "prepared").iterdir()) == []


def test_documents_without_text_are_counted_by_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "kept.txt").write_text("A text.")
    (tmp_path / "files" / "code.md").write_text("# Title\n\n    code\n")
    (tmp_path / "files" / "short.rst").write_text("Too short.")
    whole = write_jsonl(tmp_path / "whole.jsonl", ["Another text."])
    config = DataConfig(train=[TextSource(str(tmp_path / "files")), whole], heldout_fraction=0.0)
    stored = stored_documents(prepare(config, tmp_path), "train")
    assert stored == ["A text.", "Another text."]
    line = f"[prepare] {tmp_path}/files: 2 of 3 documents have no text; of .md and .rst only prose is kept\n"
    assert capsys.readouterr().out == line


def test_a_source_that_leaves_nothing_to_train_on_is_named(tmp_path: Path) -> None:
    texts = make_texts(5, seed=1)
    config = DataConfig(
        train=[write_jsonl(tmp_path / "train.jsonl", texts)], heldout=[write_jsonl(tmp_path / "heldout.jsonl", texts)]
    )
    with pytest.raises(UserError, match=r"train\.jsonl: none of its 5 documents is left for training"):
        prepare(config, tmp_path)
    config.train, config.heldout_fraction = [], 0.1
    with pytest.raises(UserError, match=r"data\.train: no sources"):
        prepare(config, tmp_path)


def test_a_share_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    texts = make_texts(5, seed=1)
    config = DataConfig(train=[write_jsonl(tmp_path / "train.jsonl", texts)], heldout_fraction=1e-6)
    with pytest.raises(UserError, match=r"^data\.heldout_fraction: 1e-06 holds out none of the 5 documents"):
        prepare(config, tmp_path)
    assert not (tmp_path / "prepared" / "prepared.json").exists()
    config.heldout = [write_jsonl(tmp_path / "heldout.jsonl", make_texts(3, seed=2))]
    assert len(stored_documents(prepare(config, tmp_path), "heldout")) == 3


def _kill_at(event: int, folder: Path, work: Callable[[], object]) -> bool:
    """Run `work` in a forked process that SIGKILLs itself at its `event`-th file operation under `folder`; False if
    it had fewer and ended by itself."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if name in ("open", "os.rename", "os.mkdir", "os.remove") and str(folder) in str(arguments[0]):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(count)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.slow
def test_killed_at_any_file_operation_and_run_again_it_writes_the_same_bytes(tmp_path: Path) -> None:
    config, _, _ = overlapping_config(tmp_path)
    del config.train[0]
    expected = content(prepare(config, tmp_path))
    torch.set_num_threads(1)  # forked children have no thread pool
    event = 1
    while True:
        output = tmp_path / f"killed-{event}"
        killed = _kill_at(event, output, lambda: prepare(config, tmp_path, output.name))  # noqa: B023 - called at once
        if (output / "prepared.json").exists():
            assert content(output) == expected  # the last thing written: all else is whole
        else:
            assert killed
        assert content(prepare(config, tmp_path, output.name)) == expected
        if not killed:
            break
        event += 1
    assert event > 20
