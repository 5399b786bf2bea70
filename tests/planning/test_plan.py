"""What a plan says of shipped recipes: time, fit, layouts, disk, and the keys that decide them."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from benchmarks.plan import LAYOUTS, job_of
from minitron_nemo.cli import main
from minitron_nemo.config import load_recipe
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.gpus import peak_flops_of
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.disk import disk, training_checkpoint_bytes
from minitron_nemo.planning.memory import trained
from minitron_nemo.planning.time import distillation
from minitron_nemo.preflight import Preflight, preflight
from minitron_nemo.stages import plans

RECIPES = Path(__file__).parents[2] / "recipes"
WIDTH = "llama31_8b_to_4b_width"


def plan(name: str, *overrides: str) -> Preflight:
    return preflight(load_recipe(RECIPES / f"{name}.yaml", overrides))


def test_an_update_takes_its_flops_at_the_efficiency_and_its_messages() -> None:
    """Llama 3.1 8B -> 4B on one pipeline stage: a student's and a teacher's forward and backward, 267 GB of TP."""
    found = plan(WIDTH)
    update = found.estimate.update
    assert update is not None
    computing = update.flops / 256 / (0.5 * 989e12)
    sent = sum(each.wire_bytes for each in found.communication[0] if each.group == "tp" and each.part != "gradients")
    assert update.parts["teacher"] + update.parts["student"] == pytest.approx(computing + sent / 450e9, rel=0.002)
    assert update.mfu(989e12) == pytest.approx(update.flops / update.seconds / 256 / 989e12)


def test_a_stated_utilisation_is_what_the_plan_has() -> None:
    update = plan(WIDTH, "cluster.mfu=0.31").estimate.update
    assert update is not None
    assert update.mfu(989e12) == pytest.approx(0.31)
    assert update.seconds == pytest.approx(update.flops / 256 / 989e12 / 0.31)


def test_on_a_cpu_messages_cost_by_their_kind_and_nothing_hides_them() -> None:
    """Two replicas: half of 4 bytes a gradient leaves a rank, and half of 2 a parameter. Two stages: states."""
    sizes = Namespace(layers=4, vocab_size=1024, sequence_length=128, microbatches=4, chunk_bytes=2**20)
    beside = Device(peak_flops=1e11, link={"reduce_scatter": 1e9, "all_gather": 2e9, "send": 4e9})
    job = job_of(sizes, 2, Layout(), False)
    job.recipe.train.overlap_grad_reduce = job.recipe.train.overlap_param_gather = True
    elements = trained(job.student, job.layout, 0, 2, 2)["weights"] // 2
    found = [distillation(job, job.segments[0], each, 0.5) for each in (replace(beside, cpu=True), beside)]
    assert found[0].parts["gradients and parameters"] == pytest.approx(elements * 2 / 1e9 + elements / 2e9)
    assert found[1].parts["gradients and parameters"] == 0
    job = job_of(sizes, 2, Layout(1, 2, 2), False)
    found = [distillation(job, job.segments[0], each, 0.5) for each in (replace(beside, cpu=True), beside)]
    # Of four stages each rank has two: it sends three states of every microbatch, forward or back.
    assert found[0].parts["pipeline messages"] == pytest.approx(4 * 3 * 128 * 576 * 2 / 4e9)
    assert found[1].parts["pipeline messages"] == 0


def test_errors_of_the_measured_layouts_are_those_that_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of docs/evidence/plan.md, predicted anew from the device's figures there, and the line below layouts."""
    page = (RECIPES.parent / "docs" / "evidence" / "plan.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| tp=")]
    sizes = Namespace(layers=12, vocab_size=8192, sequence_length=256, microbatches=4, chunk_bytes=2**24)
    link = {"all_reduce": 0.91e9, "all_gather": 0.62e9, "reduce_scatter": 0.35e9, "send": 2.2e9}
    device = Device(peak_flops=85e9, memory_bandwidth=12.4e9, link=link, cpu=True)
    longer: dict[bool, list[float]] = {True: [], False: []}
    for (processes, layout, recompute), row in list(zip(LAYOUTS, rows, strict=True))[:-1]:
        measured, predicted = float(row[9]), float(row[10])
        job = job_of(sizes, processes, layout, recompute)
        assert distillation(job, job.segments[0], device, 0.738).seconds == pytest.approx(predicted, rel=0.005)
        assert row[11] == f"{predicted / measured - 1:+.1%}"
        longer[layout.tensor_model_parallel_size > 1].append(measured / predicted - 1)
    said = f"took {min(longer[True]):.0%} to {max(longer[True]):.0%} longer than predicted"
    rest = f"the rest {max(map(abs, longer[False])):.0%} at most"
    recipe = str(RECIPES / f"{WIDTH}.yaml")
    assert main(["plan", recipe, "--layouts", "cluster.nodes=1"]) == 0
    out = capsys.readouterr().out
    assert said in out and rest in out
    assert main(["plan", recipe, "cluster.nodes=1"]) == 0
    assert said not in capsys.readouterr().out


