"""A recipe with stages: the same as recipes run by hand one after the other, through kills, for both teachers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.chain import chains
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.cli import main
from minitron_nemo.config import load_recipe
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import Scores
from minitron_nemo.report.read import read_run
from minitron_nemo.run import run_chain
from minitron_nemo.stages import plans, stage_recipes
from minitron_nemo.submit import jobs
from tests.e2e.chain import Command, write_recipe
from tests.pool import run_distributed

LARGER = {"prune": {"ffn_hidden_size": 80}, "train": {"steps": 6}}
SMALLER = {"prune": {"ffn_hidden_size": 64, "num_layers": 3}, "train": {"steps": 7, "lr": 2e-3}}
CUT = {"prune": {"ffn_hidden_size": 48}, "train": {"steps": 0}}
STAGES = {"larger": LARGER, "smaller": SMALLER, "cut": CUT}
COMMON = {"prune": {"ffn_hidden_size": None, "num_layers": None}, "evaluate": {"generate_tokens": 0}}
UNCORRECTED = {"teacher": {"correction": {"steps": 0}}, "export": {"formats": []}}


def by_running(test: Any) -> Any:
    for mark in (pytest.mark.e2e, pytest.mark.timeout(900)):
        test = mark(test)
    return test


def staged(directory: Path, **sections: dict) -> Path:
    directory.mkdir(exist_ok=True)
    return write_recipe(directory, **{**COMMON, **sections}, stages=STAGES)


def of_stage(directory: Path, source: Path, stage: dict[str, dict], **sections: dict) -> Path:
    """The recipe that somebody who knows no stages would write, on the same text."""
    directory.mkdir(exist_ok=True)
    prune = {**stage["prune"], "num_layers": stage["prune"].get("num_layers")}
    return write_recipe(
        directory,
        **{**COMMON, **sections, "prune": prune, "train": stage["train"], "model": {"source": str(source)}},
    )


def walk(recipe: Path, *overrides: str, **part: str) -> Path:
    """Run a recipe's chain in this machine's pool of processes; its run directory."""
    of = load_recipe(recipe, overrides)
    run_distributed(2, run_chain, of, timeout=240.0, **part)
    return Path(of.run_dir)


def records(run_dir: Path) -> dict[str, dict]:
    return json.loads((run_dir / "manifest.json").read_text())["steps"]


def evaluated(directory: Path) -> dict[str, dict]:
    return json.loads((directory / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was killed in the middle of both trainings, and ended by a third start."""
    directory = tmp_path_factory.mktemp("stages")
    recipe = staged(directory)
    for stage in ("larger", "smaller"):
        command = Command(directory / f"log_{stage}", "run", str(recipe))
        training = directory / "run" / "stages" / stage / "training"
        command.wait_for(lambda training=training: list(training.glob("distilled-*/iter_*2")))
        command.kill()
        assert not (directory / "run" / "stages" / stage / "distilled").exists(), "killed too late"
    walk(recipe)
    return directory


