"""Loss and gradients of one distillation step against the single-process fp64 formula, in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import TrainConfig
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import ddp_config
from minitron_nemo.distillation.step import SUMS, Step
from minitron_nemo.distillation.teacher import ColocatedTeacher, window_size
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.distillation.reference import VOCAB, Expected, expected_step, random_microbatches, rank_slice
from tests.families import FAMILIES, MIXTURES, write_tiny
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

SEQUENCE = 16
LAYOUTS = {
    "TP1 PP1": (1, Layout()),
    "TP2": (2, Layout(tensor_model_parallel_size=2)),
    "TP2 SP": (2, Layout(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2": (2, Layout(pipeline_model_parallel_size=2)),
    "PP3 uneven": (3, Layout(pipeline_model_parallel_size=3)),
    "PP2 VPP2": (2, Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "DP2": (2, Layout()),
    "TP2 PP2": (4, Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teacher and students, as Hugging Face directories (`*_hf`) and as Megatron checkpoints."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "teacher_hf", seed=0)
    write_tiny_llama(root / "student_hf", hidden_size=48, ffn_hidden_size=64, seed=1)
    write_tiny_llama(root / "tied_hf", hidden_size=48, ffn_hidden_size=64, tied=True, seed=2)
    paths: dict[str, Path] = {}
    for name in ("teacher", "student", "tied"):
        convert(root / f"{name}_hf", root / name, "megatron")
        paths |= {name: root / name, f"{name}_hf": root / f"{name}_hf"}
    return paths


def built_step(
    student_dir: Path,
    teacher_dir: Path | None,
    layout: Layout,
    objective: DistillationObjective,
    *,
    buffer_bytes: int = 2**30,
    config: TrainConfig | None = None,
    micro_batch_size: int = 1,
    ce_weight: float | str | None = None,
    teacher_layout: Layout | None = None,
) -> Step:
    launch.initialize(layout, seed=1)
    config = config or TrainConfig(steps=1, global_batch_size=4, precision="fp32")
    student = build_model(_architecture(student_dir), layout, dtype=torch.float32, ddp=ddp_config(config))
    load_model(student, student_dir)
    teacher = None
    if teacher_dir is not None:
        model = build_model(_architecture(teacher_dir), teacher_layout or layout, dtype=torch.float32)
        load_model(model, teacher_dir)
        teacher = ColocatedTeacher(
            model,
            sequence_length=SEQUENCE,
            micro_batch_size=micro_batch_size,
            buffer_bytes=buffer_bytes,
            student_layout=layout,
        )
    return Step(student, teacher, objective, ce_weight=ce_weight)


def _architecture(directory: Path) -> Any:
    from minitron_nemo.arch import Architecture

    return Architecture.load(directory)


def own_share(microbatches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return microbatches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def whole_gradients(student: Model) -> dict[str, Tensor]:
    """This rank's gradients by local name, `layers.N` counted over the whole model, each rank's DP shard gathered."""
    group = parallel_state.get_data_parallel_group()
    gradients = {}
    for chunk, module in zip(student.chunks, student.modules, strict=True):
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                torch.distributed.all_gather(shards, shards[group.rank()].clone(), group=group)
        numbers = {f"layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(module.decoder.layers)}
        for name, parameter in module.named_parameters():
            for local, number in numbers.items():
                if f"decoder.{local}" in name:
                    name = name.replace(local, f"layers.{number}.")
                    break
            gradients[name] = parameter.main_grad.clone()
    return gradients


def worst_gradient(gradients: dict[str, Tensor], expected: dict[str, Tensor], groups: int) -> tuple[float, str]:
    """Largest of max|difference| / max|expected| over this rank's parameters."""
    tp, tp_rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    worst = (0.0, "")
    for name, found in gradients.items():
        layer = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else -1
        wanted = rank_slice(expected, name, layer, tp, tp_rank, groups)
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            rows = found.shape[0]
            wanted = wanted[tp_rank * rows : (tp_rank + 1) * rows]
            assert not found[wanted.shape[0] :].any(), f"{name}: padding has a gradient"
            found = found[: wanted.shape[0]]
            if not wanted.numel():  # a rank whose rows are all padding
                continue
        worst = max(worst, ((found - wanted).abs().max().item() / wanted.abs().max().item(), name))
    return worst


def one_step(
    layout: Layout, paths: tuple[Path, Path | None], objective: DistillationObjective, expected: Expected, **kwargs: Any
) -> tuple[list[float], tuple[float, str], int]:
    """On a rank: sums over all data-parallel ranks, the worst gradient, the number of parameters compared."""
    microbatches = random_microbatches(4, sequence_length=SEQUENCE)
    step = built_step(*paths, layout, objective, **kwargs)
    sums = step(own_share(microbatches))
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    gradients = whole_gradients(step.student)
    return sums.tolist(), worst_gradient(gradients, expected.gradients, groups=4), len(gradients)


