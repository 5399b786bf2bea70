"""Files that are damaged, missing, or directories, and places that take none: one line that names them, exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_nemo.checkpoint.fingerprint import CACHE_FILE, fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.cli import main
from minitron_nemo.config import TextSource, recipe_of
from minitron_nemo.data.documents import read_documents
from minitron_nemo.errors import UserError
from minitron_nemo.measuring import measure_tasks
from tests.importance.synthetic import architecture, random_values, scores_from
from tests.pool import run_distributed
from tests.report.runs import write_run
from tests.tiny import write_tiny_llama

TORN = '{"schema_version": 3, "mod'
NOT_UTF8 = "not UTF-8"  # stands for a byte that is none
DAMAGES = [TORN, "[]", NOT_UTF8, None]  # None: a directory of that name


def damage(path: Path, content: str | None) -> None:
    if path.is_file():
        path.unlink()
    if content is None:
        path.mkdir(parents=True, exist_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff" if content == NOT_UTF8 else content.encode())


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a command refuses with."""

    def call(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("minitron: error: ") and error.count("\n") == 1, error
        return error

    return call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    convert(write_tiny_llama(tmp_path / "hf"), tmp_path / "checkpoint", "megatron", progress=False)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("content", DAMAGES)
@pytest.mark.parametrize("name", ["architecture.json", "fingerprints.json", "tokenizer/tokenizer.json"])
def test_a_damaged_part_of_a_checkpoint_is_named(
    checkpoint: Path, said: Callable[..., str], name: str, content: str | None
) -> None:
    damage(checkpoint / name, content)
    if name == "tokenizer/tokenizer.json" and content is None:
        return  # then it has none
    line = said(*(["inspect"] if name != CACHE_FILE else ["verify"]), checkpoint)
    assert f"{checkpoint / name}: " in line


@pytest.mark.parametrize("content", [TORN, "[]", NOT_UTF8])
def test_damaged_fingerprints_are_no_fingerprint(checkpoint: Path, content: str) -> None:
    right = fingerprint(checkpoint)
    damage(checkpoint / CACHE_FILE, content)
    with pytest.raises(UserError, match=f"{CACHE_FILE}: .*; remove it, and the weights are read again"):
        fingerprint(checkpoint)
    (checkpoint / CACHE_FILE).unlink()
    assert fingerprint(checkpoint) == right


@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_plan_is_named(checkpoint: Path, said: Callable[..., str], content: str | None) -> None:
    damage(checkpoint.parent / "plan.json", content)
    assert f"{checkpoint.parent}/plan.json: " in said(
        "verify", checkpoint.parent / "hf", checkpoint, "--plan", checkpoint.parent / "plan.json"
    )


def test_a_recipe_below_a_file_is_not_there(tmp_path: Path, said: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file/recipe.yaml: not readable as YAML" in said("plan", tmp_path / "file" / "recipe.yaml")


@pytest.mark.parametrize("content", [*DAMAGES, '{"schema_version": 1}', '{"schema_version": 1, "sources": [1]}'])
def test_damaged_prepared_data_is_named(tmp_path: Path, said: Callable[..., str], content: str | None) -> None:
    damage(tmp_path / "data" / "prepared.json", content)
    line = said("make-task", tmp_path)
    assert f"{tmp_path}/data/prepared.json: " in line and "run `minitron prepare` again" in line


@pytest.mark.parametrize("content", [*DAMAGES, '{"student": 3}'])
def test_a_damaged_evaluation_is_named(tmp_path: Path, said: Callable[..., str], content: str | None) -> None:
    damage(tmp_path / "evaluation.json", content)
    line = said("compare", tmp_path)
    assert f"{tmp_path}/evaluation.json" in line or (content is None and "no evaluation.json in it" in line)


@pytest.mark.parametrize("content", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "status.json", "evaluation.json", "tasks.json", "search/table.json"])
@pytest.mark.fast_cases(13)
def test_a_damaged_part_of_a_run_is_named(
    tmp_path: Path, said: Callable[..., str], name: str, content: str | None
) -> None:
    run = write_run(tmp_path / "run", updates=4)
    damage(run / name, content)
    assert f"{run / name}: " in said("report", run)


def test_what_cannot_be_read_is_named_and_not_the_place_it_was_for(
    checkpoint: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permission and disk errors, which root does not get by itself."""
    text = checkpoint.parent / "text.jsonl"
    text.write_text('{"text": "a"}\n')

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("minitron_nemo.checkpoint.tensor_io.os.preadv", refuse)
    line = said("convert", checkpoint.parent / "hf", checkpoint.parent / "out", "--to", "hf")
    assert f"{checkpoint.parent}/hf/model.safetensors: cannot be read: Input/output error; copy it again" in line
    assert not list(checkpoint.parent.glob("out*"))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=f"{text}: cannot be read: Input/output error"):
        list(read_documents(TextSource(path=str(text)))[1])


def test_scores_that_cannot_be_written_where_they_shall_be_are_not_merged(
    tmp_path: Path, said: Callable[..., str]
) -> None:
    scores = scores_from(random_values(architecture()), architecture())
    measured = replace(scores, sample_ids=("a",), settings={"precision": "fp32", "samples": 1})
    measured.save(tmp_path / "scores.npz")
    (tmp_path / "file").write_text("")
    for out in ("nowhere/all.npz", "file/all.npz"):
        line = said("merge-scores", tmp_path / "scores.npz", "--out", tmp_path / out)
        assert f"{tmp_path / out}: cannot be written: " in line
    for damaged in (tmp_path, tmp_path / "file", tmp_path / "nowhere"):
        assert f"{damaged}: " in said("merge-scores", tmp_path / "scores.npz", damaged, "--out", tmp_path / "all.npz")


def test_a_place_that_takes_no_results_is_refused_before_anything_is_measured(checkpoint: Path) -> None:
    recipe = recipe_of(["evaluate.tasks=[no-task]"])
    for out, words in (("nowhere/tasks.json", "no such directory"), (".", "a directory")):
        with pytest.raises(UserError, match=f"--out .*: {words}; give another file"):
            run_distributed(1, measure_tasks, [checkpoint], recipe, checkpoint.parent / out)
