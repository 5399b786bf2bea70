"""`minitron search` as a user calls it: every candidate is what `minitron run` makes of its sizes, through kills and
with another launcher."""

from __future__ import annotations

import fcntl
import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_nemo.arch import Plan
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.config import load_recipe
from minitron_nemo.planning.disk import MATRICES
from minitron_nemo.preflight import preflight
from minitron_nemo.pruning.depth import choose
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.search.plan import plan_search
from tests.e2e.chain import Command, write_recipe
from tests.families import write_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CANDIDATES = {"l3-h64-f64-a8-g4", "l2-h64-f96-a8-g4", "l2-h64-f64-a8-g4"}


def write_search(directory: Path, **sections: dict[str, Any]) -> Path:
    """Three candidates of four shapes, two for the second rung; nothing is timed, so that tables can be equal."""
    common: dict[str, dict[str, Any]] = {
        "prune": {"ffn_hidden_size": None, "num_layers": None},
        "search": {
            "ffn_hidden_size": [64, 96],
            "num_layers": [2, 3],
            "budget": {"max_parameters": 1e5},
            "rungs": [2, 4],
        },
        "teacher": {"correction": {"steps": 0}},
        "train": {"save_interval": 1, "eval_interval": 0},
        "parallel": {"pipeline_model_parallel_size": 1},
        "evaluate": {"documents": 6, "generate_tokens": 0},
        "cluster": {"launcher": "none", "processes_per_node": 1},
    }
    return write_recipe(directory, **(common | sections))


def table(directory: Path, part: str = "candidates") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((directory / "run/search/table.json").read_text())[part]
    return rows


def trained(output: str) -> int:
    return output.count("[distill] ->")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    command = Command(directory / "log", "search", str(write_search(directory)))
    assert command.wait() == 0, command.output
    assert trained(command.output) == 5
    return directory


def test_half_of_the_candidates_are_trained_longer_and_the_best_is_first(finished: Path) -> None:
    found = table(finished)
    assert {row["name"] for row in found} == CANDIDATES
    assert [row["steps"] for row in found] == [4, 4, 2]
    after_two = [row["losses"]["2"] for row in found]
    assert max(after_two[:2]) < min(after_two[2:])
    assert found[0]["losses"]["4"] < found[1]["losses"]["4"]
    assert json.loads((finished / "run/status.json").read_text())["state"] == "done"
    for row in found:
        run = finished / "run/search" / row["name"]
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert evaluation["distilled"]["loss"] == row["losses"][str(row["steps"])]
        assert evaluation["pruned"]["loss"] == row["losses"]["0"]
        assert evaluation["pruned"]["parameters"] == row["parameters"]
        assert not list(run.glob("training/*/iter_*"))
        assert list(run.glob("training/*/metrics.jsonl"))
    matrices = [path.stat().st_size for path in (finished / "run/search").glob("*/plan/plan.safetensors")]
    planned = {each.what: each.total for each in plan_search(preflight(load_recipe(finished / "tiny.yaml"))).disk}
    assert 0 < sum(matrices) - planned[f"{MATRICES} ({len(matrices)})"] < 1024 * len(matrices)  # headers


def test_a_candidate_is_what_a_run_of_its_own_makes_of_its_sizes(finished: Path, tmp_path: Path) -> None:
    """From the source on, with nothing shared."""
    best = (finished / "run/search/best.yaml").read_text().split("minitron run RECIPE ")[1].splitlines()[0]
    command = Command(
        tmp_path / "log", "run", str(write_search(tmp_path)), *best.split(), "train.steps=4", "export.formats=[]"
    )
    assert command.wait() == 0, command.output
    candidate = finished / "run/search" / table(finished)[0]["name"]
    for model in ("pruned", "distilled"):
        assert fingerprint(candidate / model) == fingerprint(tmp_path / "run" / model), model
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["distilled"]["loss"] == table(finished)[0]["loss"]


def test_a_further_rung_is_trained_alone_and_a_rerun_does_nothing(finished: Path, tmp_path: Path) -> None:
    before = (finished / "run/search/table.json").read_text()
    further = Command(tmp_path / "log1", "search", str(finished / "tiny.yaml"), "search.rungs=[2,4,5]")
    assert further.wait() == 0, further.output
    assert trained(further.output) == 1
    assert [row["steps"] for row in table(finished)] == [5, 4, 2]
    assert table(finished)[0]["losses"].keys() == {"0", "2", "4", "5"}
    again = Command(tmp_path / "log2", "search", str(finished / "tiny.yaml"))
    assert again.wait() == 0, again.output
    assert "] -> " not in again.output
    assert (finished / "run/search/table.json").read_text() == before  # results of earlier rungs are kept


