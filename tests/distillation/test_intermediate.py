"""Intermediate losses: against Hugging Face models in fp64, on any stage of any layout; their map is training state."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import IntermediateConfig, TrainConfig
from minitron_nemo.distillation.balance import check_weight
from minitron_nemo.distillation.intermediate import IntermediateLoss, Pair, deliveries, resolve_pairs
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import ddp_config
from minitron_nemo.distillation.step import SUMS, Step
from minitron_nemo.distillation.teacher import ColocatedTeacher
from minitron_nemo.errors import UserError
from minitron_nemo.models.build import build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.distillation.reference import random_microbatches, states_of
from tests.distillation.runs import Job, Result, assert_identical, run
from tests.distillation.test_step import LAYOUTS, SEQUENCE, own_share, whole_gradients, worst_gradient
from tests.families import write_tiny
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

# The embedding's output, states of the first, a middle and the last stage; from the teacher's last stage to the
# student's first and the other way round.
PAIRS = [[-1, -1], [3, 0], [1, 2], [0, 3]]
ALPHA = 0.37


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "teacher_hf", seed=0)
    write_tiny_llama(root / "student_hf", hidden_size=48, ffn_hidden_size=64, seed=1)
    write_tiny_llama(root / "tied_hf", hidden_size=48, ffn_hidden_size=64, tied=True, seed=2)
    write_tiny_llama(root / "wide_hf", ffn_hidden_size=64, num_layers=3, seed=3)
    write_tiny_llama(root / "deep_hf", num_layers=6, seed=4)
    paths: dict[str, Path] = {}
    for name in ("teacher", "student", "tied", "wide", "deep"):
        convert(root / f"{name}_hf", root / name, "megatron")
        paths |= {name: root / name, f"{name}_hf": root / f"{name}_hf"}
    return paths


@dataclass(frozen=True)
class Expected:
    hidden: float
    gradients: dict[str, Tensor]
    projection: Tensor | None


def projection_of(models: dict[str, Path], student: str) -> Tensor | None:
    widths = [Architecture.load(models[name]).hidden_size for name in ("teacher", student)]
    if widths[0] == widths[1]:
        return None
    return torch.randn(*widths, generator=torch.Generator().manual_seed(5)) * 0.2


def expected_intermediate(
    models: dict[str, Path],
    student: str,
    pairs: list[list[int]],
    kind: str,
    alpha: float = ALPHA,
    teacher: str = "teacher",
) -> Expected:
    """By the book: the gradient of (sum of KL + alpha * sum over pairs of the distance) / tokens."""
    own, other = (
        AutoModelForCausalLM.from_pretrained(models[f"{name}_hf"], dtype=torch.float64, attn_implementation="eager")
        for name in (student, teacher)
    )
    own_states, other_states = states_of(own), states_of(other)
    projection = projection_of(models, student)
    if projection is not None:
        projection = projection.double().requires_grad_()
    total, hidden, tokens = torch.zeros([], dtype=torch.float64), torch.zeros([], dtype=torch.float64), 0
    for batch in random_microbatches(4, sequence_length=SEQUENCE):
        weights = batch["token_weights"].double()
        tokens += int((weights != 0).sum())
        q = own(batch["tokens"]).logits.log_softmax(-1)
        with torch.no_grad():
            p = other(batch["tokens"]).logits.log_softmax(-1)
        total = total + (weights * (p.exp() * (p - q)).sum(-1)).sum()
        for teacher_state, student_state in pairs:
            y, t = own_states[student_state], other_states[teacher_state].detach()
            y = y if projection is None else y @ projection.T
            apart = 1 - functional.cosine_similarity(y, t, dim=-1) if kind == "cosine" else (y - t).square().mean(-1)
            hidden = hidden + (weights * apart).sum()
    ((total + alpha * hidden) / tokens).backward()
    gradients = {name: parameter.grad for name, parameter in own.named_parameters() if parameter.grad is not None}
    return Expected(hidden.item(), gradients, None if projection is None else projection.grad)


def built_step(
    layout: Layout,
    paths: tuple[Path, Path],
    config: IntermediateConfig,
    train: TrainConfig,
    projection: Tensor | None,
    buffer_bytes: int = 2**30,
    teacher_layout: Layout | None = None,
) -> Step:
    launch.initialize(layout, seed=1)
    student = build_model(
        Architecture.load(paths[0]), layout, dtype=torch.float32, ddp=ddp_config(train), recompute=train.recompute
    )
    model = build_model(Architecture.load(paths[1]), teacher_layout or layout, dtype=torch.float32)
    load_model(student, paths[0])
    load_model(model, paths[1])
    pairs = resolve_pairs(config, model.architecture, student.architecture)
    intermediate = IntermediateLoss(student, model.architecture, pairs, config, seed=1)
    for chunk in intermediate.chunks:
        chunk.module.weight.data.copy_(projection)
    teacher = ColocatedTeacher(
        model,
        sequence_length=SEQUENCE,
        micro_batch_size=1,
        buffer_bytes=buffer_bytes,
        student_layout=layout,
        deliveries=deliveries(pairs, model, student),
    )
    return Step(
        student,
        teacher,
        DistillationObjective(),
        intermediate=intermediate,
    )


def projection_gradient(step: Step) -> Tensor | None:
    """Each data-parallel rank's shard gathered."""
    assert step.intermediate is not None
    if step.intermediate.projection is None:
        return None
    group = parallel_state.get_data_parallel_group()
    (buffer,) = step.intermediate.projection.buffers
    (bucket,) = buffer.buckets
    shards = list(bucket.grad_data.chunk(group.size()))
    torch.distributed.all_gather(shards, shards[group.rank()].clone(), group=group)
    return step.intermediate.projection.module.weight.main_grad.clone()


