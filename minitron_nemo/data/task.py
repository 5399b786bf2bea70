"""`minitron make-task`: multiple-choice questions out of held-out text, where no benchmark is at hand (`choices.py`).

A document's words, joined by single spaces, are cut into passages: a context, and its continuation, which is the right
choice. The wrong ones are continuations of other documents. Questions come in groups of four, whose continuations,
neighbours by length, are the choices of all four: who does not look at the context is right in one of them.

    choose.jsonl   to choose layers by: prune.depth.task
    judge.jsonl    to judge by what was chosen; of other documents, which the hash of their text decides
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.datasets.indexed_dataset import IndexedDataset

from minitron_nemo.checkpoint.files import write_atomic, writing
from minitron_nemo.data.dataset import id_words
from minitron_nemo.data.prepared import load_prepared
from minitron_nemo.data.shuffle import permutation
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError

PARTS = ("choose", "judge")
CHOICES = 4
CONTEXT_WORDS, CHOICE_WORDS = 20, 6


class Passage(NamedTuple):
    context: str
    continuation: str


def make_task(prepared: Path, tokenizer_dir: Path, output: Path, *, questions: int, seed: int) -> dict[str, int]:
    """Write up to `questions` to each part's file in `output`; returns how many, by part.

    The same data, numbers and seed give the same bytes; `seed` has a bearing on which questions are taken, and on the
    places of the answers, not on the side of a document. Raises UserError for data of another tokenizer and for too
    little held-out text.
    """
    if questions < CHOICES:
        raise UserError(f"make-task: {questions} questions are too few; they come in groups of {CHOICES}")
    documents: dict[str, list[list[Passage]]] = {part: [] for part in PARTS}
    for word, text in _held_out(prepared, tokenizer_dir):
        documents[PARTS[word % 2]].append(_passages(text))
    made = {part: _questions(of_part, seed, questions) for part, of_part in documents.items()}
    for part, records in made.items():
        if not records:
            raise UserError(
                f"{prepared}: too little held-out text for {part}.jsonl, which takes {CHOICES} documents of "
                f"{CONTEXT_WORDS + CHOICE_WORDS} words; give data.heldout sources or a larger heldout_fraction"
            )
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for part, records in made.items():
            write_atomic(output / f"{part}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return {part: len(records) for part, records in made.items()}


def _held_out(prepared: Path, tokenizer_dir: Path) -> Iterator[tuple[int, str]]:
    """Every held-out document with a word of its hash."""
    content, tokenizer = load_prepared(prepared), load_tokenizer(tokenizer_dir)
    if content.tokenizer != tokenizer.fingerprint:
        raise UserError(f"{prepared}: prepared with another tokenizer than {tokenizer_dir}; prepare it again")
    for split in (source.heldout for source in content.sources if source.heldout is not None):
        dataset = IndexedDataset(str(prepared / split.prefix))
        for number, word in enumerate(id_words(prepared, split).tolist()):
            yield word, tokenizer.decode(dataset.get(number)[1:].tolist())  # behind the separator


def _passages(text: str) -> list[Passage]:
    words, size = text.split(), CONTEXT_WORDS + CHOICE_WORDS
    return [
        Passage(
            " ".join(words[start : start + CONTEXT_WORDS]),
            " " + " ".join(words[start + CONTEXT_WORDS :][:CHOICE_WORDS]),
        )
        for start in range(0, len(words) - size + 1, size)
    ]


def _questions(documents: Sequence[Sequence[Passage]], seed: int, most: int) -> list[dict[str, Any]]:
    """Questions in the order of their file: whole groups, of which each document has one passage at most."""
    groups: list[list[Passage]] = []
    for number in range(max(map(len, documents), default=0)):
        different = {
            passages[number].continuation: passages[number] for passages in documents if len(passages) > number
        }
        alike = sorted(different.values(), key=lambda passage: (len(passage.continuation), passage.continuation))
        groups += [alike[start : start + CHOICES] for start in range(0, len(alike) - CHOICES + 1, CHOICES)]
    records = []
    for place in permutation(len(groups), "task", seed)[: most // CHOICES].tolist():
        for own, passage in enumerate(groups[place]):
            order = permutation(CHOICES, "answer", seed, place, own).tolist()
            choices = [groups[place][other].continuation for other in order]
            records.append({"context": passage.context, "choices": choices, "answer": order.index(own)})
    return records
