"""Bad input gets one clear line and exit code 2, and nothing is left half-written under a final name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.cli import main
from minitron_nemo.config import Recipe, load_recipe
from minitron_nemo.errors import UserError
from minitron_nemo.preflight import preflight
from tests.e2e.chain import write_recipe
from tests.tiny import write_tiny_llama


def refusal(stderr: str) -> str:
    """The one line that a refused command prints."""
    lines = [line for line in stderr.splitlines() if line.startswith("minitron: error: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command line in this process; it has to refuse."""

    def call(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        return refusal(capsys.readouterr().err)

    return call


def refused_by_process(*arguments: str) -> str:
    """The same for commands that join a job."""
    command = [sys.executable, "-m", "minitron_nemo.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2, result.stdout + result.stderr
    return refusal(result.stderr)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("recipe"),
        cluster={"launcher": "none", "processes_per_node": 1},
        parallel={"pipeline_model_parallel_size": 1},
    )


PP2 = "parallel.pipeline_model_parallel_size=2 cluster.processes_per_node=2"
TEACHER_PP2 = "teacher.layout.pipeline_model_parallel_size=2"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.learning_rate=1", "train.learning_rate"),
        ("train.steps=many", "train.steps"),
        ("prune.hidden_size=128", "prune.hidden_size"),
        ("prune.hidden_method=turn", "prune.hidden_method: 'turn' is not one of select, rotate"),
        ("prune.num_attention_heads=6", "prune.num_attention_heads"),
        ("prune.drop_layers=[0,9]", "prune.drop_layers"),
        ("distill.divergence=backward_kl", "distill.divergence"),
        ("distill.ce_weight=some", "distill.ce_weight"),
        ("distill.ce_weight=dynamic distill.logits_weight=0", "logits_weight is 0"),
        ("data.sequence_length=4096", "data.sequence_length"),
        ("train.global_batch_size=0", "train.global_batch_size"),
        ("train.eval_interval=-1", "train.eval_interval"),
        ("train.peak_flops=0", "train.peak_flops"),
        ("parallel.tensor_model_parallel_size=3 cluster.processes_per_node=3", "tensor_model_parallel_size"),
        ("parallel.pipeline_model_parallel_size=3 cluster.processes_per_node=3", "pipeline_model_parallel_size"),
        ("parallel.context_parallel_size=2 cluster.processes_per_node=2", "context_parallel_size"),
        ("model.source=/nowhere", "/nowhere"),
        (
            f"{PP2} parallel.num_layers_per_stage=[1,2]",
            "parallel.num_layers_per_stage: [1, 2] are 3 layers, and the student",
        ),
        (
            f"{PP2} teacher.layout.pipeline_model_parallel_size=1",
            "teacher.layout.pipeline_model_parallel_size: 1 is not the 2",
        ),
        (
            f"{PP2} {TEACHER_PP2} teacher.layout.num_layers_per_stage=[1,1]",
            "teacher.layout.num_layers_per_stage: [1, 1]",
        ),
        (f"{PP2} {TEACHER_PP2} teacher.layout.virtual_pipeline_model_parallel_size=3", "teacher.layout.virtual"),
        (f"{TEACHER_PP2} teacher.placement=cached distill.intermediate.pairs=[]", "teacher.layout: a cached teacher"),
    ],
)
def test_plan_names_the_key_that_is_wrong(refused: Callable[..., str], recipe: Path, override: str, key: str) -> None:
    assert key in refused("plan", str(recipe), *override.split())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("", "teacher.layout: placement separate needs it"),
        ("teacher.layout={}", "teacher.processes: placement separate needs it"),
        ("teacher.layout={} teacher.processes=4", "leaves no process to the teacher or to the student"),
        ("teacher.layout.tensor_model_parallel_size=2 teacher.processes=1", "not a multiple of the 2 that teacher.l"),
        ("teacher.layout={} teacher.processes=1 parallel.pipeline_model_parallel_size=2", "leave 3 to the student"),
        ("teacher.layout.context_parallel_size=2 teacher.processes=2", "teacher.layout.context_parallel_size"),
        (
            "teacher.layout.tensor_model_parallel_size=3 teacher.processes=3",
            "teacher.layout.tensor_model_parallel_size: 3 does not divide the model's num_query_groups 4",
        ),
        ("teacher.layout={} teacher.processes=2 distill.logits_weight=0 distill.ce_weight=1", "means training without"),
        ("teacher.placement=colocated teacher.processes=2", "is for placement separate, not colocated"),
    ],
)
def test_a_job_that_cannot_be_shared_out_is_refused(
    refused: Callable[..., str], recipe: Path, override: str, words: str
) -> None:
    job = ["teacher.placement=separate", "cluster.processes_per_node=4", "distill.intermediate.pairs=[]"]
    assert words in refused("plan", str(recipe), *job, *override.split())


