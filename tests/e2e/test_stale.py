"""A step that is started alone takes no Plan and no Scores that are of another model or another recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import load_recipe
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import Scores
from minitron_nemo.models.branches import Branch
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.run import run_chain
from minitron_nemo.verification import verify_run
from tests.e2e.chain import write_recipe
from tests.e2e.test_bad_input import refused_by_process
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.slow

PLAIN = "prune.repair.ffn=false"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run up to the student; `run` below it."""
    directory = tmp_path_factory.mktemp("stale")
    write_recipe(
        directory,
        prune={"ffn_hidden_size": 64, "num_layers": 3, "depth_method": "leave_one_out", "depth": {"samples": 2}},
        teacher={"correction": {"steps": 0}},
        cluster={"launcher": "none", "processes_per_node": 1},
        parallel={"pipeline_model_parallel_size": 1},
    )
    start(directory, directory / "run", until="prune")
    return directory


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, with the times that the fingerprints are taken at."""
    return shutil.copytree(finished / "run", tmp_path / "run")


def start(directory: Path, run_dir: Path, *overrides: str, **part: str) -> None:
    run_distributed(1, run_chain, load_recipe(directory / "tiny.yaml", [f"run_dir={run_dir}", *overrides]), **part)


def refusal(directory: Path, run_dir: Path, step: str, *overrides: str) -> str:
    """What a step says that has to refuse, where there is no student yet."""
    shutil.rmtree(run_dir / "pruned", ignore_errors=True)
    with pytest.raises(UserError) as error:
        start(directory, run_dir, *overrides, only=step)
    assert "\n" not in str(error.value)
    assert not (run_dir / "pruned").exists()
    return str(error.value)


def test_a_repaired_plan_of_another_target_makes_no_student(finished: Path, run_dir: Path) -> None:
    target, recipe = "prune.ffn_hidden_size=48", finished / "tiny.yaml"
    records = (run_dir / "manifest.json").read_bytes()
    says = f"{run_dir / 'plan'}: made with ffn_hidden_size 64, which now is 48; run `minitron repair` first"
    assert says in refused_by_process("prune", str(recipe), f"run_dir={run_dir}", target)
    changed = load_recipe(recipe, [f"run_dir={run_dir}", target])
    with pytest.raises(UserError) as error:
        run_distributed(1, verify_run, changed)
    assert str(error.value) == says
    assert (run_dir / "manifest.json").read_bytes() == records
    for step in ("repair", "prune"):
        start(finished, run_dir, target, only=step)
    assert Architecture.load(run_dir / "pruned").ffn_hidden_size == 48
    assert run_distributed(1, verify_run, changed) == [True]


def _plan_of_another_model(run_dir: Path) -> None:
    plan = json.loads((run_dir / "plan" / "plan.json").read_text())
    plan["provenance"]["model_fingerprint"] = "0" * 64
    (run_dir / "plan" / "plan.json").write_text(json.dumps(plan))


def _other_scores(run_dir: Path) -> None:
    scores = Scores.load(run_dir / "scores.npz")
    replace(scores, tokens=scores.tokens + 1).save(run_dir / "scores.npz")


def _no_record(run_dir: Path) -> None:
    manifest = json.loads((run_dir / "manifest.json").read_text())
    del manifest["steps"]["repair"]
    (run_dir / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_plan_of_another_model, "plan: not what repair wrote; run `minitron repair` first"),
        (_other_scores, "plan: made of another scores than is there now; run `minitron repair` first"),
        (_no_record, "plan: no record of repair says what it is; run `minitron repair` first"),
    ],
)
def test_a_repaired_plan_that_is_not_of_what_is_there_makes_no_student(
    finished: Path, run_dir: Path, change: Callable[[Path], None], says: str
) -> None:
    change(run_dir)
    assert refusal(finished, run_dir, "prune") == f"{run_dir}/{says}"


def test_scores_of_another_model_decide_nothing(finished: Path, run_dir: Path) -> None:
    start(finished, run_dir, PLAIN, only="prune")
    depth = DepthScores.load(run_dir / "depth.npz")
    of_another = DepthScores(
        depth.architecture, {**depth.identity, "model_fingerprint": "0" * 64}, depth.weights, None, depth.sums
    )
    of_another.save(run_dir / "depth.npz")
    says = f"measured on another model than {run_dir / 'teacher'}; run"
    for step, overrides in (("prune", [PLAIN]), ("repair", [])):
        assert (
            refusal(finished, run_dir, step, *overrides) == f"{run_dir}/depth.npz: {says} `minitron score-depth` first"
        )
    depth.save(run_dir / "depth.npz")
    replace(Scores.load(run_dir / "scores.npz"), model_fingerprint="0" * 64).save(run_dir / "scores.npz")
    for step, overrides in (("prune", [PLAIN]), ("repair", [])):
        assert (
            refusal(finished, run_dir, step, *overrides) == f"{run_dir}/scores.npz: {says} `minitron calibrate` first"
        )


def test_scores_of_a_teacher_that_was_corrected_since_decide_nothing(
    finished: Path, run_dir: Path, tmp_path: Path
) -> None:
    convert(write_tiny_llama(tmp_path / "other", num_layers=4, tied=True, seed=7), run_dir / "corrected", "megatron")
    corrected = "teacher.correction.steps=1"
    says = f"{run_dir}/scores.npz: measured on another model than {run_dir / 'corrected'}; run `minitron calibrate`"
    assert refusal(finished, run_dir, "prune", corrected, PLAIN).startswith(says)
    assert "plan: made of another source than is there now" in refusal(finished, run_dir, "prune", corrected)


def test_a_corrected_configuration_or_tokenizer_repeats_what_was_made_with_it(finished: Path, tmp_path: Path) -> None:
    """The weights are those of before: nothing in the run tells but the files beside them."""
    run_dir = shutil.copytree(finished / "run", tmp_path / "run")
    model = shutil.copytree(finished / "model", tmp_path / "model")

    def corrected(file: str, **change: object) -> None:
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | change))
        start(finished, run_dir, f"model.source={model}", until="prune")

    corrected("config.json", rope_theta=500.0)
    assert Architecture.load(run_dir / "pruned").rotary_base == 500
    for measured in (
        lambda path: Scores.load(path / "scores.npz").ffn,
        lambda path: DepthScores.load(path / "depth.npz").sums[Branch()],
    ):
        assert (measured(finished / "run") != measured(run_dir)).any()
    corrected("tokenizer_config.json", chat_template="{{ messages }}")
    written = json.loads((run_dir / "pruned" / "tokenizer" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == "{{ messages }}"


def test_figures_in_another_precision_or_of_other_text_are_measured_again(finished: Path, run_dir: Path) -> None:
    shutil.copytree(run_dir / "pruned", run_dir / "distilled")
    losses = set()
    for change in ("train.steps=6", "train.precision=bf16", "data.separator_weight=1", "data.sequence_length=32"):
        start(finished, run_dir, "evaluate.documents=2", "evaluate.generate_tokens=0", change, only="evaluate")
        losses.add(json.loads((run_dir / "evaluation.json").read_text())["distilled"]["loss"])
    assert len(losses) == 4
    written = (run_dir / "evaluation.json").stat().st_mtime_ns
    same = "evaluate.sequence_length=32", "evaluate.documents=2", "evaluate.generate_tokens=0"
    start(finished, run_dir, *same, only="evaluate")
    assert (run_dir / "evaluation.json").stat().st_mtime_ns == written


def test_scores_without_samples_serve_a_run_that_is_given_them(finished: Path, tmp_path: Path) -> None:
    """As NeMo's validation leaves them, in a file of their own."""
    given, run_dir = tmp_path / "given.npz", tmp_path / "run"
    scores = Scores.load(finished / "run" / "scores.npz")
    replace(scores, sample_ids=(), settings={"precision": "float32"}).save(given)
    for part in ({"until": "prune"}, {"only": "prune"}):
        start(finished, run_dir, f"prune.scores={given}", **part)
    assert fingerprint(run_dir / "pruned") == fingerprint(finished / "run" / "pruned")
    assert Scores.load(run_dir / "scores.npz").sample_ids == ()
