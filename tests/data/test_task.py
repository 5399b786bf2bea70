"""Tasks made of held-out text: whose words they are, that nothing but the context tells, and what is refused."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minitron_nemo.cli import main
from minitron_nemo.config import DataConfig, TextSource
from minitron_nemo.data.choices import Choices, Question, read_questions
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.data.task import CHOICE_WORDS, CONTEXT_WORDS, PARTS
from tests.data.corpus import write_jsonl, write_tokenizer


def document(number: int, seed: int) -> str:
    """Words that no other document has, each with its place; several passages and a rest."""
    lengths = np.random.default_rng([seed, number]).integers(1, 9, size=3 * (CONTEXT_WORDS + CHOICE_WORDS) + number % 7)
    return "  ".join(f"{'x' * length}.{seed}.{number}.{place}" for place, length in enumerate(lengths))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a tokenizer and prepared data: 60 held-out documents, and 10 to train on."""
    directory = tmp_path_factory.mktemp("task") / "run"
    tokenizer = write_tokenizer(directory / "teacher" / "tokenizer")
    sources = [write_jsonl(directory / f"{seed}.jsonl", [document(n, seed) for n in range(30)]) for seed in (1, 2)]
    train = write_jsonl(directory / "train.jsonl", [document(n, 3) for n in range(10)])
    config = DataConfig(train=[train], heldout=sources, heldout_fraction=0.0)
    prepare_data(config, tokenizer, directory / "data", progress=False)
    return directory


def make(run: Path, output: Path, *options: str) -> dict[str, list[Question]]:
    assert main(["make-task", str(run), "--out", str(output), *options]) == 0
    return {part: read_questions(output / f"{part}.jsonl") for part in PARTS}


def origin(text: str) -> tuple[str, list[int]]:
    """The document that all of its words are of, and their places."""
    words = [word.split(".") for word in text.split()]
    (name,) = {f"{seed}.{number}" for _, seed, number, _ in words}
    return name, [int(place) for *_, place in words]


def test_a_context_goes_on_in_its_answer_and_the_other_choices_are_of_other_documents(
    run: Path, tmp_path: Path
) -> None:
    for questions in make(run, tmp_path).values():
        assert len(questions) >= 60
        for question in questions:
            assert len(set(question.contexts)) == 1 and len(question.choices) == 4
            name, places = origin(question.contexts[0])
            names = []
            for number, choice in enumerate(question.choices):
                assert choice[0] == " " and len(choice.split()) == CHOICE_WORDS
                theirs, behind = origin(choice)
                names.append(theirs)
                if number == question.answer:
                    assert theirs == name and places + behind == list(range(places[0], behind[-1] + 1))
            assert len(set(names)) == 4 and len(places) == CONTEXT_WORDS


def test_no_document_is_on_both_sides_and_none_of_them_is_trained_on(run: Path, tmp_path: Path) -> None:
    texts = [
        {origin(text)[0] for question in questions for text in (*question.contexts, *question.choices)}
        for questions in make(run, tmp_path).values()
    ]
    assert texts[0].isdisjoint(texts[1]) and not any(name.startswith("3.") for side in texts for name in side)
    assert min(map(len, texts)) > 20  # the halves are not far from equal


def test_who_does_not_look_at_the_context_is_right_in_one_of_four(run: Path, tmp_path: Path) -> None:
    """The four questions of a group have the same choices, so any score of choices alone picks the same in all."""
    for questions in make(run, tmp_path).values():
        scores = [zlib.crc32(choice.encode()) for question in questions for choice in question.choices]
        assert Choices.of(questions).score(np.array(scores, float), normalize=False)[0] == 0.25
        lengths = [[len(choice) for choice in question.choices] for question in questions]
        assert np.mean([max(of_one) - min(of_one) for of_one in lengths]) < 0.5 * np.ptp(lengths)


def test_answers_are_at_every_place_equally_often(run: Path, tmp_path: Path) -> None:
    places = Counter(q.answer for number in range(5) for q in make(run, tmp_path, "--seed", str(number))["judge"])
    count = sum(places.values())
    assert len(places) == 4 and count > 300
    assert all(abs(found / count - 0.25) < 4 * (0.1875 / count) ** 0.5 for found in places.values())


def test_the_same_data_gives_the_same_bytes_and_another_seed_other_questions_on_the_same_sides(
    run: Path, tmp_path: Path
) -> None:
    of_seed = [
        make(run, tmp_path / str(n), "--seed", str(seed), "--questions", "30") for n, seed in enumerate((1, 1, 2))
    ]
    for part in PARTS:
        files = [(tmp_path / str(n) / f"{part}.jsonl").read_bytes() for n in range(3)]
        assert files[0] == files[1] != files[2]
        assert [len(made[part]) for made in of_seed] == [28, 28, 28]  # whole groups of four
    sides = [{q.contexts[0] for made in of_seed for q in made[part]} for part in PARTS]
    assert sides[0].isdisjoint(sides[1])


def test_what_gives_no_task_is_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["make-task", *arguments]) == 2
        return capsys.readouterr().err

    assert "3 questions are too few" in refused(str(run), "--questions", "3")
    assert "run `minitron prepare` first" in refused(str(tmp_path))
    few = tmp_path / "few"
    tokenizer = write_tokenizer(few / "teacher" / "tokenizer")
    text = write_jsonl(few / "text.jsonl", [document(n, 1) for n in range(4)])
    short = TextSource(str(few / "short.jsonl"))
    Path(short.path).write_text(json.dumps({"text": "too short"}) + "\n")
    prepare_data(
        DataConfig(train=[text], heldout=[short], heldout_fraction=0.0), tokenizer, few / "data", progress=False
    )
    message = refused(str(few))
    assert "too little held-out text for choose.jsonl" in message and message.count("\n") == 1
    prepared = json.loads((few / "data" / "prepared.json").read_text())
    (few / "data" / "prepared.json").write_text(json.dumps(prepared | {"tokenizer": "another"}))
    assert "prepared with another tokenizer" in refused(str(few))
    assert not (few / "task").exists()
