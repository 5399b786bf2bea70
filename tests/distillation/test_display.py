"""What a person sees while a training runs: the panel on a terminal, lines in a log, TensorBoard's groups of charts."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout as Charts

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import IntermediateConfig
from minitron_nemo.distillation.dashboard import CHARTS
from minitron_nemo.distillation.metrics import EventsFile
from minitron_nemo.distillation.panel import Panel
from minitron_nemo.distillation.progress import Progress
from minitron_nemo.distillation.records import read_metrics
from minitron_nemo.distillation.report import Report
from tests.distillation.runs import Job, Result, run
from tests.distillation.test_faults import poisoned
from tests.documents import ROOT
from tests.pool import run_distributed
from tests.terminal import on_terminal, resize, screen
from tests.tiny import write_tiny_llama

slow = pytest.mark.slow
LAYOUT = "custom_scalars__config__"
NOT_HERE = {"memory/peak_allocated_bytes"}  # of GPUs; `memory/resident_bytes` is of CPUs


def scalars(update: int, **others: float) -> dict[str, float]:
    """A report after update `update` of 2,048 tokens, with all that one can have."""
    return {
        "train/loss": 2.34567 + 1 / update,
        "train/logits": 0.44321,
        "train/ce": 3.56789,
        "train/hidden": 0.02341,
        "train/alpha": 0.25,
        "train/lr": 1.25e-4,
        "train/grad_norm": 0.4567,
        "speed/tokens_per_second": 1024.0,
        "speed/seconds_per_update": 2.0,
        "speed/mfu": 0.3456,
        "data/tokens": 2048.0 * update,
        **others,
    }


def shown(directory: Path, width: int, **console: Any) -> str:
    """The output of a run of 20 updates, with everything that can happen in it; the clock stands still."""
    stream = io.StringIO()
    noon = time.mktime((2026, 3, 4, 12, 0, 0, 0, 0, -1))
    panel = Panel("distill", 20, 20 * 2048, directory, now=lambda: noon)
    with Progress(panel, True, Console(file=stream, width=width, height=40, **console)) as progress:
        for update in range(1, 11):
            progress.show(Report(update, scalars(update)))
        progress.scalars(8, {"checkpoint/stall_seconds": 0.1, "checkpoint/write_seconds": 2.0})
        progress.say("checkpoint after update 8: " + "a line that is longer than a terminal is wide " * 3)
        progress.saving(10)
        found = {"loss": 3.6543, "loss_se": 0.0312, "kl_to_teacher": 0.4422, "top1_agreement": 0.684}
        progress.scalars(10, {f"validation/{name}": value for name, value in found.items()})
        progress.scalars(11, {"train/skipped": 1, "train/roll_backs": 0})
    return stream.getvalue()


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_panel_shows_the_last_figures_and_what_is_left(tmp_path: Path, width: int) -> None:
    rows = screen(shown(tmp_path, width, force_terminal=True), width)
    top = max(number for number, row in enumerate(rows) if row.startswith("╭─ distill ─"))
    assert {len(row) for row in rows[top:-1]} == {min(79, width)}
    assert sum(row.startswith("╭") for row in rows) == 1  # frames are drawn over each other
    text = " ".join(re.sub(r"[│╭╮╰╯─━╸╺]", " ", " ".join(rows[top:])).split())
    for figures in (
        "11/20 updates ETA 0:00:20, at 12:00",  # 20,480 tokens at 1,024 a second
        "loss 2.4457 logits 0.4432 CE 3.5679 hidden 0.0234 × 0.25",
        "learning rate 1.25e-04 gradient norm 0.46",
        "1,024 tokens/s 34.6% MFU 2.00 s an update",
        "tokens 20,480 of 40,960",
        "held out loss 3.6543 ± 0.0312 KL 0.4422 68.4% after update 10",
        "after update 8, 0:00:00 ago; writing that of update 10",
        "skipped 1 update; 0 returns to a checkpoint",
    ):
        assert figures in text, (figures, text)
    assert "/iter_0000008 " in text
    assert any(row.startswith("[distill] checkpoint after update 8") for row in rows[:top])


def test_a_log_gets_lines_and_no_panel(tmp_path: Path) -> None:
    lines = shown(tmp_path, 80).splitlines()
    assert len(lines) == 11 and "\x1b" not in "".join(lines)
    assert lines[9] == (
        "[distill] 10/20  loss 2.4457 (logits 0.4432, ce 3.5679, hidden 0.0234 x 0.25)  lr 1.25e-04  "
        "grad norm 0.46  1,024 tokens/s (34.6% MFU)  ETA 0:00:20"
    )


def test_a_resumed_run_shows_the_checkpoint_that_it_goes_on_from(tmp_path: Path) -> None:
    (tmp_path / "iter_0000007").mkdir()
    made = (tmp_path / "iter_0000007").stat().st_mtime
    stream = io.StringIO()
    panel = Panel("distill", 20, 40960, tmp_path, 7, now=lambda: made + 65, values={"train/skipped": 2})
    Console(file=stream, width=200).print(panel)
    assert "7/20 updates" in stream.getvalue() and "after update 7, 0:01:05 ago" in stream.getvalue()
    assert "2 updates; 0 returns to a checkpoint" in stream.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student and teacher."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "student_hf", num_layers=2, ffn_hidden_size=64, seed=1)
    write_tiny_llama(root / "teacher_hf", num_layers=2, seed=2)
    for name in ("student", "teacher"):
        convert(root / f"{name}_hf", root / name, "megatron", progress=False)
    return root / "student", root / "teacher"


def resized(job: Job, columns: int) -> Result:
    """A window that is made narrower in the midst of the run."""
    return run(job, {4: lambda: resize(columns)})


@slow
@pytest.mark.parametrize(("before", "after"), [(80, 80), (120, 80)])
def test_on_a_terminal_the_last_frame_has_the_figures_of_the_metrics(
    models: tuple[Path, Path], tmp_path: Path, before: int, after: int
) -> None:
    pairs = IntermediateConfig(pairs=[[-1, -1]])
    job = Job(*models, tmp_path, config={"eval_interval": 3, "save_interval": 2}, intermediate=pairs)
    [(result, output)] = run_distributed(1, on_terminal, before, resized, job, after)
    assert result.outcome == "done" and "Traceback" not in output
    rows = screen(output, before)
    top = max(number for number, row in enumerate(rows) if row.startswith("╭"))
    assert sum(row.startswith("╭") for row in rows) == 1 and rows[-2].startswith("╰")
    text = " ".join(re.sub(r"[│╭╮╰╯─━╸╺]", " ", " ".join(rows[top:])).split())
    records = read_metrics(tmp_path / "training" / "metrics.jsonl")
    last = {tag: value for record in records for tag, value in record.items()}
    for figures in (
        "6/6 updates in 0:00:",
        f"loss {last['train/loss']:.4f} logits {last['train/logits']:.4f} CE {last['train/ce']:.4f}",
        f"hidden {last['train/hidden']:.4f} × {last['train/alpha']:.3g}",
        f"learning rate {last['train/lr']:.2e} gradient norm {last['train/grad_norm']:.2f}",
        f"{last['speed/tokens_per_second']:,.0f} tokens/s",
        f"tokens {last['data/tokens']:,.0f} of 384",
        f"held out loss {last['validation/loss']:.4f} ± {last['validation/loss_se']:.4f}",
        "checkpoint after update 4, 0:00:",
        "training/iter_0000004",
        "skipped none",
    ):
        assert figures in text, (figures, text)
    assert any("checkpoint after update 2: training stood still" in row for row in rows[:top])


def groups(path: Path) -> dict[str, list[str]]:
    """The patterns of every chart of an events file, which has one layout."""
    found = EventAccumulator(str(path), size_guidance={"tensors": 0})
    found.Reload()
    [event] = found.Tensors(LAYOUT)
    charts = Charts.FromString(event.tensor_proto.string_val[0])
    return {
        f"{category.title}/{chart.title}": list(chart.multiline.tag)
        for category in charts.category
        for chart in category.chart
    }


@slow
def test_every_tag_of_a_training_is_in_one_chart_and_no_chart_has_others(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """A run in which everything happens that is written about, an update that is not finite included."""
    config = {"eval_interval": 3, "save_interval": 2, "peak_flops": 1e12}
    job = Job(*models, tmp_path, config=config, intermediate=IntermediateConfig(pairs=[[-1, -1]]))
    run_distributed(1, poisoned, job, (3,), "loss")
    [file] = (tmp_path / "training" / "tensorboard").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    written = set(events.Tags()["scalars"])
    told = {tag for record in read_metrics(tmp_path / "training" / "metrics.jsonl") for tag in record}
    assert written == told - {"iteration", "time"}
    charts = groups(file)
    patterns = [pattern for of_chart in charts.values() for pattern in of_chart]
    for tag in written:  # as TensorBoard looks them up
        assert sum(re.match(pattern, tag) is not None for pattern in patterns) == 1, tag
    unused = [pattern for pattern in patterns if not any(re.match(pattern, tag) for tag in written)]
    assert unused == [f"{re.escape(tag)}$" for tag in NOT_HERE]


def test_the_charts_have_what_the_document_explains() -> None:
    tags = [tag for charts in CHARTS.values() for each in charts.values() for tag in each]
    text = (ROOT / "docs" / "observability.md").read_text()
    explained = re.findall(r"`((?:train|data|speed|teacher|memory|checkpoint|validation)/[a-z0-9_]+)`", text)
    assert len(tags) == len(set(tags)) and set(tags) == set(explained)


def test_every_events_file_has_the_layout_and_a_resumption_keeps_the_scalars(tmp_path: Path) -> None:
    for done, updates in ((0, (1, 2, 3)), (2, (3, 4))):
        events = EventsFile(tmp_path, done)
        for update in updates:
            assert events.append(update, {"train/loss": 10.0 * done + update}) is None
        events.close()
    files = list(tmp_path.iterdir())
    assert len(files) == 2 and groups(files[0]) == groups(files[1])
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]
    assert len(found.Tensors(LAYOUT)) == 2