def test_plan_shows_both_worlds(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    """The batch divides over the student's two ranks, not over the job's three."""
    overrides = ["teacher.placement=separate", "teacher.layout={}", "teacher.processes=1", "train.global_batch_size=2"]
    assert main(["plan", str(recipe), *overrides, "cluster.processes_per_node=3"]) == 2
    assert "global_batch_size: 2 is not a multiple" in capsys.readouterr().err  # of the correction, on all ranks
    arguments = ["plan", str(recipe), *overrides, "cluster.processes_per_node=3", "teacher.correction.steps=0"]
    assert main(arguments) == 0
    assert "student: 2 of tp=1 pp=1 dp=2, teacher: 1 of tp=1 pp=1 dp=1" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["distillation"]["student"] == {"processes": 2, "data_parallel_size": 2}


def test_a_job_that_ends_with_the_pruning_needs_no_place_for_the_teacher(recipe: Path) -> None:
    of = load_recipe(recipe, ["teacher.placement=separate", "teacher.layout={}", "teacher.processes=4"])
    with pytest.raises(UserError, match="leaves no process"):
        preflight(of, 2)
    assert preflight(of, 2, distils=False).worlds is None


def test_a_recipe_that_is_not_there_or_not_yaml(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no such recipe" in refused("plan", str(tmp_path / "none.yaml"))
    (tmp_path / "broken.yaml").write_text("name: [")
    assert "broken.yaml" in refused("plan", str(tmp_path / "broken.yaml"))


@pytest.mark.e2e
def test_an_empty_data_file_is_named(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    broken = yaml.safe_load(recipe.read_text())
    broken["data"]["train"] = [{"path": str(tmp_path / "empty.jsonl")}]
    broken["run_dir"] = str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(broken))
    assert "empty.jsonl" in refused_by_process("run", str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "run" / "data" / "prepared.json").exists()


@pytest.mark.e2e
def test_a_step_says_which_step_comes_before_it(tmp_path: Path, recipe: Path) -> None:
    assert "run the steps before it" in refused_by_process("distill", str(recipe), f"run_dir={tmp_path / 'fresh'}")


@pytest.mark.e2e
@pytest.mark.parametrize("launcher", ["none", "local"])
def test_a_run_directory_that_cannot_be_written_to_is_refused(tmp_path: Path, recipe: Path, launcher: str) -> None:
    (tmp_path / "file").touch()
    said = refused_by_process(
        "run", str(recipe), f"run_dir={tmp_path / 'file' / 'run'}", f"cluster.launcher={launcher}"
    )
    assert f"run_dir {tmp_path / 'file' / 'run'}: cannot be written to (Not a directory); choose another one" in said


@pytest.mark.e2e
def test_a_job_of_another_size_than_the_layout_is_refused_before_any_step(tmp_path: Path, recipe: Path) -> None:
    said = refused_by_process(
        "run", str(recipe), f"run_dir={tmp_path / 'run'}", "parallel.pipeline_model_parallel_size=2"
    )
    assert "tp=1 pp=2 needs a multiple of 2 processes, and this job has 1" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.e2e
def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path, recipe: Path) -> None:
    run = tmp_path / "run"
    convert(write_tiny_llama(tmp_path / "teacher", vocab_size=300), run / "teacher", "megatron")
    convert(write_tiny_llama(tmp_path / "student"), run / "pruned", "megatron")
    (run / "data").mkdir()
    (run / "data" / "prepared.json").write_text("{}")
    said = refused_by_process("distill", str(recipe), f"run_dir={run}", "teacher.correction.steps=0")
    assert f"{run / 'pruned'}: vocab_size 259 is not the 300 of {run / 'teacher'}" in said


def test_damaged_sources_leave_nothing_under_the_final_name(refused: Callable[..., str], tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused("convert", str(model), str(tmp_path / "out"), "--to", "megatron")
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_a_second_job_on_the_same_run_directory_is_refused(tmp_path: Path, recipe: Path) -> None:
    import fcntl

    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use" in refused_by_process("run", str(recipe), f"run_dir={run}")


@pytest.mark.parametrize(
    ("name", "student", "non_embedding"),
    [
        ("llama31_8b_to_4b_width", 4.513e9, 3.725e9),
        ("llama31_8b_to_4b_depth", 4.540e9, 3.490e9),
        ("mistral_nemo_12b_to_8b", 8.414e9, 7.340e9),
        ("nemotron4_15b_to_minitron_8b", 8.272e9, 6.175e9),
        ("nemotron4_15b_to_minitron_4b", 4.191e9, 2.618e9),
    ],
)
def test_plan_gives_the_published_parameter_counts(
    capsys: pytest.CaptureFixture[str], name: str, student: float, non_embedding: float
) -> None:
    root = Path(__file__).parents[2]
    assert main(["plan", str(root / "recipes" / f"{name}.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["student"]["parameters"] == pytest.approx(student, rel=2e-4)
    assert plan["student"]["non_embedding_parameters"] == pytest.approx(non_embedding, rel=2e-4)


@pytest.mark.parametrize(
    "override",
    [
        "prune.repair.norm_scale=true",
        "prune.repair.hidden=true",
        "prune.hidden_score=energy",
        "prune.hidden_method=rotate",
    ],
)
def test_what_needs_rms_norm_is_refused_before_anything_runs(refused: Callable[..., str], override: str) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "nemotron4_15b_to_minitron_8b.yaml"
    assert f"{override.partition('=')[0]}: " in refused("plan", str(recipe), override)


def test_a_tied_model_is_rotated_only_at_the_stated_price_of_an_output(
    refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml"), "prune.hidden_size=432"]
    message = refused(*arguments, "prune.hidden_method=rotate")
    assert "set prune.untie to true, at 21,233,664 parameters, or use select" in message
    parameters = []
    for more in ([], ["prune.hidden_method=rotate", "prune.untie=true"]):
        assert main([*arguments, *more, "--json"]) == 0
        parameters.append(json.loads(capsys.readouterr().out)["student"]["parameters"])
    assert parameters[1] - parameters[0] == 49152 * 432


def test_every_key_of_a_recipe_is_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    for section in fields(Recipe):
        if is_dataclass(section.default_factory):
            for key in fields(section.default_factory):
                assert f"`{key.name}`" in documented or f"{key.name}." in documented, f"{section.name}.{key.name}"