def test_recomputation_costs_a_third_of_the_students_layers_and_saves_activations() -> None:
    kept, again = plan(WIDTH).estimate, plan(WIDTH, "train.recompute=true").estimate
    assert kept.update is not None and again.update is not None
    ratio = again.update.parts["student"] / kept.update.parts["student"]
    assert 1.25 < ratio < 1.4  # less for the output's products, more for the messages of repeated layers
    trained = [
        max((each for each in plan.memory if each.step == "distill"), key=lambda each: each.total)
        for plan in (kept, again)
    ]
    activations = [each.parts["activations"] for each in trained]
    assert activations[1] < 0.2 * activations[0]


def test_pipeline_bubbles_are_those_of_the_schedules() -> None:
    """36 microbatches: (p - 1) / m, a half with two virtual stages; windows each fill the pipeline anew."""
    deep = ("parallel.pipeline_model_parallel_size=4", "parallel.tensor_model_parallel_size=2")
    virtual = "parallel.virtual_pipeline_model_parallel_size=2"
    for overrides, share in (((), 3 / 36), ((virtual,), 3 / 72)):
        update = plan(WIDTH, *deep, *overrides).estimate.update
        assert update is not None
        assert update.bubbles == pytest.approx({"student": share, "teacher": share})
    update = plan(WIDTH, *deep, f"teacher.buffer_bytes={9 * 8192 * 4096}").estimate.update
    assert update is not None
    assert update.bubbles["student"] == pytest.approx(3 / 9)


@pytest.mark.slow
def test_layouts_are_ranked_fit_and_pass_every_check_of_a_recipe() -> None:
    small = (
        "cluster.nodes=1",
        "cluster.processes_per_node=4",
        "train.global_batch_size=32",
        "data.sequence_length=4096",
    )
    own = "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"
    found = plan(WIDTH, *small, *own).estimate.layouts
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert [each.own for each in found].count(True) == 1
    for each in found:
        virtual = each.layout.virtual_pipeline_model_parallel_size
        keys = (
            f"parallel.tensor_model_parallel_size={each.layout.tensor_model_parallel_size}",
            f"parallel.pipeline_model_parallel_size={each.layout.pipeline_model_parallel_size}",
            f"parallel.virtual_pipeline_model_parallel_size={virtual or 'null'}",
            f"parallel.sequence_parallel={each.layout.sequence_parallel}",
            f"train.recompute={each.recompute}",
        )
        alone = plan(WIDTH, *small, *keys).estimate
        assert alone.update is not None
        assert alone.update.seconds == pytest.approx(each.seconds)
        assert alone.fullest[0].total == each.fullest.total
        assert each.own or each.fullest.total <= 0.9 * 80e9


@pytest.mark.slow
def test_the_recipes_own_layout_is_listed_with_recomputation_where_it_fits_only_so() -> None:
    """On 16 GPUs it takes 29.0 GB of a rank, and 28.8 may be filled."""
    found = plan(WIDTH, "cluster.nodes=2", "cluster.gpu_memory_bytes=32e9").estimate.layouts
    (own,) = [each for each in found if each.own]
    assert not own.recompute and own.fullest.total > 0.9 * 32e9
    (again,) = [each for each in found if each.layout == own.layout and each is not own]
    assert again.recompute and again.fullest.total <= 0.9 * 32e9
    found = plan(WIDTH, "cluster.nodes=2").estimate.layouts
    assert [each.own for each in found if each.layout == own.layout] == [True]


def test_layouts_beside_a_separate_teacher_fit_the_whole_job_too() -> None:
    """Of 160 processes 128 train the student. 64 for a copy of it divide these, but not the 160 that evaluate it."""
    teacher = "teacher.placement=separate", "teacher.processes=32", "cluster.nodes=20"
    of_teacher = (f"teacher.layout.{key}" for key in ("tensor_model_parallel_size=8", "sequence_parallel=true"))
    found = plan("nemotron4_15b_to_minitron_8b", *teacher, *of_teacher).estimate.layouts
    assert {each.layout.model_parallel_size for each in found} == {1, 2, 4, 8, 16, 32}


