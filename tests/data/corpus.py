"""A byte tokenizer and small corpora whose documents can be told apart, for the tests of this folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers.pre_tokenizers import ByteLevel

from minitron_nemo.config import DataConfig, TextSource
from minitron_nemo.data.prepare import prepare_data
from tests.tiny import write_byte_tokenizer

SEPARATOR = 256
LETTERS = [" " if letter == "Ġ" else letter for letter in sorted(ByteLevel.alphabet())]


def make_texts(count: int, seed: int, longest: int = 300) -> list[str]:
    """Different texts of 1 to `longest` characters."""
    generator = random.Random(seed)
    texts = ["".join(generator.choices("abcdefgh ", k=generator.randint(1, longest))).strip() for _ in range(count)]
    return [f"{seed}.{number} {text}".strip() for number, text in enumerate(texts)]


def write_jsonl(path: Path, texts: list[str]) -> TextSource:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextSource(str(path))


def write_tokenizer(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(directory)
    return directory


def prepare(config: DataConfig, folder: Path, name: str = "prepared") -> Path:
    """Prepare under `folder`; returns the directory."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    prepare_data(config, tokenizer, folder / name, progress=False)
    return folder / name


def stored_documents(prepared: Path, split: str, source: int | None = None) -> list[str]:
    """A split's documents, of all sources or one, as Megatron reads them; asserts the separator before each."""
    found = []
    folder = "*" if source is None else f"{source:02d}-*"
    for index in sorted(prepared.glob(f"{folder}/{split}.idx")):
        dataset = IndexedDataset(str(index.with_suffix("")))
        assert np.array_equal(dataset.document_indices, np.arange(len(dataset) + 1))
        for number in range(len(dataset)):
            tokens = dataset[number].tolist()
            assert tokens[0] == SEPARATOR
            assert SEPARATOR not in tokens[1:]
            found.append(decode(tokens[1:]))
    return found


def decode(tokens: list[int]) -> str:
    """Text of the byte tokenizer's tokens, for ASCII."""
    return "".join(LETTERS[token] for token in tokens)
