"""The chain as a user runs it: from one command to an export, again, and through kills."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.report.read import read_run
from tests.e2e.chain import Command, write_recipe
from tests.report.browser import WIDTHS, chromium, faults, opened
from tests.report.reading import charts, html

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS = (
    "convert",
    "prepare",
    "correct",
    "calibrate",
    "score-depth",
    "repair",
    "prune",
    "distill",
    "evaluate",
    "export/hf",
    "report",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an undisturbed run; `run` below it."""
    directory = tmp_path_factory.mktemp("undisturbed")
    command = Command(directory / "log", "run", str(write_recipe(directory)))
    assert command.wait() == 0, command.output
    return directory


def test_the_run_directory_holds_every_result(finished: Path) -> None:
    run = finished / "run"
    manifest = json.loads((run / "manifest.json").read_text())["steps"]
    assert tuple(manifest) == STEPS
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    evaluation = json.loads((run / "evaluation.json").read_text())
    for name in ("teacher", "pruned", "distilled"):
        for key in ("loss", "loss_se", "perplexity", "kl_to_teacher", "top1_agreement"):
            assert evaluation[name][key] >= 0, (name, key)
    assert evaluation["distilled"]["parameters"] < evaluation["teacher"]["parameters"]
    assert evaluation["teacher"]["kl_to_teacher"] < 1e-6
    assert evaluation["distilled"]["delta_vs_pruned"] < -2 * evaluation["distilled"]["delta_vs_pruned_se"]
    assert {"delta_vs_teacher", "delta_vs_teacher_se"} <= evaluation["pruned"].keys()
    # The validation after the last update measured the same weights on the same documents.
    [metrics] = run.glob("training/distilled-*/metrics.jsonl")
    validation = [json.loads(line) for line in metrics.read_text().splitlines() if "validation/loss" in line][-1]
    for key in ("loss", "loss_se", "perplexity", "kl_to_teacher", "top1_agreement"):
        assert validation[f"validation/{key}"] == evaluation["distilled"][key], key


def test_the_export_loads_in_transformers_and_generates(finished: Path) -> None:
    export = finished / "run" / "export" / "hf"
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert model.config.num_hidden_layers == 2
    assert model.config.intermediate_size == 64
    prompt = tokenizer("The quick brown", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == prompt["input_ids"].shape[1] + 4
    # What was measured is what was exported, up to the export's bfloat16.
    evaluation = json.loads((finished / "run" / "evaluation.json").read_text())
    assert sum(parameter.numel() for parameter in model.parameters()) == evaluation["distilled"]["parameters"]
    assert model.dtype == torch.bfloat16


def test_verify_finds_every_bit_of_the_run_right_and_a_wrong_one(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)  # with the times that the fingerprints are taken at
    arguments = ("verify", str(finished / "tiny.yaml"), f"run_dir={run}")
    command = Command(tmp_path / "log1", *arguments)
    assert command.wait() == 0, command.output
    lines = [line for line in command.output.splitlines() if line.startswith("[verify] ")]
    assert [line.split(": every bit is what is made of ") for line in lines] == [
        [f"[verify] {run / 'teacher'}", str(finished / "model")],
        [f"[verify] {run / 'pruned'}", str(run / "corrected")],
        [f"[verify] {run / 'export' / 'hf'}", str(run / "distilled")],
    ]
    file = run / "export" / "hf" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x80  # the sign of the last entry
    file.write_bytes(content)
    command = Command(tmp_path / "log2", *arguments)
    assert command.wait() == 1, command.output
    assert f"{run / 'export' / 'hf'}: DIFFERS: decoder.final_layernorm.weight: row 63 holds" in command.output


def test_scores_of_another_run_serve_other_targets(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run, ignore=shutil.ignore_patterns("scores.npz", "manifest.json"))
    scores = finished / "run" / "scores.npz"
    recipe = (str(finished / "tiny.yaml"), f"run_dir={run}", f"prune.scores={scores}")
    command = Command(tmp_path / "log1", "calibrate", *recipe)
    assert command.wait() == 0, command.output
    assert (run / "scores.npz").read_bytes() == scores.read_bytes()
    command = Command(tmp_path / "log2", "calibrate", *recipe, "teacher.correction.steps=0")
    assert command.wait() == 2
    assert f"prune.scores: {scores} is of another model than {run / 'teacher'}" in command.output


def test_the_report_shows_this_run(finished: Path) -> None:
    run = finished / "run"
    page = html(run / "report.html")
    evaluation = json.loads((run / "evaluation.json").read_text())
    said = charts(page, "result")["Held-out loss"]
    assert [words.split()[:2] for words in said] == [
        [f"{name}:", f"{evaluation[name]['loss']:.6g}"] for name in ("source", "teacher", "pruned", "distilled")
    ]
    [metrics] = run.glob("training/distilled-*/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    totals = [
        words for words in charts(page, "training", "Distillation")["What is minimised"] if words.startswith("total")
    ]
    assert [words.rpartition(" ")[2] for words in totals] == [f"{loss:.6g}" for loss in losses]
    for name in ("teacher", "pruned", "distilled"):
        assert len(evaluation[name]["samples"]) == 3
        assert all(sample["prompt"] for sample in evaluation[name]["samples"])
    assert "pipeline_model_parallel_size: 2" in page
    with chromium() as browser:
        for width in WIDTHS:
            with opened(browser, run / "report.html", width) as (window, complaints):
                assert faults(window) == [] and complaints == []


def test_a_model_that_is_made_anew_outdates_the_evaluation(finished: Path, tmp_path: Path) -> None:
    assert read_run(finished / "run").outdated == {}
    shutil.copy(finished / "run" / "evaluation.json", tmp_path)
    for step, model in (("convert", "source"), ("correct", "teacher"), ("prune", "pruned"), ("distill", "distilled")):
        manifest = json.loads((finished / "run" / "manifest.json").read_text())
        manifest["steps"][step]["output"] = "0" * 64
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert read_run(tmp_path).outdated == {model: step}


def test_a_rerun_does_nothing(finished: Path) -> None:
    run = finished / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "status.json"}
    command = Command(finished / "log2", "run", str(finished / "tiny.yaml"))
    assert command.wait() == 0, command.output
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "status.json"}
    assert command.output.count("unchanged, not run again") == len(STEPS)
    assert {path.name for path in before if before[path] != after.get(path)} <= {".lock"}


