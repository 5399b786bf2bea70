"""A recipe that cannot be run is refused by `minitron plan`, in one line that names the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_nemo.cli import main
from minitron_nemo.config import load_recipe
from minitron_nemo.errors import UserError
from minitron_nemo.preflight import preflight

RECIPES = Path(__file__).parents[2] / "recipes"
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
@pytest.mark.fast_cases(13)
def test_plan_checks_the_search(refused: Callable[..., str], recipe: Path, override: str, words: str) -> None:
    sizes = ("prune.num_layers=null", "distill.intermediate.pairs=[]")
    assert words in refused("plan", str(recipe), *sizes, *override.split())


def test_a_search_has_no_stage(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["search", str(recipe), "--stage", "larger"])
    assert "unrecognized arguments: --stage larger" in capsys.readouterr().err


PP2 = "parallel.pipeline_model_parallel_size=2 cluster.processes_per_node=2"
TP2 = "parallel.tensor_model_parallel_size=2 cluster.processes_per_node=2"
TP2_SP = f"{TP2} parallel.sequence_parallel=true"
NO_TRAINING = "train.steps=0 teacher.correction.steps=0"  # sequences are read all the same
TEACHER_PP2 = "teacher.layout.pipeline_model_parallel_size=2"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.learning_rate=1", "train.learning_rate"),
        ("train.steps=many", "train.steps"),
        ("stages=[one]", "a list stands where there are keys"),
        ("train.steps=-1", "train.steps: -1 must not be negative"),
        ("prune.calibration.first_sample=-5", "prune.calibration.first_sample: -5 must not be negative; 0 begins with"),
        (
            f"{TP2_SP} data.sequence_length=63 {NO_TRAINING}",
            "data.sequence_length: 63 is not a multiple of parallel.ten",
        ),
        ("evaluate.generate_prompt_tokens=0", "evaluate.generate_prompt_tokens: 0 must be greater than 0"),
        ("evaluate.generate_batch_sizes=[]", "evaluate.generate_batch_sizes: [] must be sizes of batches"),
        ("evaluate.generate_batch_sizes=[4,0]", "evaluate.generate_batch_sizes: [4, 0]"),
        ("evaluate.tasks=[nowhere.jsonl]", "evaluate.tasks: nowhere.jsonl: no such file"),
        ("evaluate.sequence_length=-5", "evaluate.sequence_length: -5 must be greater than 0"),
        ("evaluate.generate_tokens=-1", "evaluate.generate_tokens: -1 must not be negative; 0 generates nothing"),
        ("data.heldout=[] data.heldout_fraction=0", "data.heldout_fraction: 0, without data.heldout, leaves nothing"),
        ('data.train=[{"path":"a","weight":1},{"path":"b"}]', "data.train: b has no weight, but others have"),
        ('data.train=[{"path":"a","weight":0}]', "data.train: weight 0.0 is not positive; remove the source"),
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
        ("evaluate.sequence_length=513", "evaluate.sequence_length: 513 is longer than the model's max_position_em"),
        (f"{TP2_SP} {NO_TRAINING} evaluate.sequence_length=63", "evaluate.sequence_length: 63 is not a multiple of"),
        (f"{TP2} evaluate.sequence_length=63", "evaluate.sequence_length: 63 is not a multiple of parallel.tensor_m"),
    ],
)
@pytest.mark.fast_cases(24)
def test_plan_names_the_key_that_is_wrong(refused: Callable[..., str], recipe: Path, override: str, key: str) -> None:
    assert key in refused("plan", str(recipe), *override.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    ["train.eval_interval=0", "distill.logits_weight=0 distill.ce_weight=1", "teacher.placement=cached"],
)
def test_only_a_teachers_states_are_split_without_sequence_parallelism(recipe: Path, override: str) -> None:
    wanted = f"{TP2} evaluate.sequence_length=63 distill.intermediate.pairs=[] {override}"
    assert preflight(load_recipe(recipe, wanted.split())).layout.tensor_model_parallel_size == 2


def test_tasks_that_are_none_are_refused_before_anything_runs(
    refused: Callable[..., str], recipe: Path, tmp_path: Path
) -> None:
    broken, one, other = tmp_path / "broken.jsonl", tmp_path / "one" / "task.jsonl", tmp_path / "other" / "task.jsonl"
    question = {"context": "Too big is the", "choices": [" box", " cup"], "answer": 1}
    broken.write_text(json.dumps(question | {"answer": 2}))
    for task in (one, other):
        task.parent.mkdir()
        task.write_text(json.dumps(question))
    assert f"evaluate.tasks: {broken}:1: answer must be" in refused("plan", str(recipe), f"evaluate.tasks=[{broken}]")
    twice = refused("plan", str(recipe), f"evaluate.tasks=[{one},{other}]")
    assert "evaluate.tasks: two of them are called task; rename one" in twice


MIXTRAL = (
    "model.architecture={family: mixtral, model_type: mixtral, rope_scaling: null, num_moe_experts: 8,"
    " moe_router_topk: 2, moe_ffn_hidden_size: 14336}"
)


@pytest.mark.parametrize(
    ("source", "to", "words"),
    [
        ("model.architecture.rope_scaling.factor=4.0", "bridge", None),
        ("model.architecture.rope_scaling.low_freq_factor=2.0", "nemo", None),
        ("model.architecture.rope_scaling.low_freq_factor=2.0", "bridge", "rope_scaling"),
        ("model.architecture.model_type=mistral", "nemo", "NeMo's MistralModel has no rotary scaling"),
        (MIXTRAL, "nemo", "NeMo has no classes for mixtral"),
        (MIXTRAL, "bridge", "mixtral: mixtures of experts are not written for NeMo and Megatron-Bridge"),
    ],
)
def test_a_student_that_a_format_cannot_express_is_refused(source: str, to: str, words: str | None) -> None:
    sizes = ["prune.ffn_hidden_size=null", "prune.hidden_size=null"]
    recipe = load_recipe(RECIPES / "llama31_8b_to_4b_width.yaml", [source, *sizes, f"export.formats=[hf,{to}]"])
    if words is None:
        assert preflight(recipe).recipe.export.formats == ["hf", to]
    else:
        with pytest.raises(UserError, match=f"^export.formats: {to}: {words}.*; (use|export to) another format, e.g. "):
            preflight(recipe)


def test_context_parallelism_is_for_trainings(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which only needs TransformerEngine, and refuses what would measure a model within a training."""
    monkeypatch.setattr("minitron_nemo.parallel.layout.has_transformer_engine", lambda: True)
    halves = ["parallel.context_parallel_size=2", "cluster.processes_per_node=2"]
    with pytest.raises(UserError, match=r"^train\.eval_interval: 3 asks for validations.*; set it to 0$"):
        preflight(load_recipe(recipe, halves))
    said = preflight(load_recipe(recipe, [*halves, "train.eval_interval=0"])).warnings
    assert [words for words in said if "run `minitron distill` alone with it" in words]
    assert not [words for words in preflight(load_recipe(recipe)).warnings if "minitron distill" in words]


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