@pytest.mark.parametrize("teacher", ["source", "previous"])
@pytest.mark.slow
def test_layouts_of_a_later_stage_are_all_that_its_recipe_may_have(teacher: str) -> None:
    """The 15B model, which every stage evaluates, has an FFN that three ranks share, and not nine as the others'."""
    small = (
        "cluster.nodes=1",
        "cluster.processes_per_node=9",
        "cluster.gpu_memory_bytes=1e15",
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "data.sequence_length=4068",
        "train.global_batch_size=36",
        "teacher.correction.steps=0",
        "stages.minitron_8b.prune.ffn_hidden_size=18432",
        f"stages.minitron_4b.teacher.model={teacher}",
    )

    def stage(*keys: str) -> Preflight:
        recipe = load_recipe(RECIPES / "nemotron4_15b_to_8b_to_4b.yaml", [*small, *keys])
        return plans(recipe)[-1]

    assert [model.ffn_hidden_size % 9 for model in (stage().original, stage().source, stage().student)] == [6, 0, 0]
    accepted = set()
    for tensor, pipeline, virtual in product((1, 3, 9), (1, 3, 9), (1, 2, 4, 8)):
        sizes = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual}
        keys = [f"stages.minitron_4b.parallel.{name}_model_parallel_size={size}" for name, size in sizes.items()]
        with suppress(UserError):
            accepted.add(stage(*keys, f"stages.minitron_4b.parallel.sequence_parallel={tensor > 1}").layout)
    assert {each.layout for each in stage().estimate.layouts} == accepted
    assert {each.tensor_model_parallel_size for each in accepted} == {1, 3}


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / f"{WIDTH}.yaml")
    assert main(["plan", recipe, "cluster.gpu_memory_bytes=20e9"]) == 0
    assert "DOES NOT FIT into 90% of the 20 GB" in capsys.readouterr().out
    assert main(["plan", recipe, "cluster.gpu=null"]) == 0
    out = capsys.readouterr().out
    assert "set cluster.gpu or cluster.gpu_memory_bytes" in out and "not known: set cluster.gpu" in out


def test_memory_with_the_other_recomputation_is_that_of_a_recipe_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    kept, again = plan(WIDTH).estimate, plan(WIDTH, "train.recompute=true").estimate
    assert kept.other_recompute == again.fullest[0] and again.other_recompute == kept.fullest[0]
    assert kept.other_recompute != kept.fullest[0]
    assert plan(WIDTH, "train.steps=0", "teacher.correction.steps=0").estimate.other_recompute is None
    assert main(["plan", str(RECIPES / f"{WIDTH}.yaml")]) == 0
    out = capsys.readouterr().out
    assert f"{again.fullest[0].total / 1e9:.3g} GB with train.recompute, fullest in repair: fits into 90%" in out


def test_what_a_job_needs_without_transformer_engine_is_said_unless_a_container_brings_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = plan(WIDTH).estimate
    assert found.without_transformer_engine is not None
    scores = 2 * 8 * 8192**2 * 32  # in bf16: of 8 of the teacher's heads on a rank, in its correction, of all layers
    assert found.without_transformer_engine - found.fullest[0].total > 2 * scores
    assert main(["plan", str(RECIPES / f"{WIDTH}.yaml")]) == 0
    assert "has none: DOES NOT FIT into 90% of the 80 GB" in capsys.readouterr().out
    assert plan(WIDTH, "cluster.container=image.sqsh").estimate.without_transformer_engine is None
    assert plan(WIDTH, "cluster.gpu=null").estimate.without_transformer_engine is None


