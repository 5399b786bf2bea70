"""Bad input gets one clear line and exit code 2, and nothing is left half-written under a final name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.cli import main
from minitron_nemo.config import load_recipe
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


GRID = "search.num_layers=[2,3]"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.hidden=[32]", "search.hidden"),
        ("search.hidden_size=[32,65]", "search.hidden_size: 65 is not a size to prune to; the source has 64"),
        (f"{GRID} search.launcher=pbs", "search.launcher: 'pbs' is not one of none, local, slurm"),
        (f"{GRID} search.jobs=0", "search.jobs: 0 must be greater than 0"),
        (f"{GRID} search.top_k=0", "search.top_k: 0 must be greater than 0"),
        (f"{GRID} search.keep=0", "search.keep: 0 must be a share"),
        (f"{GRID} search.rungs=[100,100]", "search.rungs: [100, 100] must be numbers of updates"),
        (f"{GRID} search.rungs=[0]", "search.rungs: [0] must be"),
        (f"{GRID} search.max_candidates=1", "search.max_candidates: more than 1 shapes"),
        (f"{GRID} search.serving.dtype=int8", "search.serving.dtype: 'int8' is not one of"),
        (f"{GRID} search.serving.batch_size=0", "search.serving.batch_size: 0 must be greater than 0"),
        (f"{GRID} search.serving.bandwidth=1e12", "search.serving.peak_flops: needed for the latency"),
        (f"{GRID} search.budget.max_latency_seconds=1", "search.serving.peak_flops: needed for the latency"),
        (f"{GRID} search.budget.max_parameters=10", "search.budget: no shape of the grid is within it"),
        (f"{GRID} search.budget.min_parameters=2 search.budget.max_parameters=1", "search.budget.min_parameters: 2 is"),
        (
            f"{GRID} search.budget.min_tokens_per_second=1 evaluate.generate_tokens=0",
            "search.budget.min_tokens_per_second: needs evaluate.generate_tokens",
        ),
        (f"{GRID} search.launcher=slurm teacher.placement=cached", "search.launcher: slurm trains several"),
        (f"{GRID} from_run=elsewhere", "leave from_run out"),
        (
            f"{GRID} search.launcher=local cluster.processes_per_node=2",
            "search.launcher: local gives a training 1 of the 2 processes",
        ),
        # What is wrong with one candidate's own recipe names the candidate.
        (f"{GRID} parallel.pipeline_model_parallel_size=3 cluster.processes_per_node=3", "l2-h64-f64-a8-g4: parallel."),
        (f"{GRID} train.lr_decay_style=WSD train.lr_wsd_decay_steps=5 search.rungs=[2]", "search.rungs: train.lr_wsd"),
    ],
)
def test_plan_checks_the_search(refused: Callable[..., str], recipe: Path, override: str, words: str) -> None:
    sizes = ("prune.num_layers=null", "distill.intermediate.pairs=[]")
    assert words in refused("plan", str(recipe), *sizes, *override.split())


def test_a_search_has_no_stage(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["search", str(recipe), "--stage", "larger"])
    assert "unrecognized arguments: --stage larger" in capsys.readouterr().err


def test_a_recipe_for_gpus_computes_on_them_and_converts_anywhere(tmp_path: Path, recipe: Path) -> None:
    overrides = ("cluster.gpu=h100-80gb", f"run_dir={tmp_path / 'run'}")
    said = refused_by_process("calibrate", str(recipe), *overrides)
    assert said.endswith("cluster.gpus_per_node, or set cluster.gpu=null to compute on the CPU")
    command = [sys.executable, "-m", "minitron_nemo.cli", "convert", str(recipe), *overrides]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "run" / "teacher" / "architecture.json").is_file()


def test_plan_shows_what_a_search_will_do(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    overrides = ("prune.num_layers=null", "search.num_layers=[2,3]", "search.hidden_size=[32,48]", "search.keep=0.3")
    assert main(["plan", str(recipe), *overrides, "search.rungs=[5,10]"]) == 0
    printed = capsys.readouterr().out
    assert "4 candidates within the budget, of 4 in the grid" in printed
    assert "4 of 5 updates, 2 of 10 updates" in printed
    assert main(["plan", str(recipe), *overrides, "search.rungs=[5,10]", "--json"]) == 0
    search = json.loads(capsys.readouterr().out)["search"]
    tokens = (4 * 5 + 2 * 10) * 4 * 64
    assert search["tokens"] == {"depth": 8 * 64, "repair": 4 * 16 * 64, "distillation": tokens}
    assert search["candidates"][0]["name"] == "l3-h48-f64-a8-g4"

    def inside(layers: int, hidden: int, ffn: int) -> int:
        """FLOPs of a token among 64: matrices of layers, attention over 32 on average."""
        return 2 * layers * (hidden * (8 + 4 + 4 + 8) * 8 + 3 * hidden * ffn) + layers * 4 * 32 * 64

    def forward(layers: int, hidden: int, ffn: int) -> int:
        return inside(layers, hidden, ffn) + 2 * 259 * hidden

    updates = [forward(4, 64, 96) + 3 * forward(layers, hidden, 64) for layers in (3, 2) for hidden in (48, 32)]
    largest = sorted(updates)[2:]
    assert search["flops"]["distillation"] == 4 * 64 * (5 * sum(updates) + 10 * sum(largest))
    # Least squares sum products of 64 channels and those that stay, of 96 neurons and the 64 that stay.
    sums = sum(layers * 2 * (2 * (64 + hidden) * hidden + 96 * 64) for layers in (3, 2) for hidden in (48, 32))
    assert search["flops"]["repair"] == 16 * 64 * (4 * inside(4, 64, 96) + sums)
    # Greedy, down to two layers, which serves three: 4 + 3 + 2 + 1 evaluations of a layer, then 1 + 2 + 2 + 0.
    assert search["depth_search"] == {"models": 8, "layer_evaluations": 15, "forward_passes": 3.75}
    assert search["flops"]["depth"] == 8 * 64 * (inside(4, 64, 96) * 15 // 4 + 8 * 2 * 259 * 64)
    assert "8 models, 3.75 passes through the layers and 8 through the output, each of 8 sequences" in printed
    # In fp32. One is trained at a time: its latest, best and next checkpoint, of weights and thrice as much of AdamW's.
    sizes = [4 * candidate["parameters"] for candidate in search["candidates"]]
    matrices = [
        4 * layers * (2 * (64 + 1) * hidden + (96 - 64) * 64) for layers in (3, 2) for hidden in (48, 32)
    ]  # the output is tied: its norm has no reader of its own
    assert {each["what"]: each["total"] for each in search["disk"]} == {
        "student, pruned (4)": sum(sizes),
        "distillation, checkpoints (1)": 3 * 4 * max(sizes),
        "student, distilled (4)": sum(sizes),
        "repair, matrices (4)": sum(matrices),
    }
    assert f"{'disk, search':<30}at most " in printed
    one_rung = ("search.rungs=[5]", "search.top_k=2", "search.launcher=slurm", "search.jobs=8", "--json")
    assert main(["plan", str(recipe), *overrides, *one_rung]) == 0
    disk = {each["what"]: each["total"] for each in json.loads(capsys.readouterr().out)["search"]["disk"]}
    assert disk["distillation, checkpoints (2)"] == 3 * 4 * sum(sizes[:2])
    assert disk["student, distilled (2)"] == sum(sizes[:2])


def test_a_recipe_may_end_with_the_cut(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    assert main(["plan", str(recipe), "train.steps=0", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["tokens_per_step"], plan["tokens"]["distillation"], plan["flops"]["distillation"]) == (0, 0, 0)
    assert main(["plan", str(recipe), "train.steps=0"]) == 0
    assert "nothing: no distillation" in capsys.readouterr().out


PP2 = "parallel.pipeline_model_parallel_size=2 cluster.processes_per_node=2"
TEACHER_PP2 = "teacher.layout.pipeline_model_parallel_size=2"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.learning_rate=1", "train.learning_rate"),
        ("train.steps=many", "train.steps"),
        ("stages=[one]", "a list stands where there are keys"),
        ("train.steps=-1", "train.steps: -1 must not be negative"),
        ("evaluate.generate_prompt_tokens=0", "evaluate.generate_prompt_tokens: 0 must be greater than 0"),
        ("evaluate.generate_batch_sizes=[]", "evaluate.generate_batch_sizes: [] must be sizes of batches"),
        ("evaluate.generate_batch_sizes=[4,0]", "evaluate.generate_batch_sizes: [4, 0]"),
        ("evaluate.tasks=[nowhere.jsonl]", "evaluate.tasks: nowhere.jsonl: no such file"),
        ("prune.hidden_size=128", "prune.hidden_size"),
        ("prune.hidden_method=turn", "prune.hidden_method: 'turn' is not one of select, rotate"),
        ("prune.num_attention_heads=6", "prune.num_attention_heads"),
        ("prune.drop_layers=[0,9]", "prune.drop_layers"),
        ("prune.depth_method=perplexity", "prune.depth_method: 'perplexity' is not one of"),
        ("prune.depth.metric=accuracy", "prune.depth.metric: 'accuracy' is not one of loss, task"),
        ("prune.depth.samples=0", "prune.depth.samples: 0 must be greater than 0"),
        ("prune.depth_method=best_block prune.depth.metric=task", "prune.depth.task: metric task needs one"),
        (
            "prune.depth_method=greedy prune.depth.metric=task prune.depth.task=/nowhere.jsonl",
            "prune.depth.task: /nowhere.jsonl: not readable as a task",
        ),
        ("prune.calibration.aggregations.hidden_size=[l2,mean]", "prune.calibration.aggregations.hidden_size: ['l2'"),
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
            "teacher.layout.tensor_model_parallel_size: 3 does not divide the sequence length 64",
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


def test_plan_says_what_groups_of_zeros_cost(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    """Two heads of each of three groups on TP2; the teacher's four groups divide."""
    tp2 = ["parallel.tensor_model_parallel_size=2", "cluster.processes_per_node=2", "prune.num_query_groups=3"]
    assert main(["plan", str(recipe), *tp2]) == 0
    said = capsys.readouterr().out
    assert "student, padded           to 8 heads in 4 groups, by zeros: " in said and "teacher, padded" not in said
    assert main(["plan", str(recipe), *tp2, "--json"]) == 0
    padding = json.loads(capsys.readouterr().out)["padding"]
    assert padding["teacher"] is None and padding["student"]["num_query_groups"] == 4


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