@pytest.fixture(scope="module")
def one(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the first stage's recipe by hand."""
    return walk(of_stage(tmp_path_factory.mktemp("one"), finished / "model", LARGER))


@pytest.fixture(scope="module")
def two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the second stage's, whose source and teacher is the first one's student."""
    return walk(of_stage(tmp_path_factory.mktemp("two"), one / "distilled", SMALLER, **UNCORRECTED))


@by_running
def test_stages_are_recipes_run_one_after_the_other(finished: Path, one: Path, two: Path, tmp_path: Path) -> None:
    stages = finished / "run" / "stages"
    for model in ("pruned", "distilled"):
        assert fingerprint(stages / "larger" / model) == fingerprint(one / model), model
    assert fingerprint(stages / "smaller" / "pruned") == fingerprint(two / "pruned")
    # By default the source teaches throughout: by hand its checkpoint is put in the place of the student's teacher.
    third = of_stage(tmp_path / "three", one / "corrected", SMALLER, **UNCORRECTED)
    for step in ("convert", "prepare"):
        walk(third, only=step)
    three = tmp_path / "three" / "run"
    shutil.copytree(two / "pruned", three / "pruned")
    walk(third, only="distill")
    assert fingerprint(stages / "smaller" / "distilled") == fingerprint(three / "distilled")
    assert fingerprint(three / "distilled") != fingerprint(two / "distilled"), "teachers that differ"


@by_running
def test_the_student_of_the_stage_before_may_teach(finished: Path, two: Path, tmp_path: Path) -> None:
    """In a copy of the run directory: only what depends on the teacher runs again."""
    run_dir = shutil.copytree(finished / "run", tmp_path / "run")
    before = records(run_dir)
    walk(finished / "tiny.yaml", f"run_dir={run_dir}", "stages.smaller.teacher.model=previous")
    after = records(run_dir)
    changed = {name for name in after if after[name] != before[name]}
    # Pages show the whole recipe.
    assert {name for name in changed if not name.startswith("cut/") and name.split("/")[-1] != "report"} == {
        f"smaller/{step}" for step in ("distill", "evaluate", "export/hf")
    }
    smaller = run_dir / "stages" / "smaller"
    assert fingerprint(smaller / "distilled") == fingerprint(two / "distilled")
    evaluation, by_hand = evaluated(smaller), evaluated(two)
    assert set(evaluation) == {"source", "corrected", "teacher", "pruned", "distilled"}
    for name in ("teacher", "pruned", "distilled"):
        assert evaluation[name] == by_hand[name], name
    assert read_run(smaller).outdated == {}


@by_running
def test_every_stage_has_its_results(finished: Path) -> None:
    run_dir = finished / "run"
    recorded = [name for name in records(run_dir) if not name.endswith("/score-depth")]  # where layers go
    own = ["calibrate", "repair", "prune", "distill", "evaluate", "export/hf", "report"]
    of_stages = [f"{stage}/{step}" for stage in STAGES for step in own if (stage, step) != ("cut", "distill")]
    assert recorded == ["convert", "prepare", "correct", *of_stages, "report"]
    larger, smaller, cut = (evaluated(run_dir / "stages" / stage) for stage in STAGES)
    assert set(larger) == {"source", "teacher", "pruned", "distilled"}
    assert set(smaller) == {"source", "teacher", "intermediate", "pruned", "distilled"}
    assert set(cut) == {"source", "teacher", "intermediate", "pruned"}
    assert smaller["intermediate"]["loss"] == larger["distilled"]["loss"]
    assert smaller["teacher"] == larger["teacher"]
    assert cut["intermediate"]["loss"] == smaller["distilled"]["loss"]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    page = (run_dir / "report.html").read_text()
    for stage in STAGES:
        assert read_run(run_dir / "stages" / stage).outdated == {}, stage
        assert f'<a href="stages/{stage}/report.html">{stage}</a>' in page
    assert "This run is not done" not in page
    config = json.loads((run_dir / "stages" / "cut" / "export" / "hf" / "config.json").read_text())
    assert config["intermediate_size"] == CUT["prune"]["ffn_hidden_size"]
    for before, stage in (("larger", "smaller"), ("smaller", "cut")):
        scores = Scores.load(run_dir / "stages" / stage / "scores.npz")
        assert scores.model_fingerprint == fingerprint(run_dir / "stages" / before / "distilled")


@by_running
def test_one_step_of_one_stage(finished: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(finished / "run", tmp_path / "run")
    before = records(run_dir)
    walk(finished / "tiny.yaml", f"run_dir={run_dir}", "evaluate.documents=3", only="evaluate", stage="cut")
    after = records(run_dir)
    assert {name for name in after if after[name] != before[name]} == {"cut/evaluate"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return staged(tmp_path_factory.mktemp("recipe"))


@pytest.mark.slow
def test_plan_prices_every_stage_and_the_total(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    assert main(["plan", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    teacher, larger, smaller, cut = (
        plan[key]["architecture"]["ffn_hidden_size"]
        for plan, key in (
            (found["stages"]["larger"], "teacher"),
            (found["stages"]["larger"], "student"),
            (found["stages"]["smaller"], "student"),
            (found["stages"]["cut"], "student"),
        )
    )
    assert (teacher, larger, smaller, cut) == (96, 80, 64, 48)
    assert [plan["tokens"]["correction"] for plan in found["stages"].values()] == [4 * 4 * 64, 0, 0]
    assert [plan["tokens"]["distillation"] for plan in found["stages"].values()] == [6 * 4 * 64, 7 * 4 * 64, 0]
    first, second, third = plans(load_recipe(recipe))
    assert second.flops["distillation"] == (7 * 4 * 64) * (
        forward_flops_per_token(first.teacher, 64) + 3 * forward_flops_per_token(second.student, 64)
    )
    assert third.flops["calibration"] == 8 * 64 * forward_flops_per_token(second.student, 64)
    for kind in ("tokens", "flops"):
        for name, total in found[kind].items():
            assert total == sum(plan[kind][name] for plan in found["stages"].values()), (kind, name)
    assert main(["plan", str(recipe)]) == 0
    said = capsys.readouterr().out
    for line in (
        "stage 2 of 3              smaller",
        "cut from",
        "all stages                3",
        "nothing: no distillation",
    ):
        assert line in said, line


def test_the_intermediate_teacher_is_the_cheaper_one(recipe: Path) -> None:
    second = plans(load_recipe(recipe, ["teacher.model=previous"]))[1]
    assert second.teacher == second.source != plans(load_recipe(recipe))[1].teacher


def test_only_other_text_is_prepared_again(recipe: Path, tmp_path: Path) -> None:
    shared = ["stages.smaller.data.sequence_length=32", "stages.smaller.data.seed=5"]
    larger, smaller, cut = chains(plans(load_recipe(recipe, shared)))
    assert larger.prepared == smaller.prepared == cut.prepared == Path(larger.recipe.run_dir) / "data"
    assert (larger.recipe.data.sequence_length, smaller.recipe.data.sequence_length) == (64, 32)
    larger, smaller, cut = chains(plans(load_recipe(recipe, ["stages.smaller.data.heldout_fraction=0.5"])))
    assert smaller.prepared == Path(larger.recipe.run_dir) / "stages" / "smaller" / "data"
    assert cut.prepared == Path(larger.recipe.run_dir) / "stages" / "cut" / "data", "the text of the whole recipe"
    assert [chain.own_text for chain in (larger, smaller, cut)] == [False, True, True]


def test_a_cache_serves_all_stages_of_one_teacher(recipe: Path) -> None:
    overrides = ["teacher.placement=cached", "distill.intermediate.pairs=[]"]
    larger, smaller, _ = stage_recipes(load_recipe(recipe, overrides)).values()
    assert larger.teacher.cache.path is smaller.teacher.cache.path is None and larger.run_dir == smaller.run_dir
    larger, smaller, _ = stage_recipes(load_recipe(recipe, [*overrides, "teacher.model=previous"])).values()
    assert larger.teacher.cache.path is None
    assert smaller.teacher.cache.path == f"{smaller.run_dir}/stages/smaller/teacher_cache"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.smaller.train.learning_rate=1", "stages.smaller.train.learning_rate: Key 'learning_rate' not in"),
        ("stages.smaller.train.lr=fast", "stages.smaller.train.lr: "),
        ("stages.smaller.prune.ffn_hidden_size=81", "stages.smaller: prune.ffn_hidden_size: 81 is not a size"),
        ("stages.smaller.prune.hidden_size=0", "stages.smaller: prune.hidden_size: 0"),
        ("stages.smaller=5", "stages.smaller: 5 is no part of a recipe"),
        ("stages.smaller.model.source=x", "stages.smaller.model: belongs to the whole recipe"),
        ("stages.smaller.cluster.nodes=2", "stages.smaller.cluster: belongs to the whole recipe"),
        ("stages.smaller.teacher.correction.steps=2", "stages.smaller.teacher.correction: only the source"),
        ("stages.smaller.teacher.model=first", "stages.smaller: teacher.model: 'first' is not one of source, previous"),
        ("stages.cut.train.steps=-1", "stages.cut: train.steps: -1 must not be negative"),
        (
            "stages.smaller.parallel.tensor_model_parallel_size=2",
            "stages.smaller: parallel: tp=2 pp=2 needs a multiple",
        ),
        ("stages={../up: {}}", "stages.../up: '../up' becomes a directory"),
        ("stages={a: {train: {steps: null}}}", "stages.a.train.steps: "),
    ],
)
@pytest.mark.fast_cases(8)
def test_what_is_wrong_with_a_stage_is_one_line(
    capsys: pytest.CaptureFixture[str], recipe: Path, override: str, words: str
) -> None:
    assert main(["plan", str(recipe), override]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("minitron: error: ") and words in said, said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill"], "distill: the recipe has stages (larger, smaller, cut); say which by --stage NAME"),
        (["run", "--until", "prune"], "--until prune: the recipe has stages (larger, smaller, cut)"),
        (["run", "--stage", "4b"], "--stage: 4b is no stage of the recipe; it has larger, smaller, cut"),
        (["correct", "--stage", "cut"], "--stage: correct is not of one stage alone"),
    ],
)
def test_a_part_of_the_chain_that_is_not_there(
    capsys: pytest.CaptureFixture[str], recipe: Path, arguments: list[str], words: str
) -> None:
    assert main([arguments[0], str(recipe), *arguments[1:]]) == 2
    assert words in capsys.readouterr().err


def test_one_job_walks_all_stages(recipe: Path) -> None:
    [job] = jobs(load_recipe(recipe))
    assert job.script == "distill.sh"
    with pytest.raises(UserError, match=r"cluster.prune_nodes: a recipe with stages trains between its prunings"):
        jobs(load_recipe(recipe, ["cluster.prune_nodes=1"]))


def test_without_a_training_the_pruned_student_is_the_result(recipe: Path) -> None:
    cut = chains(plans(load_recipe(recipe)))[-1]
    steps = {step.name: step for step in cut.steps()}
    assert "distill" not in steps
    assert steps["export"].inputs == {"student": cut.pruned}
    assert "distilled" not in steps["evaluate"].inputs
