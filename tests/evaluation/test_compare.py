"""Models side by side: paired differences against numpy by hand, and what cannot be paired is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.cli import main
from minitron_nemo.config import DataConfig, TextSource, recipe_of
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.compare import compared, measured
from minitron_nemo.measuring import compare_recorded
from minitron_nemo.parallel.layout import Layout
from tests.data.corpus import make_texts, prepare, write_jsonl, write_tokenizer
from tests.models.support import TinyModel
from tests.pool import run_distributed
from tests.text import write_documents
from tests.tiny import write_tiny_llama


def _run(directory: Path, losses: dict[str, list[float]], answers: dict[str, list[int]], **changed: Any) -> Path:
    """A run directory with what `evaluate` and `tasks` leave there."""
    directory.mkdir(parents=True)
    figures = {"parameters": 2_000_000, "loss_se": 0.1, "perplexity": 9.0, "kl_to_teacher": 0.25}
    figures |= {"kl_to_teacher_se": 0.01, "top1_agreement": 0.75, "documents": "d0c5"} | changed
    evaluation = {
        name: {**figures, "loss": float(np.mean(values)), "losses_per_document": values}
        for name, values in losses.items()
    }
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    on_tasks = {
        name: {
            "tasks": {
                "opposites": {
                    "fingerprint": "a5c",
                    "questions": len(values),
                    "metrics": {"acc": {"value": float(np.mean(values)), "se": 0.2}},
                    "by_question": {"acc": values},
                }
            }
        }
        for name, values in answers.items()
    }
    if answers:
        (directory / "tasks.json").write_text(json.dumps({"schema_version": 1, "models": on_tasks}))
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    one = _run(
        tmp_path / "one",
        {"teacher": [1.0, 2.0, 4.0], "distilled": [1.5, 2.25, 4.75]},
        {"teacher": [1, 1, 0, 1], "distilled": [1, 0, 0, 1]},
    )
    return [one, _run(tmp_path / "two", {"distilled": [1.25, 2.0, 4.5]}, {})]


def test_differences_are_paired_across_runs(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    against = f"{runs[0]}/distilled"
    assert main(["compare", *map(str, runs), "--against", against, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"] == against and found["documents"] == "d0c5"
    assert list(found["models"]) == [f"{runs[0]}/teacher", against, f"{runs[1]}/distilled"]
    difference = np.array([1.25, 2.0, 4.5]) - np.array([1.5, 2.25, 4.75])
    other = found["models"][f"{runs[1]}/distilled"]
    assert other["delta"] == pytest.approx(difference.mean())
    assert other["delta_se"] == pytest.approx(difference.std(ddof=1) / 3**0.5)
    assert other["tasks"] == {}
    teacher = found["models"][f"{runs[0]}/teacher"]["tasks"]["opposites"]["acc"]
    assert teacher["value"] == 0.75 and teacher["delta"] == pytest.approx(0.25)
    assert teacher["delta_se"] == pytest.approx(np.std([0, 1, 0, 0], ddof=1) / 2)


def test_the_table_has_a_row_for_each_model(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, runs)]) == 0
    head, _, teacher, one, two = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    )
    assert head == ["", "parameters", "loss", "difference", "KL", "top-1 agreement", "opposites, acc"]
    assert teacher == [f"{runs[0]}/teacher", "2.0 M", "2.3333 ± 0.1000", "", "0.2500", "75.0 %", "0.7500 ± 0.2000"]
    assert one[3] == "+0.5000 ± 0.1443" and one[6] == "0.5000 ± 0.2000 (-0.2500 ± 0.2500)"
    assert two[3] == "+0.2500 ± 0.1443" and two[6] == ""


def test_a_model_whose_loss_is_not_finite_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "run", {"teacher": [1.0, 2.0], "pruned": [800.0, 900.0], "distilled": [1.5, 2.0]}, {})
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["pruned"]["perplexity"] = None  # which is infinite
    evaluation["distilled"] |= {"loss": None, "losses_per_document": [1.5, None], "perplexity": None}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert main(["compare", str(run)]) == 0
    pruned, distilled = (line.split("|") for line in capsys.readouterr().out.splitlines()[3:])
    assert (pruned[3].strip(), pruned[4].strip()) == ("850.0000 ± 0.1000", "+848.5000 ± 49.5000")
    assert distilled[4].strip() == "+nan ± nan"
    assert main(["compare", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["models"]
    assert (found[f"{run}/pruned"]["loss"], found[f"{run}/pruned"]["perplexity"]) == (850.0, None)
    assert found[f"{run}/distilled"]["delta"] is None


def test_a_task_whose_value_is_not_finite_has_a_cell(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    tasks = json.loads((runs[0] / "tasks.json").read_text())
    record = tasks["models"]["distilled"]["tasks"]["opposites"]
    record["metrics"]["acc"], record["by_question"]["acc"][2] = {"value": None, "se": None}, None
    (runs[0] / "tasks.json").write_text(json.dumps(tasks))
    assert main(["compare", str(runs[0])]) == 0
    assert capsys.readouterr().out.splitlines()[3].split("|")[7].strip() == "nan (+nan ± nan)"
    assert main(["compare", str(runs[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["models"]
    assert found[f"{runs[0]}/distilled"]["tasks"]["opposites"]["acc"] == dict.fromkeys(
        ("value", "se", "delta", "delta_se")
    )


def test_what_cannot_be_paired_is_refused_in_one_line(runs: list[Path], tmp_path: Path) -> None:
    other = _run(tmp_path / "other", {"pruned": [1.0, 2.0, 3.0]}, {}, documents="e15e")
    with pytest.raises(UserError, match=r"other/pruned: measured on other documents than .*one/teacher, .*--data"):
        compare_recorded([runs[0], other], None, False)
    tasks = json.loads((runs[0] / "tasks.json").read_text())
    tasks["models"]["distilled"]["tasks"]["opposites"]["fingerprint"] = "other"
    (runs[0] / "tasks.json").write_text(json.dumps(tasks))
    with pytest.raises(UserError, match=r"one/distilled: task opposites is not the one"):
        compare_recorded(runs, None, False)
    old = json.loads((runs[1] / "evaluation.json").read_text())
    del old["distilled"]["documents"]
    (runs[1] / "evaluation.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"two/distilled: .* run `minitron evaluate` again"):
        compare_recorded([runs[1]], None, False)
    with pytest.raises(UserError, match=r"--against: nobody is not one of .*two/distilled"):
        compare_recorded([runs[1]], "nobody", False)
    with pytest.raises(UserError, match=r"no evaluation\.json in it; to measure checkpoints, .*--data"):
        compare_recorded([tmp_path], None, False)
    (runs[1] / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: not valid JSON.*; run `minitron evaluate` again"):
        compare_recorded([runs[1]], None, False)


def _recorded(run: Path, evaluated: str, on_tasks: str, distilled: str) -> None:
    """The manifest of a run, and the student's fingerprints: as it was measured, on tasks, and as it is."""
    made = {"key": "4" * 64, "output": distilled}
    steps = {"distill": made, "evaluate": {"inputs": {"teacher": "7" * 64, "distilled": evaluated}}}
    (run / "manifest.json").write_text(json.dumps({"schema_version": 1, "steps": steps}))
    tasks = json.loads((run / "tasks.json").read_text())
    tasks["models"]["distilled"]["fingerprint"] = on_tasks
    (run / "tasks.json").write_text(json.dumps(tasks))