def test_only_what_depends_on_a_changed_setting_runs_again(finished: Path) -> None:
    command = Command(finished / "log3", "run", str(finished / "tiny.yaml"), "evaluate.documents=4")
    assert command.wait() == 0, command.output
    assert command.output.count("unchanged, not run again") == len(STEPS) - 2
    assert "[evaluate] done" in command.output and "[report] done" in command.output


def test_a_run_killed_in_every_step_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    for step in STEPS:
        name = step.split("/")[0]
        command = Command(tmp_path / f"log_{name}", "run", str(recipe))
        command.wait_for(lambda name=name, command=command: f"[{name}] ->" in command.output)
        if name in ("correct", "distill"):  # a checkpoint behind it, work in front of it
            output = {"correct": "corrected", "distill": "distilled"}[name]
            command.wait_for(lambda output=output: list((run / "training").glob(f"{output}-*/iter_*2")))
        command.kill()
    last = Command(tmp_path / "log_last", "run", str(recipe))
    assert last.wait() == 0, last.output
    for model in ("teacher", "corrected", "pruned", "distilled"):
        assert fingerprint(run / model) == fingerprint(finished / "run" / model), model
    assert not list(run.rglob("*.partial")) and not (run / "calibration").exists()


def test_sigterm_saves_stops_with_75_and_a_rerun_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"steps": 6, "save_interval": 1000})
    run = tmp_path / "run"
    command = Command(tmp_path / "log1", "run", str(recipe))
    command.wait_for(lambda: "[distill] ->" in command.output)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 75, command.output
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    rerun = Command(tmp_path / "log2", "run", str(recipe))
    assert rerun.wait() == 0, rerun.output
    assert fingerprint(run / "distilled") == fingerprint(finished / "run" / "distilled")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_is_a_stop_too(tmp_path: Path, number: signal.Signals) -> None:
    """It may come while the processes still import what they need: the job is requeued all the same."""
    run = tmp_path / "run"
    command = Command(tmp_path / "log", "run", str(write_recipe(tmp_path)), "cluster.launcher=none")
    caught = re.compile(r"SigCgt:\s*(\w+)")
    command.wait_for(
        lambda: int(caught.findall(Path(f"/proc/{command.process.pid}/status").read_text())[0], 16) >> number - 1 & 1
    )
    command.process.send_signal(number)
    assert command.wait(30) == 75, command.output
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", f"{number.name} outside a step")
    assert "[convert]" not in command.output