def test_a_killed_search_goes_on_in_processes_of_its_own_and_ends_with_the_same_table(
    finished: Path, tmp_path: Path
) -> None:
    recipe = str(write_search(tmp_path))
    search = tmp_path / "run/search"
    stopped = Command(tmp_path / "log1", "search", recipe)
    stopped.wait_for(lambda: "[repair] ->" in stopped.output)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75, stopped.output
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "stopped"
    killed = Command(tmp_path / "log2", "search", recipe)
    killed.wait_for(lambda: list(search.glob("*/training/*/iter_0000001")))
    killed.kill()
    parallel = ("search.launcher=local", "search.jobs=2")
    killed = Command(tmp_path / "log3", "search", recipe, *parallel)
    killed.wait_for(lambda: sum("[convert]" in log.read_text() for log in search.glob("*/2.log")) == 2)
    driver = psutil.Process(killed.process.pid)
    children = driver.children(recursive=True)
    assert len(driver.children()) == 2
    killed.process.kill()  # alone: the others have to notice
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    stopped = Command(tmp_path / "log4", "search", recipe, *parallel)
    stopped.wait_for(lambda: "/2.log" in stopped.output)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75, stopped.output
    assert json.loads((search / "driver/status.json").read_text())["state"] == "stopped"
    last = Command(tmp_path / "log5", "search", recipe, *parallel)
    assert last.wait() == 0, last.output
    assert table(tmp_path) == table(finished)
    assert (search / "table.tsv").read_text() == (finished / "run/search/table.tsv").read_text()
    assert not list(search.rglob("*.partial"))


def test_a_run_borrows_teacher_and_scores_if_they_are_what_it_would_make(finished: Path, tmp_path: Path) -> None:
    recipe, run = str(finished / "tiny.yaml"), tmp_path / "run"
    cut = (
        "prune.ffn_hidden_size=64",
        "prune.num_layers=2",
        "train.steps=0",
        "export.formats=[megatron]",
        "export.dtype=null",
    )
    arguments = (recipe, f"run_dir={run}", f"from_run={finished / 'run'}", *cut)
    other = Command(tmp_path / "log1", "run", *arguments, "prune.calibration.samples=4")
    assert other.wait() == 2
    assert f"from_run {finished / 'run'}: scores.npz is not there, or is not what calibrate makes" in other.output
    assert not (run / "pruned").exists()
    without_training = Command(tmp_path / "log2", "run", *arguments)
    assert without_training.wait() == 0, without_training.output
    assert not (run / "teacher").exists()
    assert json.loads((run / "evaluation.json").read_text()).keys() == {"teacher", "pruned"}
    candidate = finished / "run/search/l2-h64-f64-a8-g4/pruned"
    assert fingerprint(run / "export/megatron") == fingerprint(run / "pruned") == fingerprint(candidate)


def test_a_candidate_that_fails_is_named_and_the_others_are_trained_all_the_same(
    finished: Path, tmp_path: Path
) -> None:
    search = finished / "run/search"
    busy, other = sorted(table(finished), key=lambda row: row["losses"]["0"])[:2]
    arguments = ("search.rungs=[1]", "search.top_k=2", "search.launcher=local")
    with (search / busy["name"] / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = Command(tmp_path / "log", "search", str(finished / "tiny.yaml"), *arguments)
        code = command.wait()
    assert code == 1, command.output
    log = search / busy["name"] / "1.log"
    said = (
        f"minitron: failed: {busy['name']}: it did not come to its end, see {log}; mend that and call the search again"
    )
    assert any(line.startswith(said) for line in command.output.splitlines())
    assert "Traceback" not in command.output
    assert "in use by another minitron" in log.read_text()
    status = json.loads((search / "driver/status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", "search")
    assert (search / other["name"] / "result_1.json").exists()
    assert not (search / busy["name"] / "result_1.json").exists()  # it is tried again
    [row] = table(finished, "failed")
    assert (row["name"], row["loss"]) == (busy["name"], None)
    assert row["failure"] == f"it did not come to its end, see {log}"
    assert f": {other['name']}, loss" in (search / "best.yaml").read_text()


def test_a_mixture_is_searched_and_its_depths_are_measured_once(tmp_path: Path) -> None:
    """Down to a single layer, which methods that measure may leave."""
    mixture = write_tiny("mixtral", tmp_path / "mixture", num_layers=3)
    cut = {"ffn_hidden_size": None, "num_layers": None, "depth_method": "leave_one_out", "depth": {"samples": 4}}
    recipe = write_search(
        tmp_path,
        model={"source": str(mixture)},
        prune={**cut, "calibration": {"samples": 4}},
        search={"num_moe_experts": [3], "moe_ffn_hidden_size": [48], "num_layers": [1, 2], "rungs": [1]},
        evaluate={"documents": 2, "generate_tokens": 0},
    )
    command = Command(tmp_path / "log", "search", str(recipe))
    assert command.wait() == 0, command.output
    assert command.output.count("[score-depth, ") == 1  # the whole model and those without a layer
    for row in table(tmp_path):
        run = tmp_path / "run/search" / row["name"]
        assert row["name"] == f"l{row['num_layers']}-h64-e3-f48-a8-g4"
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(
                mixture, num_hidden_layers=row["num_layers"], num_local_experts=3, intermediate_size=48
            )
        )
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert evaluation["pruned"]["parameters"] == row["parameters"]
        assert evaluation["distilled"]["loss"] == row["losses"]["1"]
        dropped, _ = choose(DepthScores.load(run / "depth.npz"), "leave_one_out", 3 - row["num_layers"], False)
        assert set(range(3)) - dropped == set(Plan.load(run / "pruned" / "plan.json").kept_layers)
    assert sorted(row["num_layers"] for row in table(tmp_path)) == [1, 2]