def check(outcomes: list, expected: Expected, pipeline: int, dp: int) -> None:
    reported = [sums for sums, _, _ in outcomes if any(sums)]
    assert len(reported) == len(outcomes) // pipeline, "the last stage reports, the others do not"
    for logits, ce, tokens, weight, nonfinite, *_ in reported:
        assert nonfinite == 0
        assert logits == pytest.approx(expected.logits, rel=1e-5)
        assert ce == pytest.approx(expected.ce, rel=1e-5)
        assert tokens == expected.tokens
        assert weight == pytest.approx(expected.weight, rel=1e-6)
    for _, (error, name), count in outcomes:
        assert count > 0
        assert error < 1e-5, name


@pytest.mark.parametrize("student", ["student", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases(1)
def test_loss_and_gradients_of_a_step_match_the_fp64_formula(
    models: dict[str, Path], layout: str, student: str
) -> None:
    """Four microbatches with fractional token weights; CE beside a tempered divergence."""
    world_size, sizes = LAYOUTS[layout]
    weights: dict[str, Any] = {"logits_weight": 0.7, "ce_weight": 0.3, "temperature": 2.0}
    expected = expected_step(
        models[f"{student}_hf"], models["teacher_hf"], random_microbatches(4, sequence_length=SEQUENCE), **weights
    )
    outcomes = run_distributed(
        world_size,
        one_step,
        sizes,
        (models[student], models["teacher"]),
        DistillationObjective(**weights, chunk_bytes=4 * 2 * 5 * VOCAB),
        expected,
    )
    check(outcomes, expected, sizes.pipeline_model_parallel_size, sizes.data_parallel_size(world_size))


@pytest.mark.parametrize(
    "layout",
    ["TP2 SP", *(pytest.param(name, marks=pytest.mark.soak) for name in ("PP2 VPP2", "DP2", "TP2 PP2"))],
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_loss_and_gradients_of_a_step_match_the_fp64_formula_in_every_family(
    family: str, layout: str, tmp_path: Path
) -> None:
    tied = family in ("qwen2", "nemotron")
    write_tiny(family, tmp_path / "teacher_hf")
    write_tiny(family, tmp_path / "student_hf", hidden_size=48, ffn_hidden_size=64, tied=tied, seed=1)
    for name in ("teacher", "student"):
        convert(tmp_path / f"{name}_hf", tmp_path / name, "megatron")
    world_size, sizes = LAYOUTS[layout]
    if family in MIXTURES and sizes.tensor_model_parallel_size > 1:
        sizes = replace(sizes, sequence_parallel=True)
    weights: dict[str, Any] = {"logits_weight": 0.7, "ce_weight": 0.3, "temperature": 2.0}
    expected = expected_step(
        tmp_path / "student_hf",
        tmp_path / "teacher_hf",
        random_microbatches(4, sequence_length=SEQUENCE),
        **weights,
    )
    paths = (tmp_path / "student", tmp_path / "teacher")
    outcomes = run_distributed(world_size, one_step, sizes, paths, DistillationObjective(**weights), expected)
    check(outcomes, expected, sizes.pipeline_model_parallel_size, sizes.data_parallel_size(world_size))


@pytest.mark.parametrize("weights", [{"divergence": "reverse_kl"}, {"divergence": "jsd", "jsd_beta": 0.3}], ids=str)
@pytest.mark.slow
def test_other_divergences_match_the_fp64_formula_too(models: dict[str, Path], weights: dict[str, Any]) -> None:
    world_size, sizes = LAYOUTS["TP2 SP"]
    weights = {**weights, "temperature": 2.0, "ce_weight": 0.3}
    expected = expected_step(
        models["student_hf"], models["teacher_hf"], random_microbatches(4, sequence_length=SEQUENCE), **weights
    )
    outcomes = run_distributed(
        world_size,
        one_step,
        sizes,
        (models["student"], models["teacher"]),
        DistillationObjective(**weights),
        expected,
    )
    check(outcomes, expected, sizes.pipeline_model_parallel_size, sizes.data_parallel_size(world_size))


@pytest.mark.parametrize("layout", ["TP2 SP", "PP2 VPP2", "DP2"])
@pytest.mark.fast_cases(1)
def test_a_dynamic_cross_entropy_weighs_as_much_as_the_divergence(models: dict[str, Path], layout: str) -> None:
    """The first step takes the ratio of its own batch, over all data-parallel ranks."""
    world_size, sizes = LAYOUTS[layout]
    paths, batches = (models["student_hf"], models["teacher_hf"]), random_microbatches(4, sequence_length=SEQUENCE)
    alone = expected_step(*paths, batches)
    expected = expected_step(*paths, batches, ce_weight=alone.logits / alone.ce)
    outcomes = run_distributed(
        world_size,
        one_step,
        sizes,
        (models["student"], models["teacher"]),
        DistillationObjective(),
        expected,
        ce_weight="dynamic",
    )
    check(outcomes, expected, sizes.pipeline_model_parallel_size, sizes.data_parallel_size(world_size))
    for sums, _, _ in outcomes:
        assert sums[SUMS.index("weighted_ce")] == pytest.approx(sums[SUMS.index("logits")], rel=1e-5)


@pytest.mark.parametrize("layout", ["TP1 PP1", "PP2"])
def test_loss_and_gradients_without_a_teacher_are_those_of_cross_entropy(models: dict[str, Path], layout: str) -> None:
    world_size, sizes = LAYOUTS[layout]
    expected = expected_step(
        models["student_hf"], None, random_microbatches(4, sequence_length=SEQUENCE), logits_weight=0.0, ce_weight=1.0
    )
    objective = DistillationObjective.cross_entropy(chunk_bytes=2**20)
    outcomes = run_distributed(world_size, one_step, sizes, (models["student"], None), objective, expected)
    check(outcomes, expected, sizes.pipeline_model_parallel_size, 1)


def gradients_in_windows(
    layout: Layout, paths: tuple[Path, Path], config: TrainConfig, microbatches: int
) -> list[tuple[int, dict[str, Tensor], list[float]]]:
    """On a rank: window size, gradients and sums with a buffer for everything, and with one as small as possible."""
    outcomes = []
    for buffer_bytes in (2**30, 1):
        step = built_step(*paths, layout, DistillationObjective(), buffer_bytes=buffer_bytes, config=config)
        share = own_share(random_microbatches(microbatches, sequence_length=SEQUENCE))
        # Twice: from its second batch on, the overlapped reduction starts as soon as a bucket is complete.
        for _ in range(2):
            sums = step(share)
        assert step.teacher is not None
        outcomes.append((step.teacher.window, whole_gradients(step.student), sums.tolist()))
    return outcomes


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("layout", "window"), [("TP1 PP1", 1), ("DP2", 1), ("PP2", 1), ("PP2 VPP2", 2)])
@pytest.mark.fast_cases(1)
def test_small_teacher_windows_give_the_same_gradients_bit_for_bit(
    models: dict[str, Path], layout: str, window: int, overlap: bool
) -> None:
    world_size, sizes = LAYOUTS[layout]
    config = TrainConfig(steps=1, global_batch_size=4, precision="fp32", overlap_grad_reduce=overlap)
    paths = (models["student"], models["teacher"])
    for whole, windows in run_distributed(world_size, gradients_in_windows, sizes, paths, config, 4):
        assert whole[0] >= 4
        assert windows[0] == window
        assert whole[2] == windows[2]
        for name, gradient in whole[1].items():
            assert gradient.any()
            assert torch.equal(gradient, windows[1][name]), name


def test_a_window_fits_the_buffer_and_the_pipeline() -> None:
    assert window_size(state_bytes=100, buffer_bytes=1000, multiple_of=1) == 10
    assert window_size(state_bytes=100, buffer_bytes=1000, multiple_of=4) == 8
    assert window_size(state_bytes=100, buffer_bytes=399, multiple_of=4) == 4
    assert window_size(state_bytes=100, buffer_bytes=1, multiple_of=1) == 1


def kept_states(layout: Layout, teacher_dir: Path) -> list[Tensor]:
    """On a rank: the shapes of what the teacher keeps, and the states put together again."""
    from minitron_nemo.models.states import gather_sequence

    launch.initialize(layout, seed=1)
    model = build_model(_architecture(teacher_dir), layout, dtype=torch.float32)
    load_model(model, teacher_dir)
    teacher = ColocatedTeacher(
        model, sequence_length=SEQUENCE, micro_batch_size=2, buffer_bytes=2**30, student_layout=layout
    )
    signal = teacher.step(random_microbatches(3, sequence_length=SEQUENCE, micro_batch_size=2))
    assert all(state.shape == (SEQUENCE // layout.tensor_model_parallel_size, 2, 64) for state in signal.hidden)
    return [gather_sequence(state) for state in signal.hidden]


@pytest.mark.parametrize("layout", ["TP1 PP1", "TP2", "TP2 SP", "PP2", "PP2 VPP2"])
@pytest.mark.fast_cases(3)
def test_teacher_states_are_those_of_hugging_face_kept_in_parts_of_the_sequence(
    models: dict[str, Path], layout: str
) -> None:
    from transformers import LlamaModel

    teacher = LlamaModel.from_pretrained(models["teacher_hf"], dtype=torch.float64)
    batches = random_microbatches(3, sequence_length=SEQUENCE, micro_batch_size=2)
    with torch.no_grad():
        wanted = [teacher(batch["tokens"]).last_hidden_state.transpose(0, 1) for batch in batches]
    world_size, sizes = LAYOUTS[layout]
    outcomes = run_distributed(world_size, kept_states, sizes, models["teacher"])
    assert any(outcomes)
    for found in outcomes:
        assert len(found) in (0, 3)
        for state, expected in zip(found, wanted, strict=False):
            torch.testing.assert_close(state.double(), expected, rtol=1e-5, atol=1e-5)