def test_a_job_that_ends_with_the_pruning_needs_no_place_for_the_teacher(recipe: Path) -> None:
    of = load_recipe(recipe, ["teacher.placement=separate", "teacher.layout={}", "teacher.processes=4"])
    with pytest.raises(UserError, match="leaves no process"):
        preflight(of, 2)
    assert preflight(of, 2, distils=False).worlds is None


def test_a_recipe_that_is_not_there_or_not_yaml(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no such recipe" in refused("plan", str(tmp_path / "none.yaml"))
    (tmp_path / "broken.yaml").write_text("name: [")
    assert "broken.yaml" in refused("plan", str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        "prune.repair.norm_scale=true",
        "prune.hidden_method=rotate",
    ],
)
def test_what_needs_rms_norm_is_refused_before_anything_runs(refused: Callable[..., str], override: str) -> None:
    recipe = RECIPES / "nemotron4_15b_to_minitron_8b.yaml"
    assert f"{override.partition('=')[0]}: " in refused("plan", str(recipe), override)


@pytest.mark.slow
def test_a_tied_model_is_rotated_only_at_the_stated_price_of_an_output(
    refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(RECIPES / "quickstart.yaml"), "prune.hidden_size=432"]
    message = refused(*arguments, "prune.hidden_method=rotate")
    assert "set prune.untie to true, at 21,233,664 parameters, or use select" in message
    parameters = []
    for more in ([], ["prune.hidden_method=rotate", "prune.untie=true"]):
        assert main([*arguments, *more, "--json"]) == 0
        parameters.append(json.loads(capsys.readouterr().out)["student"]["parameters"])
    assert parameters[1] - parameters[0] == 49152 * 432