def one_step(*args: Any, expected: Expected, times: int = 1, **kwargs: Any) -> tuple[float, tuple[float, str], Any]:
    """On a rank: the loss over all ranks that own pairs, the worst gradient of the student, that of the map."""
    step = built_step(*args, **kwargs)
    for _ in range(times):
        sums = step(own_share(random_microbatches(4, sequence_length=SEQUENCE)))
    for group in (parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        torch.distributed.all_reduce(sums, group=group)
    assert sums[SUMS.index("nonfinite")] == 0
    assert sums[SUMS.index("alpha_hidden")] == pytest.approx(ALPHA * sums[SUMS.index("hidden")].item())
    worst = worst_gradient(whole_gradients(step.student), expected.gradients, groups=4)
    return sums[SUMS.index("hidden")].item(), worst, projection_gradient(step)


def check(outcomes: list[Any], expected: Expected, owners: int) -> None:
    for hidden, (error, name), _ in outcomes:
        assert hidden == pytest.approx(expected.hidden, rel=1e-5)
        assert error < 1e-5, name
    found = [gradient for _, _, gradient in outcomes if gradient is not None]
    assert len(found) == owners
    for gradient in found:
        assert expected.projection is not None
        error = (gradient - expected.projection).abs().max() / expected.projection.abs().max()
        assert error < 1e-5


def train_config(**settings: Any) -> TrainConfig:
    return TrainConfig(steps=1, global_batch_size=4, precision="fp32", **settings)


@pytest.mark.parametrize(
    ("layout", "recompute"), [(layout, False) for layout in LAYOUTS] + [("TP2 SP", True), ("PP2 VPP2", True)]
)
@pytest.mark.fast_cases(1)
def test_loss_and_gradients_match_the_fp64_formula(models: dict[str, Path], layout: str, recompute: bool) -> None:
    world_size, sizes = LAYOUTS[layout]
    expected = expected_intermediate(models, "student", PAIRS, "cosine")
    outcomes = run_distributed(
        world_size,
        one_step,
        sizes,
        (models["student"], models["teacher"]),
        IntermediateConfig(pairs=PAIRS, alpha=ALPHA),
        train_config(recompute=recompute),
        projection_of(models, "student"),
        expected=expected,
    )
    check(outcomes, expected, owners=world_size)


DEEP_PAIRS = [[-1, -1], [5, 0], [3, 2], [0, 3]]  # with the teacher of six layers


def check_other_split(
    models: dict[str, Path], world_size: int, student: Layout, teacher: Layout, owners: int, buffer_bytes: int
) -> None:
    """The student of four layers and the teacher of six on the same ranks, each with its own stages."""
    expected = expected_intermediate(models, "student", DEEP_PAIRS, "cosine", teacher="deep")
    outcomes = run_distributed(
        world_size,
        one_step,
        student,
        (models["student"], models["deep"]),
        IntermediateConfig(pairs=DEEP_PAIRS, alpha=ALPHA),
        train_config(),
        projection_of(models, "student"),
        expected=expected,
        buffer_bytes=buffer_bytes,
        teacher_layout=teacher,
        timeout=400.0,
    )
    check(outcomes, expected, owners)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (Layout(1, 2, num_layers_per_stage=(1, 3)), Layout(1, 2, 2, num_layers_per_stage=(2, 1, 2, 1))),
        (Layout(1, 2, 2), Layout(1, 2, num_layers_per_stage=(2, 4))),
    ],
    ids=str,
)
def test_a_colocated_teacher_may_have_its_own_stages(models: dict[str, Path], student: Layout, teacher: Layout) -> None:
    """In windows as small as the pipeline allows."""
    check_other_split(models, 2, student, teacher, owners=2, buffer_bytes=1)


