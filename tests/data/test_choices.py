"""Tasks: what is refused, which tokens are a choice, and which choice wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends
from transformers import PreTrainedTokenizerFast

from minitron_nemo.data.choices import Choices, Question, choice_samples, read_questions
from minitron_nemo.data.tokenizer import Tokenizer
from minitron_nemo.errors import UserError

GOOD: dict[str, Any] = {"context": "a", "choices": [" b", " c"], "answer": 1}
BAD = {
    "not json": ("{", r"task.jsonl:2: not JSON"),
    "a list": ("[]", r"task.jsonl:2: a question is an object with context, choices and answer"),
    "no answer": ('{"context": "a", "choices": ["b", "c"]}', "object with context, choices and answer"),
    "one choice": (json.dumps(GOOD | {"choices": [" b"]}), "choices must be a list of two texts or more"),
    "an empty choice": (json.dumps(GOOD | {"choices": ["b", " "]}), "none of them empty"),
    "a number": (json.dumps(GOOD | {"choices": ["b", 3]}), "choices must be a list of two texts"),
    "contexts": (json.dumps(GOOD | {"context": ["a", "b", "c"]}), "one for each of the 2 choices"),
    "no text": (json.dumps(GOOD | {"context": 3}), "context must be a text"),
    "half a character": (json.dumps(GOOD | {"context": "\ud83d"}), "half of a surrogate pair"),
    "answer outside": (json.dumps(GOOD | {"answer": 2}), "answer must be the place of the right choice, 0 to 1"),
    "answer as text": (json.dumps(GOOD | {"answer": "0"}), "answer must be the place"),
    "answer as bool": (json.dumps(GOOD | {"answer": True}), "answer must be the place"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_by_file_and_number(name: str, tmp_path: Path) -> None:
    line, message = BAD[name]
    (tmp_path / "task.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(UserError, match=message) as error:
        read_questions(tmp_path / "task.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"\n\n"])
def test_a_file_without_questions_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"task\.jsonl: (not readable|no questions)"):
        read_questions(tmp_path / "task.jsonl")
    with pytest.raises(UserError, match=r"nowhere\.jsonl: not readable as a task"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_a_context_is_for_all_choices_or_one_for_each(tmp_path: Path) -> None:
    each = GOOD | {"context": ["x", "y"], "choices": [" z", " z"]}
    (tmp_path / "task.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(each)}\n")
    assert read_questions(tmp_path / "task.jsonl") == [
        Question(("a", "a"), (" b", " c"), 1),
        Question(("x", "y"), (" z", " z"), 1),
    ]


def merging_tokenizer() -> Tokenizer:
    """Letters, and one token each for " b" and "ab": tokens reach over the border of two texts."""
    vocabulary = {letter: number for number, letter in enumerate("abcĠ")} | {"Ġb": 4, "ab": 5}
    backend = Backend(backends.BPE(vocab=vocabulary, merges=[("Ġ", "b"), ("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"), separator_id=6)


def ids_and_weights(context: str, choice: str) -> tuple[list[int], list[float]]:
    question = Question((context, context), (choice, "c"), 0)
    sample = choice_samples([question], merging_tokenizer(), most_tokens=4)[0]
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])], sample["token_weights"].tolist()


def test_a_choice_is_what_is_left_of_the_whole_text_behind_the_contexts_tokens() -> None:
    assert ids_and_weights("a", " b") == ([0, 4], [1.0])
    assert ids_and_weights("a ", "b") == ([0, 4], [1.0])  # the space belongs to the token behind it
    assert ids_and_weights("ca", "bcc") == ([2, 0, 2, 2], [0.0, 1.0, 1.0])  # "ab" is one token of the whole text
    assert ids_and_weights("", "bc") == ([6, 1, 2], [1.0, 1.0])  # behind the end token: there is no first one


def test_lines_end_where_jsonl_has_them_end(tmp_path: Path) -> None:
    """Not within a text; and a mark of the byte order, which editors write, is no part of the first."""
    question = GOOD | {"context": "one\u2028two\u0085three"}
    line = json.dumps(question, ensure_ascii=False)
    (tmp_path / "task.jsonl").write_bytes(f"\ufeff{line}\r\n{json.dumps(GOOD)}\n".encode())
    assert [one.contexts[0] for one in read_questions(tmp_path / "task.jsonl")] == [question["context"], "a"]


def test_choices_without_tokens_and_too_long_ones_are_refused() -> None:
    with pytest.raises(UserError, match="question 1, choice 'b': it adds no token"):
        ids_and_weights("a", "b")
    with pytest.raises(UserError, match="question 1, choice 'cccc': 6 tokens are more than the model takes"):
        ids_and_weights("cc", "cccc")


def test_the_likeliest_choice_wins_and_ties_go_to_the_first() -> None:
    questions = [
        Question(("",) * 2, (" a", " bb"), 0),
        Question(("",) * 3, (" a", " a", " a"), 1),
        Question(("",) * 2, (" a", " bbbb"), 1),
    ]
    values = np.array([-1.0, -3.0, -2.0, -2.0, -2.5, -2.0, -4.0])
    accuracy, margin = Choices.of(questions).score(values, normalize=False)
    assert accuracy == pytest.approx(1 / 3)  # the tie of the second is lost, the third choice is less likely
    assert margin == pytest.approx((2.0 + 0.0 - 2.0) / 3)
    # By character, without the space: -1 and -1.5, the same tie, -2 and -1.
    accuracy, margin = Choices.of(questions).score(values, normalize=True)
    assert accuracy == pytest.approx(2 / 3)
    assert margin == pytest.approx((0.5 + 0.0 + 1.0) / 3)