def test_figures_of_an_earlier_student_are_refused(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Also where only one of loss and tasks is: a row would be of two models."""
    old, new = "0" * 64, "1" * 64
    words = "distilled was measured before the last distill; run `minitron {}` again when that is done"
    for one in (runs[0], runs[0] / "evaluation.json"):
        _recorded(runs[0], evaluated=old, on_tasks=new, distilled=new)
        assert main(["compare", str(runs[1]), str(one)]) == 2
        assert f"{runs[0]}/evaluation.json: {words.format('evaluate')}" in capsys.readouterr().err
        _recorded(runs[0], evaluated=new, on_tasks=old, distilled=new)
        assert main(["compare", str(runs[1]), str(one)]) == 2
        assert f"{runs[0]}/tasks.json: {words.format('tasks')}" in capsys.readouterr().err
        _recorded(runs[0], evaluated=new, on_tasks=new, distilled=new)
        assert main(["compare", str(runs[1]), str(one)]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.precision=fp16", "train.precision: 'fp16' is not one of bf16, fp32"),
        ("evaluate.documents=0", "evaluate.documents: 0 must be greater than 0"),
        ("evaluate.micro_batch_size=0", "evaluate.micro_batch_size: 0 must be greater than 0"),
    ],
)
def test_values_are_checked_without_a_chain_too(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["compare", str(tmp_path), "--data", str(tmp_path)], ["tasks", str(tmp_path), "--tasks", "x"]):
        assert main([*arguments, change]) == 2
        assert capsys.readouterr().err == f"minitron: error: {message}\n"


def test_changes_without_data_are_refused(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs[0]), "evaluate.documents=3"]) == 2
    assert "compare: evaluate.documents=3 changes what is measured, and nothing is" in capsys.readouterr().err


def _measured(models: dict[str, Path], prepared: Path, layout: Layout, against: str) -> Any:
    options = ["evaluate.documents=4", "evaluate.sequence_length=32", "train.precision=fp32"]
    return measured(models, prepared, recipe_of(options), layout, against)


def test_documents_are_not_longer_than_any_model_was_trained_on(tmp_path: Path) -> None:
    text = [write_jsonl(tmp_path / "text.jsonl", make_texts(20, seed=1))]
    prepared = prepare(DataConfig(train=text, heldout_fraction=0.5), tmp_path)
    models = {name: tmp_path / name for name in ("long", "short", "middle")}
    architecture = open_source(write_tiny_llama(tmp_path / "model")).architecture
    for positions, directory in zip((512, 64, 128), models.values(), strict=True):
        write_tokenizer(directory / "tokenizer")
        replace(architecture, max_position_embeddings=positions).save(directory)
    for length, options in ((8192, []), (65, ["evaluate.sequence_length=65"]), (-5, ["evaluate.sequence_length=-5"])):
        words = f"^evaluate.sequence_length: {length} is not within the 64 positions of short; give evaluate.sequence_"
        with pytest.raises(UserError, match=words):
            measured(models, prepared, recipe_of(options), Layout(), "long")


@pytest.mark.slow
def test_checkpoints_are_measured_against_the_one_that_is_named(tmp_path: Path) -> None:
    tiny = {name: TinyModel(tmp_path / name, tied=tied) for name, tied in (("one", False), ("two", True))}
    config = DataConfig(train=[TextSource(str(write_documents(tmp_path / "text")))], heldout_fraction=0.2)
    prepare_data(config, tiny["one"].huggingface, tmp_path / "data")
    models = {name: model.megatron for name, model in tiny.items()}
    layout = Layout(pipeline_model_parallel_size=2)
    first, second = run_distributed(2, _measured, models, tmp_path / "data", layout, "two")
    assert first == second and list(first) == ["one", "two"]
    found = compared(first, "two")["models"]
    assert found["two"]["kl_to_teacher"] < 1e-9 < found["one"]["kl_to_teacher"]
    assert found["one"]["delta"] == pytest.approx(found["one"]["loss"] - found["two"]["loss"])
    assert len(first["one"]["losses_per_document"]) == 4

    tokenizer = models["two"] / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|pad|>", "<|fill|>"))
    config_file = tokenizer.with_name("tokenizer_config.json")
    config_file.write_text(config_file.read_text().replace("<|pad|>", "<|fill|>"))
    with pytest.raises(UserError, match="two: its tokenizer is not the one that .*data was prepared with"):
        run_distributed(1, _measured, models, tmp_path / "data", Layout(), "two")