def run_twice(job: Job, other: Layout) -> list[Result]:
    return [run(job), run(replace(job, teacher_layout=other, directory=job.directory.with_name("other")))]


@pytest.mark.slow
def test_another_split_of_the_teacher_changes_no_bit_of_a_training(models: dict[str, Path], tmp_path: Path) -> None:
    """With validations and a checkpoint in between."""
    job = Job(
        models["student"],
        models["deep"],
        tmp_path / "same",
        layout=Layout(1, 2, 2),
        config={"eval_interval": 2, "save_interval": 3},
        intermediate=IntermediateConfig(pairs=DEEP_PAIRS),
        buffer_bytes=1,
    )
    results = run_distributed(2, run_twice, job, Layout(1, 2, num_layers_per_stage=(4, 2)))
    assert_identical([same for same, _ in results], [other for _, other in results])
    for name in ("same", "other"):
        assert (tmp_path / name / "training" / "iter_0000003").is_dir()


@pytest.mark.parametrize("student", ["tied", "wide"])
def test_mean_squared_error_tied_embeddings_and_equal_widths(models: dict[str, Path], student: str) -> None:
    """`wide` has the teacher's width: no map; `auto` pairs it, as it has a layer less."""
    world_size, sizes = LAYOUTS["PP2"]
    pairs = [[1, 0]] if student == "wide" else PAIRS
    expected = expected_intermediate(models, student, pairs, "mse")
    outcomes = run_distributed(
        world_size,
        one_step,
        sizes,
        (models[student], models["teacher"]),
        IntermediateConfig(pairs="auto" if student == "wide" else pairs, loss="mse", alpha=ALPHA),
        train_config(),
        projection_of(models, student),
        expected=expected,
    )
    check(outcomes, expected, owners=0 if student == "wide" else world_size)


@pytest.mark.slow
def test_states_after_a_layer_norm_match_the_fp64_formula_too(tmp_path: Path) -> None:
    models: dict[str, Path] = {}
    shapes: dict[str, dict[str, int]] = {
        "teacher": {},
        "student": {"hidden_size": 48, "ffn_hidden_size": 64, "seed": 1},
    }
    for name, shape in shapes.items():
        models |= {name: tmp_path / name, f"{name}_hf": write_tiny("nemotron", tmp_path / f"{name}_hf", **shape)}
        convert(models[f"{name}_hf"], models[name], "megatron")
    world_size, sizes = LAYOUTS["TP2 SP"]
    expected = expected_intermediate(models, "student", PAIRS, "cosine")
    outcomes = run_distributed(
        world_size,
        one_step,
        sizes,
        (models["student"], models["teacher"]),
        IntermediateConfig(pairs=PAIRS, alpha=ALPHA),
        train_config(),
        projection_of(models, "student"),
        expected=expected,
    )
    check(outcomes, expected, owners=world_size)


def gradients_of(*args: Any, **kwargs: Any) -> tuple[int, dict[str, Tensor]]:
    """On a rank: the window, and all gradients of the second of two equal steps."""
    step = built_step(*args, **kwargs)
    for _ in range(2):
        step(own_share(random_microbatches(4, sequence_length=SEQUENCE)))
    gradients = whole_gradients(step.student)
    projection = projection_gradient(step)
    assert step.teacher is not None
    return step.teacher.window, gradients if projection is None else gradients | {"projection": projection}


