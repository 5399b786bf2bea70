"""Multiple-choice tasks: a question's answer is the choice that the model finds likeliest behind its context.

One JSON object a line; few-shot examples, where wanted, are part of the context:

    {"context": "The cup does not fit into the box. Too big is the", "choices": [" box", " cup"], "answer": 1}

A choice follows its context as it is, so it brings its own space. `context` may be a list with one for each choice, as
Winogrande needs, where the choices are in the middle and what follows them is scored. Tokens, with the first one that
some tokenizers add, and scores are those of lm-evaluation-harness's `multiple_choice`: `acc`, or `acc_norm` with
`normalize`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minitron_nemo.data.dataset import Sample
from minitron_nemo.data.documents import check_encodes
from minitron_nemo.data.tokenizer import Tokenizer
from minitron_nemo.errors import UserError

TOKENS_VERSION = 2  # raised whenever the same file gives other tokens than before


@dataclass(frozen=True)
class Question:
    contexts: tuple[str, ...]  # one for each choice
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """Raises UserError, naming file and line, for what is not there and what is no such task."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other ends of lines may stand within JSON's texts
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as a task, a jsonl file in UTF-8 ({error})") from None
    questions = [_question(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(f"{path}: no questions; a task is a jsonl file of context, choices and answer")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or not {"context", "choices", "answer"} <= record.keys():
        raise UserError(f"{where}: a question is an object with context, choices and answer")
    context, choices, answer = record["context"], record["choices"], record["answer"]
    if not _texts(choices) or len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise UserError(f"{where}: choices must be a list of two texts or more, none of them empty")
    contexts = context if isinstance(context, list) else [context] * len(choices)
    if not _texts(contexts) or len(contexts) != len(choices):
        raise UserError(f"{where}: context must be a text, or a list with one for each of the {len(choices)} choices")
    for text in (*contexts, *choices):
        check_encodes(text, where)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{where}: answer must be the place of the right choice, 0 to {len(choices) - 1}")
    return Question(tuple(contexts), tuple(choices), answer)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def choice_samples(questions: Sequence[Question], tokenizer: Tokenizer, most_tokens: int) -> list[Sample]:
    """A sample for each choice of each question in turn, of its own length, with weight 1 where it spells the choice.

    Its weighted cross-entropy is minus the log-probability of the choice. Context and choice are encoded as one text,
    and the choice is what is left of it behind as many tokens as the context has by itself: white space at the end of
    a context becomes part of the choice, since tokens begin with it. An empty context is the tokenizer's first token.
    Raises UserError for a sample of more than `most_tokens`.
    """
    samples = []
    for number, question in enumerate(questions, start=1):
        for context, choice in zip(question.contexts, question.choices, strict=True):
            before, after = _encoded(context, choice, tokenizer)
            ids = [*before, *after]
            if not after or len(ids) > most_tokens + 1:
                what = f"{len(ids)} tokens are more than the model takes" if after else "it adds no token"
                raise UserError(f"question {number}, choice {choice!r}: {what}; change it or leave the question out")
            weights = torch.zeros(len(ids) - 1)
            weights[len(before) - 1 :] = 1.0
            tokens = torch.tensor(ids)
            samples.append({"tokens": tokens[:-1], "labels": tokens[1:], "token_weights": weights, "id": str(number)})
    return samples


def _encoded(context: str, choice: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of context and choice, as lm-evaluation-harness parts them."""
    if context:
        before = tokenizer.encode_prompt(context.rstrip())
        return before or [tokenizer.prefix_id], tokenizer.encode_prompt(context + choice)[len(before) :]
    before, after = [tokenizer.prefix_id], tokenizer.encode_prompt(choice, add_special_tokens=False)
    return (before, after[1:]) if after[:1] == before else (before, after)


@dataclass(frozen=True, eq=False)
class Choices:
    """What scoring a task needs of it.

    Of questions, [questions]: how many choices, and the place of the right one. Of choices, all questions' in turn:
    characters without the space before them.
    """

    counts: NDArray[np.int64]
    answers: NDArray[np.int64]
    characters: NDArray[np.int64]

    @staticmethod
    def of(questions: Sequence[Question]) -> Choices:
        return Choices(
            np.array([len(question.choices) for question in questions]),
            np.array([question.answer for question in questions]),
            np.array([len(choice.lstrip()) for question in questions for choice in question.choices]),
        )

    def right(self, log_probabilities: NDArray[np.float64], normalize: bool) -> NDArray[np.bool_]:
        """Whether each question's answer is the likeliest choice, [questions]; ties go to the first.

        `log_probabilities` [choices]. With `normalize` they are divided by the choice's characters.
        """
        return np.array([values.argmax() == answer for values, answer in self._questions(log_probabilities, normalize)])

    def score(self, log_probabilities: NDArray[np.float64], normalize: bool) -> tuple[float, float]:
        """Accuracy, and the mean margin of the right choice over the best wrong one, in nats; see `right`."""
        margins = sum(
            float(values[answer] - np.delete(values, answer).max())
            for values, answer in self._questions(log_probabilities, normalize)
        )
        return float(self.right(log_probabilities, normalize).mean()), margins / len(self.answers)

    def _questions(
        self, log_probabilities: NDArray[np.float64], normalize: bool
    ) -> Iterator[tuple[NDArray[np.float64], int]]:
        """What the choices of each question are compared by, and the place of the right one."""
        values = log_probabilities / self.characters if normalize else log_probabilities
        ends = np.cumsum(self.counts)
        for start, end, answer in zip(ends - self.counts, ends, self.answers, strict=True):
            yield values[start:end], int(answer)
