"""Another run's training beside this one's: tokens by hand, and nothing is compared that was measured on other text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_nemo.cli import main
from minitron_nemo.errors import UserError
from minitron_nemo.report.page import write_report
from tests.report.reading import html, sentences
from tests.report.runs import KEY, RECIPE, write_documents, write_status

OTHER = "f" * 64


def write_training(directory: Path, losses: dict[int, float], name: str = "distilled") -> Path:
    """A run that is distilling, of 100 tokens an update, with held-out losses by update."""
    records = [
        {"iteration": iteration, **values}
        for iteration, loss in losses.items()
        for values in ({"train/ce": loss, "data/tokens": 100 * iteration}, {"validation/loss": loss})
    ]
    training = directory / "training" / f"{name}-01234567"
    training.mkdir(parents=True, exist_ok=True)
    (training / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_status(directory, "running", "distill")
    (directory / "recipe.yaml").write_text(RECIPE)
    write_documents(directory / "data")
    return directory


@pytest.mark.slow
def test_a_baseline_is_compared_by_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    write_training(run, {10: 3.0, 20: 2.5, 30: 2.4, 40: 2.4})
    assert "needed" not in " ".join(sentences(html(write_report(run)), "training"))
    write_training(other, {30: 3.0, 60: 2.6, 90: 2.4, 120: 2.3})
    assert main(["report", str(run), "--baseline", str(other)]) == 0
    said = sentences(html(run / "report.html"), "training")
    words = "2.4000 nats per token after 3,000 tokens; the baseline needed 9,000, 3 times as many."
    assert any(each.endswith(words) for each in said)
    write_training(other, {30: 3.0, 60: 2.6})  # distillation was below that after its second validation
    said = sentences(html(write_report(run, other)), "training")
    words = "2.6000 nats per token after 2,000 tokens; the baseline needed 6,000, 3 times as many."
    assert any(f"{words} The 2.4000 that distillation ended with" in each for each in said)
    write_training(other, {})
    capsys.readouterr()
    assert main(["report", str(run), "--baseline", str(other)]) == 2
    assert f"--baseline {other}: no training in it has held-out losses" in capsys.readouterr().err
    assert main(["report", str(run), "--baseline", str(tmp_path)]) == 2
    assert f"{tmp_path}: not a run directory" in capsys.readouterr().err


def test_a_validation_before_the_first_report_is_not_compared(tmp_path: Path) -> None:
    """How many tokens it came after is not known yet."""
    run, other = write_training(tmp_path / "run", {}), write_training(tmp_path / "other", {30: 3.0, 60: 2.6})
    [metrics] = run.glob("training/*/metrics.jsonl")
    metrics.write_text(json.dumps({"iteration": 10, "validation/loss": 2.5}) + "\n")
    said = sentences(html(write_report(run, other)), "training")
    assert "The distillation has not reported anything yet." in said and "needed" not in " ".join(said)
    with pytest.raises(UserError, match="no training in it has held-out losses yet; .* wait for its first report"):
        write_report(other, run)


def test_the_tokens_of_the_correction_are_named(tmp_path: Path) -> None:
    """Also of one that another run made, whose teacher is borrowed."""
    run = write_training(tmp_path / "run", {10: 3.0, 30: 2.4})
    other = write_training(tmp_path / "other", {30: 3.0, 90: 2.4})
    words = (
        "needed 9,000, 3 times as many. Before, the teacher's correction and earlier stages took 2,000 tokens, and the "
        "baseline's {}: with these it is {} times as many."
    )

    def said() -> str:
        return " ".join(sentences(html(write_report(run, other)), "training")).replace("&#39;", "'")

    write_training(run, {20: 3.5}, "corrected")
    assert words.format(0, 1.8) in said()  # 9,000 / (3,000 + 2,000)
    write_training(other, {10: 3.5}, "corrected")
    assert words.format("1,000", 2) in said()  # 10,000 / 5,000
    (run / "training" / "corrected-01234567" / "metrics.jsonl").unlink()
    lender = write_training(tmp_path / "lender", {20: 3.5}, "corrected")
    (run / "recipe.yaml").write_text(f"{RECIPE}from_run: {lender}\n")
    assert words.format("1,000", 2) in said()


@pytest.mark.parametrize(
    ("heldout", "changed", "words"),
    [
        (OTHER, "", "its held-out documents are not those of"),
        (KEY, "evaluate: {documents: 7}\n", "its evaluate.documents are not those of"),
        (KEY, "evaluate: {sequence_length: 512}\n", "its evaluate.sequence_length are not those of"),
        (OTHER, "evaluate: {documents: 7}\n", "its held-out documents and evaluate.documents are not those of"),
    ],
    ids=["text", "documents", "length", "both"],
)
def test_a_baseline_that_was_measured_on_other_documents_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], heldout: str, changed: str, words: str
) -> None:
    run, other = (write_training(tmp_path / name, {10: 3.0, 20: 2.5}) for name in ("run", "other"))
    write_documents(other / "data", heldout=heldout)
    (other / "recipe.yaml").write_text(RECIPE + changed)
    assert main(["report", str(run), "--baseline", str(other)]) == 2
    assert f"--baseline {other}: {words} {run}; losses compare on the same" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_a_baseline_may_have_learnt_from_other_text(tmp_path: Path) -> None:
    run, other = (write_training(tmp_path / name, {10: 3.0, 20: 2.5}) for name in ("run", "other"))
    write_documents(other / "data", train=OTHER)
    same = "evaluate: {sequence_length: 2048}\n"  # what data.sequence_length says anyway
    (other / "recipe.yaml").write_text(RECIPE + same)
    assert "needed" in " ".join(sentences(html(write_report(run, other)), "training"))


def test_what_was_measured_on_has_to_be_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = (write_training(tmp_path / name, {10: 3.0, 20: 2.5}) for name in ("run", "other"))
    (other / "data" / "prepared.json").unlink()
    assert main(["report", str(run), "--baseline", str(other)]) == 2
    assert f"{other}/data/prepared.json: not there" in capsys.readouterr().err
    (other / "recipe.yaml").unlink()
    assert main(["report", str(run), "--baseline", str(other)]) == 2
    assert f"{other}: no recipe.yaml in it" in capsys.readouterr().err


def test_stages_are_compared_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one's tokens come after the correction's and the first one's; each has the text that it reads."""
    run = write_training(tmp_path / "run", {20: 3.5}, "corrected")
    stages = "stages: {larger: {data: {sequence_length: 2048}}, smaller: {prune: {num_layers: 9}}}\n"
    write_training(run / "stages" / "larger", {10: 3.0})
    smaller = write_training(run / "stages" / "smaller", {10: 3.0, 30: 2.4})
    other = write_training(tmp_path / "other", {30: 3.0, 90: 2.4})
    (smaller / "data" / "prepared.json").unlink()
    (smaller / "data").rmdir()
    write_documents(run / "data", heldout=OTHER)
    (run / "recipe.yaml").write_text(RECIPE + stages)
    words = "took 3,000 tokens, and the baseline's 0: with these it is 1.5 times as many."  # 9,000 / 6,000
    said = sentences(html(write_report(smaller, other)), "training")
    assert any(words in each.replace("&#39;", "'") for each in said)
    for one, baseline in ((run, other), (other, run)):
        assert main(["report", str(one), "--baseline", str(baseline)]) == 2
        assert (
            f"--baseline: {run} has stages, each with its training; give {run}/stages/NAME" in capsys.readouterr().err
        )