@pytest.mark.parametrize("layout", ["PP2 VPP2", "DP2"])
@pytest.mark.fast_cases(1)
def test_small_teacher_windows_and_overlap_give_the_same_gradients_bit_for_bit(
    models: dict[str, Path], layout: str
) -> None:
    world_size, sizes = LAYOUTS[layout]
    common = (
        sizes,
        (models["student"], models["teacher"]),
        IntermediateConfig(pairs=PAIRS, alpha=ALPHA),
    )
    projection = projection_of(models, "student")
    whole = run_distributed(world_size, gradients_of, *common, train_config(), projection)
    overlapped = train_config(overlap_grad_reduce=True, recompute=True)
    parts = run_distributed(world_size, gradients_of, *common, overlapped, projection, buffer_bytes=1)
    for (window, gradients), (small, others) in zip(whole, parts, strict=True):
        assert window >= 4
        assert small == sizes.pipeline_model_parallel_size
        assert gradients.keys() == others.keys() >= {"projection"}
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, others[name], rtol=0, atol=0, msg=name)


def test_a_window_counts_the_states_of_the_pairs(models: dict[str, Path]) -> None:
    """A microbatch's final states take 16 x 64 x 4 bytes; four pairs on one rank hold five times that."""
    size = SEQUENCE * 64 * 4
    (outcome,) = run_distributed(
        1,
        gradients_of,
        Layout(),
        (models["student"], models["teacher"]),
        IntermediateConfig(pairs=PAIRS, alpha=ALPHA),
        train_config(),
        projection_of(models, "student"),
        buffer_bytes=5 * size * 3 - 1,
    )
    assert outcome[0] == 2


def interrupted(job: Job, at: int) -> list[Result]:
    """On a rank: the run asked to stop before update `at`, then the run that goes on from there."""
    return [run(job, {at: lambda: signal.raise_signal(signal.SIGUSR1)}), run(job)]