@pytest.mark.e2e
def test_a_full_disk_ends_a_step_with_one_line_and_the_next_start_goes_on(recipe: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        arguments = [str(recipe), f"run_dir={disk}/run"]
        subprocess.run([sys.executable, "-m", "minitron_nemo.cli", "convert", *arguments], timeout=120, check=True)
        prepare = [sys.executable, "-m", "minitron_nemo.cli", "prepare", *arguments]
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        result = subprocess.run(prepare, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
        said = [line for line in result.stderr.splitlines() if line.startswith("minitron: ")]
        assert len(said) == 1 and said[0].startswith(f"minitron: failed: {disk}/run"), result.stderr
        assert said[0].endswith(": No space left on device; make room and start again, and it goes on")
        filler.unlink()
        result = subprocess.run(prepare, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        assert "[prepare] done" in result.stdout
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_plan_says_what_measuring_without_layers_costs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["prune.depth_method=leave_one_out", "prune.depth.samples=3"]
    assert main(["plan", str(recipe), *overrides, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # Of four layers: 4 evaluations of the whole model, and 3, 2, 1 and 0 behind the layer that is left out.
    assert plan["depth_search"] == {"models": 5, "layer_evaluations": 10, "forward_passes": 2.5}
    assert plan["tokens"]["depth"] == 3 * 64 and plan["flops"]["depth"] > 2.5 * plan["flops"]["calibration"] * 3 / 8
    assert main(["plan", str(recipe), *overrides]) == 0
    assert "5 models, 2.5 passes through the layers and 5 through the output, each of 3 seq" in capsys.readouterr().out
    assert main(["plan", str(recipe), "prune.depth_method=block_influence", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["depth_search"] is None and plan["tokens"]["depth"] == 0


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


def test_the_shipped_stages_have_the_published_parameter_counts(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "nemotron4_15b_to_8b_to_4b.yaml"
    assert main(["plan", str(recipe), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    students = [stage["student"]["non_embedding_parameters"] for stage in stages.values()]
    assert students == pytest.approx([6.175e9, 2.618e9], rel=2e-4)
    assert stages["minitron_4b"]["source"] == stages["minitron_8b"]["student"]
    assert stages["minitron_4b"]["teacher"] == stages["minitron_8b"]["teacher"]


def test_plan_of_a_mixture_says_what_a_token_meets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "llama31_8b_to_4b_width.yaml").read_text())
    recipe["model"]["architecture"] = {
        "num_layers": 48,
        "hidden_size": 2048,
        "ffn_hidden_size": 768,
        "moe_ffn_hidden_size": 768,
        "num_moe_experts": 128,
        "moe_router_topk": 8,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "kv_channels": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "family": "qwen3_moe",
        "model_type": "qwen3_moe",
    }
    recipe["prune"] = {"num_moe_experts": 96}
    recipe["parallel"] = {"pipeline_model_parallel_size": 4}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "8 of 128 experts of ffn 768" in shown and "8 of 96 experts of ffn 768" in shown
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["teacher"]["active_parameters"] == pytest.approx(3.353e9, rel=2e-4)
    gone = 48 * 32 * (3 * 2048 * 768 + 2048)  # experts, and rows of routers
    assert plan["teacher"]["parameters"] - plan["student"]["parameters"] == gone
    tensor_parallel = ("parallel.pipeline_model_parallel_size=1", "parallel.tensor_model_parallel_size=4")
    assert "parallel.sequence_parallel" in refused("plan", str(path), *tensor_parallel)
    assert "expert_model_parallel_size" in refused("plan", str(path), "parallel.expert_model_parallel_size=2")


@pytest.mark.parametrize(
    "override",
    [
        "prune.repair.norm_scale=true",
        "prune.repair.hidden=true",
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