@pytest.mark.parametrize(
    ("name", "peak_flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA RTX A1000 6GB Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_a_gpu_is_known_by_a_whole_word_of_its_name(name: str, peak_flops: float | None) -> None:
    assert peak_flops_of(name) == peak_flops


def test_repairs_take_their_passes_and_sums() -> None:
    found = plan(WIDTH)
    a_pass = (
        found.flops["calibration"] / found.tokens["calibration"] - 2 * 128256 * 4096
    )  # which ends before the logits
    sums = 2 * (
        32 * 14336 * 9216 + 65 * (4096 + 3072) * 3072
    )  # of the FFN and of the norms that channels are read from
    assert found.flops["repair"] == found.tokens["repair"] * (5 * a_pass + sums)
    assert plan(WIDTH, "prune.repair.ffn=false", "prune.repair.hidden=false").flops["repair"] == 0


def test_model_and_text_that_are_not_here_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "data.train[0].path: data/pretraining/*.jsonl is not here"
    model = "model.source: checkpoints/Llama-3.1-8B is not here; sizes are those of model.architecture"
    assert main(["plan", str(RECIPES / f"{WIDTH}.yaml")]) == 0
    said = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said[:2] == [model, text]
    (tmp_path / "data" / "pretraining").mkdir(parents=True)
    assert plan(WIDTH).warnings[:2] == (model, text)
    (tmp_path / "data" / "pretraining" / "1.jsonl").touch()
    assert plan(WIDTH).warnings[0] == model and text not in plan(WIDTH).warnings
    held_out = plan(WIDTH, "data.heldout=[{path: data},{path: nowhere}]").warnings
    assert held_out[1] == "data.heldout[1].path: nowhere is not here"
    stages = plans(load_recipe(RECIPES / "nemotron4_15b_to_8b_to_4b.yaml"))
    assert [sum("is not here" in said for said in stage.warnings) for stage in stages] == [1, 0]


@pytest.mark.slow
def test_json_has_memory_of_every_rank_and_the_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "quickstart.yaml")
    assert main(["plan", recipe, "--json", "train.peak_flops=1e12"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(each["step"], each["pipeline_rank"]) for each in found["memory"]} == {
        (step, rank) for step in ("calibrate", "repair", "correct", "distill") for rank in (0, 1)
    }
    assert all(sum(each["parts"].values()) == each["total"] for each in found["memory"])
    assert found["device_hours"] == pytest.approx(2 * sum(found["seconds"].values()) / 3600)
    assert [each["own"] for each in found["layouts"]].count(True) == 1
    assert found["memory_other_recompute"]["total"] < max(each["total"] for each in found["memory"])


def test_a_separate_teacher_is_waited_for_where_it_is_slower() -> None:
    separate = (
        "teacher.placement=separate",
        "teacher.processes=32",
        "teacher.layout.tensor_model_parallel_size=8",
        "teacher.layout.sequence_parallel=true",
        "cluster.nodes=36",
    )
    found = plan(WIDTH, *separate).estimate
    assert found.update is not None
    # 32 GPUs for what 256 would do beside the student.
    assert found.update.parts["waiting"] > found.update.parts["student"]
    assert {each.step for each in found.memory} == {"calibrate", "repair", "correct", "distill", "distill (teacher)"}


@pytest.mark.slow
def test_a_training_checkpoint_is_as_large_as_one_that_was_written() -> None:
    """The quickstart's student has one of 1,399 MiB (docs/evidence/costs.md)."""
    found = plan("quickstart")
    assert training_checkpoint_bytes(found.student, 2) / 2**20 == pytest.approx(1399, rel=0.005)
    kept = {each.what: each for each in disk(found.job)}
    assert kept["distillation, checkpoints"].count == 3
    validated = replace(found.recipe, train=replace(found.recipe.train, eval_interval=10))
    assert {each.what: each for each in disk(replace(found.job, recipe=validated))}[
        "distillation, checkpoints"
    ].count == 4


def test_the_disk_of_stages_has_the_converted_model_once_and_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 15.63B, 8.27B and 4.19B parameters: students are pruned, repaired, distilled, exported, checkpointed."""
    recipe = RECIPES / "nemotron4_15b_to_8b_to_4b.yaml"
    kept = [[each.what for each in stage.estimate.disk] for stage in plans(load_recipe(recipe))]
    assert kept[0] == ["teacher, converted", *kept[1]]
    assert main(["plan", str(recipe)]) == 0
    rows = (24576 - 16384) * 16384 + (16384 - 9216) * 9216  # of removed neurons, in each of 32 layers' matrices
    # Behind two norms of each layer and the last one a matrix, a gain and a bias.
    norms = (6144 + 2) * 4096 + (4096 + 2) * 3072
    total = 15.629 * 2 + (8.272 + 4.191) * (3 * 2 + 3 * 14) + (32 * rows + 65 * norms) * 4 / 1e9
    assert f"\n{'disk':<26}{total:.3g} GB (arithmetic)\n" in capsys.readouterr().out.partition("all stages")[2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.gpu=h100", "cluster.gpu: 'h100' is not one of None, gb200, .*h100-80gb"),
        ("cluster.gpu_memory_bytes=0", "cluster.gpu_memory_bytes: 0 must be greater than 0"),
        ("cluster.mfu=41", "cluster.mfu: 41 must be a share, above 0 and up to 1"),
        ("cluster.mfu=0.99", r"cluster.mfu: 0.99 is more than the 0\.\d+ that this layout has"),
    ],
)
def test_figures_of_a_device_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        assert plan(WIDTH, override).estimate.update