@pytest.mark.parametrize("layout", ["PP2", pytest.param("TP2 SP", marks=pytest.mark.slow), "DP2"])
@pytest.mark.slow
def test_a_resumed_run_with_dynamic_weights_is_bit_identical(
    models: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    world_size, sizes = LAYOUTS[layout]
    job = Job(
        models["student"],
        models["teacher"],
        tmp_path / "whole",
        layout=sizes,
        intermediate=IntermediateConfig(pairs=PAIRS),
        ce_weight="dynamic",
    )
    whole = run_distributed(world_size, run, job)
    parts = run_distributed(world_size, interrupted, replace(job, directory=tmp_path / "parts"), 3)
    assert all(first.outcome == "stopped" for first, _ in parts)
    assert all("projection" in result.tensors for result in whole)
    assert_identical(whole, [second for _, second in parts])
    for name in ("train/alpha", "train/ce_weight"):
        weights = [[report.scalars[name] for report in result.reports] for result in whole]
        assert all(len(set(values)) >= 5 for values in weights), "the first two are of the same batch and parameters"
        assert [report.scalars[name] for _, second in parts for report in second.reports] == [
            value for values in weights for value in values[3:]
        ]
    if world_size > 1:
        assert torch.equal(whole[0].tensors["projection"], whole[1].tensors["projection"])


@pytest.mark.slow
def test_dynamic_weights_are_ratios_of_the_step_before_and_the_same_on_every_layout(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Losses, weights, gradient norms: copies of the map on other ranks count once."""
    reports = {}
    for layout in ("TP1 PP1", "PP2 VPP2", "TP2"):
        world_size, sizes = LAYOUTS[layout]
        job = Job(
            models["student"],
            models["teacher"],
            tmp_path / layout,
            layout=sizes,
            intermediate=IntermediateConfig(pairs=PAIRS),
            ce_weight="dynamic",
        )
        results = run_distributed(world_size, run, job)
        reports[layout] = results[0].reports
    first = reports["TP1 PP1"]
    for before, after in zip(first, first[1:], strict=False):
        assert after.alpha == pytest.approx(before.logits / before.hidden, rel=1e-6)
        assert after.scalars["train/ce_weight"] == pytest.approx(before.logits / before.ce, rel=1e-6)
        assert after.loss == pytest.approx(
            after.logits + after.alpha * after.hidden + after.scalars["train/ce_weight"] * after.ce, rel=1e-6
        )
    # The first weights are of the first batch itself.
    assert first[0].scalars["train/ce_weight"] == pytest.approx(first[0].logits / first[0].ce, rel=1e-6)
    assert first[0].alpha == pytest.approx(first[0].logits / first[0].hidden, rel=1e-6)
    for others in reports.values():
        for one, other in zip(first[:4], others[:4], strict=True):
            for name in ("loss", "hidden", "alpha", "grad_norm"):
                assert getattr(other, name) == pytest.approx(getattr(one, name), rel=2e-5), name


def stopped(job: Job, at: int) -> Result:
    return run(job, {at: lambda: signal.raise_signal(signal.SIGUSR1)})


@pytest.mark.slow
def test_a_run_goes_on_with_its_map_on_other_stages(models: dict[str, Path], tmp_path: Path) -> None:
    job = Job(
        models["student"],
        models["teacher"],
        tmp_path / "whole",
        intermediate=IntermediateConfig(pairs=PAIRS),
    )
    (whole,) = run_distributed(1, run, job)
    moved = replace(job, directory=tmp_path / "moved", layout=LAYOUTS["PP3 uneven"][1])
    run_distributed(3, stopped, moved, 3)
    (resumed,) = run_distributed(1, run, replace(moved, layout=Layout()))
    assert resumed.outcome == "done"
    for one, other in zip(whole.reports[3:], resumed.reports, strict=True):
        for name in ("loss", "hidden", "alpha", "grad_norm"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=2e-5), name
    torch.testing.assert_close(resumed.tensors["projection"], whole.tensors["projection"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_training_checkpoint_holds_the_map_beside_the_student_in_bf16_too(
    models: dict[str, Path], tmp_path: Path
) -> None:
    job = Job(
        models["student"],
        models["teacher"],
        tmp_path,
        layout=LAYOUTS["PP2"][1],
        config={"precision": "bf16", "steps": 2, "save_interval": 1},
        intermediate=IntermediateConfig(pairs=PAIRS),
    )
    first, last = run_distributed(2, run, job)
    assert first.outcome == "done"
    assert torch.equal(first.tensors["projection"], last.tensors["projection"])
    training = tensor_names(tmp_path / "training" / "iter_0000001")
    beside = {name for name in training - tensor_names(models["student"]) if not name.startswith("optimizer.")}
    assert beside == {"hidden_projection.weight"}
    assert "optimizer.state.exp_avg.hidden_projection.weight" in training


def tensor_names(checkpoint: Path) -> set[str]:
    return set(dist_checkpointing.load_tensors_metadata(str(checkpoint)))


@pytest.mark.slow
def test_gathering_parameters_during_the_forward_changes_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    job = Job(
        models["student"],
        models["teacher"],
        tmp_path / "plain",
        intermediate=IntermediateConfig(pairs=PAIRS),
    )
    overlapped = replace(
        job, directory=tmp_path / "overlapped", config={"overlap_grad_reduce": True, "overlap_param_gather": True}
    )
    assert_identical(run_distributed(2, run, job), run_distributed(2, run, overlapped))


@pytest.mark.parametrize(
    ("pairs", "named"),
    [("all", "no list"), ([[1]], "no pair"), ([[-2, 0]], "no pair"), ([[4, 0]], "no layer 4"), ([[0, 3]], "no layer 3"),
     ([[0, 0], [0, 0]], "twice")],
    ids=str,
)  # fmt: skip
def test_pairs_that_are_none_are_refused(models: dict[str, Path], pairs: Any, named: str) -> None:
    teacher, student = (Architecture.load(models[name]) for name in ("teacher", "wide"))
    with pytest.raises(UserError, match=f"distill.intermediate.pairs: .*{named}"):
        resolve_pairs(IntermediateConfig(pairs=pairs), teacher, student)


def test_automatic_pairs_only_where_depth_is_cut(models: dict[str, Path]) -> None:
    teacher, same, shallow = (Architecture.load(models[name]) for name in ("teacher", "student", "wide"))
    assert resolve_pairs(IntermediateConfig(), teacher, same) == []
    assert resolve_pairs(IntermediateConfig(), teacher, shallow) == [Pair(1, 0)]


@pytest.mark.parametrize("alpha", ["dynamical", -1, float("nan"), True, None], ids=str)
def test_a_weight_that_is_none_is_refused(alpha: Any) -> None:
    with pytest.raises(UserError, match="distill.intermediate.alpha"):
        check_weight("distill.intermediate.alpha", alpha)
