"""lm-evaluation-harness on our models: its tasks, with every request answered on whatever layout the job has.

Imports `lm_eval`, of the extra `eval`; what does not need it must not import this module.

All ranks walk through the harness with the same requests, and each answers its share of them: to the harness the whole
job is one process. Text becomes tokens as in its own adapter of Hugging Face models, so that accuracies are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from inspect import getsource, getsourcefile
from pathlib import Path
from typing import Any

import numpy as np
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state
from torch import distributed
from transformers import AutoTokenizer
from yaml import YAMLError

from minitron_nemo.checkpoint import tokenizer
from minitron_nemo.data.tokenizer import encode_prompt, prefix_id
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.scoring import Continuation, log_likelihoods
from minitron_nemo.evaluation.task import Record, progress, record_of
from minitron_nemo.models.build import Model
from minitron_nemo.models.generation import generate

MOST_NEW_TOKENS = 256  # where a task does not say; the harness's own
FEWSHOT_SEED = 1234  # the harness's own
BOOTSTRAPS = 1000  # for standard errors of what is no mean

WRONG = (KeyError, ValueError, TypeError, AttributeError, OSError, YAMLError, TemplateError, DatasetsError)  # in a task


class MegatronLM(TemplateLM):
    """A loaded model as the harness sees it."""

    def __init__(self, model: Model, directory: Path, micro_batch_size: int = 1) -> None:
        """`directory` is the checkpoint that the tokenizer is read from."""
        super().__init__()
        files = tokenizer.directory_of(directory)
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(files, local_files_only=True)
        self.max_length = model.architecture.max_position_embeddings
        self.micro_batch_size = micro_batch_size
        ends = tokenizer.special_ids(files).get("eos_token_id", self.eot_token_id)
        self._ends = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands where there is no context."""
        first = prefix_id(self.tokenizer)
        return self.eot_token_id if first is None else first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids, with what the tokenizer adds by itself unless told otherwise; never with two first tokens."""
        return encode_prompt(self.tokenizer, string, self.prefix_token_id, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Continuation.of(context, continuation, self.max_length) for _, context, continuation in requests]
        with progress("log-likelihoods", len(pairs)) as advance:
            return log_likelihoods(self.model, pairs, self.micro_batch_size, advance)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows that each predict tokens of their own."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [("", *make_disjoint_window(piece)) for piece in pieces]
            windows += own
            counts.append(len(own))
        values = iter(self._loglikelihood_tokens(windows))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations of each context, up to the first of its stop strings or the end of the text.

        Raises UserError for a task that asks for samples.
        """
        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        prepared = [self._prepared(*request.args) for request in requests]
        order = sorted(range(len(prepared)), key=lambda number: (repr(prepared[number][1:]), -len(prepared[number][0])))
        mine: dict[int, str] = {}
        with progress("generations", len(order)) as advance:
            for start in range(0, len(order), size * self.micro_batch_size):
                together = order[start : start + size * self.micro_batch_size]
                alike: dict[int, list[int]] = {}
                for number in together[rank::size]:
                    alike.setdefault(prepared[number][2], []).append(number)
                for new_tokens, numbers in alike.items():
                    mine |= dict(zip(numbers, self._generated(prepared, numbers, new_tokens), strict=True))
                advance(len(together))
        everyones: list[Any] = [None] * size
        distributed.all_gather_object(everyones, mine, group=parallel_state.get_data_parallel_group())
        texts = {number: text for part in everyones for number, text in part.items()}
        return [texts[number] for number in range(len(requests))]

    def _prepared(self, context: str, options: dict[str, Any]) -> tuple[list[int], list[str], int]:
        """Tokens of the context, cut from the left to leave room; stop strings; most new tokens."""
        chosen = normalize_gen_kwargs(options, MOST_NEW_TOKENS)
        if chosen.get("do_sample") or chosen.get("temperature"):
            raise UserError(
                f"a task asks for samples ({options}); only greedy generation is supported: do_sample: false"
            )
        new_tokens = int(chosen["max_gen_toks"])
        room = self.max_length - new_tokens
        if room <= 0:
            raise UserError(f"a task asks for {new_tokens} new tokens, and the model takes {self.max_length} in all")
        stops = handle_stop_sequences(chosen.get("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        return self.tok_encode(context)[-room:], stops, new_tokens

    def _generated(self, prepared: Sequence[Any], numbers: Sequence[int], new_tokens: int) -> list[str]:
        stops = {text for number in numbers for text in prepared[number][1] if text}

        def ends(new: Sequence[int]) -> bool:
            return new[-1] in self._ends or any(stop in self._text(new) for stop in stops)

        rows = generate(self.model, [prepared[number][0] for number in numbers], new_tokens, ends)
        texts = zip((self._text(row) for row in rows), numbers, strict=True)
        return [postprocess_generated_text(text, prepared[number][1], None) for text, number in texts]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness: `task` is its object."""

    name: str
    fingerprint: str
    task: Any

    def measure(self, model: Model, directory: Path, micro_batch_size: int) -> Record:
        """What the harness measures. Collective; every rank gets the same."""
        adapter = MegatronLM(model, directory, micro_batch_size)
        self.task.set_fewshot_seed(seed=FEWSHOT_SEED)
        found = evaluate(adapter, {"tasks": {self.name: self.task}}, bootstrap_iters=BOOTSTRAPS)
        samples = sorted(found["samples"][self.name], key=lambda sample: int(sample["doc_id"]))
        results = found["results"][self.name]
        values = {
            key: float(value)
            for key, value in results.items()
            if "," in key and "_stderr," not in key and isinstance(value, (int, float))
        }
        errors = {key: _number(results.get(key.replace(",", "_stderr,", 1))) for key in values}
        by_question = {_metric(key): _by_question(samples, key, value) for key, value in values.items()}
        return record_of(
            len({sample["doc_id"] for sample in samples}),
            {_metric(key): (value, errors[key]) for key, value in values.items()},
            {name: numbers for name, numbers in by_question.items() if numbers},
        )


def open_harness_tasks(spec: str) -> list[HarnessTask]:
    """The tasks of a .yaml file, whose data files may be named from where it lies, or of a name that the harness knows.

    Raises UserError for what it does not take.
    """
    path = Path(spec).resolve()  # it is read from another directory
    manager = TaskManager(include_defaults=not path.is_file())
    try:
        with _in_directory(path.parent if path.is_file() else Path.cwd()):
            tasks = manager.load([str(path) if path.is_file() else spec])["tasks"]
    except WRONG as error:
        raise UserError(f"evaluate.tasks: {spec}: {' '.join(str(error).split())[:300]}") from None
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return [HarnessTask(name, _fingerprint(task), task) for name, task in tasks.items()]


def _fingerprint(task: Any) -> str:
    """Of the harness's version, all settings whatever file they are from, code, every question and every example."""
    settings = {**task.config.to_dict(keep_callable=True), "class": type(task)}
    if isinstance(settings.get("metadata"), dict):
        settings["metadata"].pop("config_source", None)  # where the file lies
    examples = task.fewshot_docs() if task.get_config("num_fewshot") else ()
    documents = [repr(sorted(document.items())) for part in (task.eval_docs, examples or ()) for document in part]
    content = json.dumps([version("lm_eval"), settings, documents], default=_definition)
    return hashlib.sha256(content.encode()).hexdigest()


def _definition(value: Any) -> Any:
    """What stands for a setting that is not JSON: code with the file around it, which holds what the code calls.

    Never an address in memory: every process has to say the same.
    """
    if isinstance(value, partial):
        return ["partial", value.func, value.args, value.keywords]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    try:
        return [getsource(value), Path(str(getsourcefile(value))).read_text(encoding="utf-8")]
    except (TypeError, OSError):  # an object, or what is not written in Python
        if hasattr(value, "__qualname__"):
            return [getattr(value, "__module__", None), value.__qualname__]
        return [type(value), vars(value) if hasattr(value, "__dict__") else repr(value)]


def _metric(key: str) -> str:
    """METRIC,FILTER of the harness; its filter `none` is not spelt out."""
    name, _, chosen = key.partition(",")
    return name if chosen == "none" else f"{name}@{chosen}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _by_question(samples: Sequence[Mapping[str, Any]], key: str, value: float) -> list[float]:
    """The numbers of the questions, one each, that `value` is the mean of; none where it is not made in this way.

    A perplexity is not the mean of the log-likelihoods that the harness calls by its name.
    """
    name, _, chosen = key.partition(",")
    found = [sample.get(name) for sample in samples if sample["filter"] == chosen]
    numbers = [float(each) for each in found if isinstance(each, (int, float))]
    if not numbers or len(numbers) < len(found):
        return []
    return numbers if np.isclose(np.mean(numbers), value, rtol=1e-9, atol=1e-12, equal_nan=True) else []


@contextmanager
def _in_directory(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)
