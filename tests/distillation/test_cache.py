"""The cached teacher against the colocated one and the fp64 formula; what is written, interrupted, damaged, refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.data.sampler import Microbatch, stack
from minitron_nemo.distillation.cache import BLOCK, Identity, TeacherCache, Visits
from minitron_nemo.distillation.cache_teacher import draws, write_blocks
from minitron_nemo.distillation.cached import CachedTeacher
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.errors import UserError
from minitron_nemo.kernels import SparseEntries
from minitron_nemo.models.build import build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.distillation.reference import VOCAB, Expected, expected_step, rank_slice
from tests.distillation.runs import MadeUpSource
from tests.distillation.test_step import SEQUENCE, built_step, check, own_share, whole_gradients, worst_gradient
from tests.kernels.test_sparsify import rate_of_convergence
from tests.pool import run_distributed
from tests.tiny import write_tiny_llama

TEMPERATURE = 2.0
SAMPLES = 8  # of a step


@dataclass(frozen=True)
class Source(MadeUpSource):
    """Samples whose id is the hash of their tokens, as those of real data."""

    fingerprint: str = "made up"

    def sample(self, index: int) -> dict[str, Any]:
        sample = super().sample(index)
        return sample | {"id": hashlib.sha256(sample["tokens"].numpy().tobytes()).hexdigest()}


@dataclass(frozen=True)
class SomeBlend:
    sources: tuple[Source, ...] = (Source(SEQUENCE),)

    def sample(self, index: tuple[int, int]) -> dict[str, Any]:
        return self.sources[index[0]].sample(index[1])


def some_visits(samples: int, first: int = 0) -> Visits:
    return Visits(("made up",), np.array([[0, index] for index in range(first, first + samples)]))


def identity(**changes: Any) -> Identity:
    whole = Identity("a teacher", VOCAB, SEQUENCE, TEMPERATURE, top_k=VOCAB, tail_samples=0, seed=5, precision="fp32")
    return replace(whole, **changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "teacher_hf", seed=0)
    write_tiny_llama(root / "student_hf", hidden_size=48, ffn_hidden_size=64, seed=1)
    for name in ("teacher", "student"):
        convert(root / f"{name}_hf", root / name, "megatron")
    return {name: root / name for name in ("teacher", "teacher_hf", "student", "student_hf")}


def fill(directory: Path, kind: Identity, teacher: Path, layout: Layout, micro_batch_size: int, samples: int) -> None:
    """On a rank: make or go on with a cache of the first samples."""
    launch.initialize(layout, seed=1)
    blocks = launch.from_rank_0(lambda: TeacherCache.create(directory, kind).plan(some_visits(samples)))
    model = build_model(Architecture.load(teacher), layout, dtype=torch.float32)
    load_model(model, teacher)
    if model.output_layer is not None:
        model.output_layer.mode = "hidden"
    blend: Any = SomeBlend()
    write_blocks(model, TeacherCache(directory, kind), blocks, blend, micro_batch_size, chunk_bytes=4 * 5 * VOCAB)


def microbatches(micro_batch_size: int) -> list[Microbatch]:
    """The samples of a step, last ones first."""
    samples = [Source(SEQUENCE).sample(index) for index in reversed(range(SAMPLES))]
    return [stack(samples[at : at + micro_batch_size]) for at in range(0, SAMPLES, micro_batch_size)]


def cached_step(
    directory: Path,
    kind: Identity,
    student: Path,
    layout: Layout,
    objective: DistillationObjective,
    micro_batch_size: int,
    expected: Expected | None = None,
    buffer_bytes: int = 2**30,
) -> tuple[list[float], tuple[float, str], int]:
    step = built_step(student, None, layout, objective)
    step.teacher = CachedTeacher(
        {SEQUENCE: TeacherCache(directory, kind)},
        layout,
        sequence_length=SEQUENCE,
        micro_batch_size=micro_batch_size,
        buffer_bytes=buffer_bytes,
    )
    sums = step(own_share(microbatches(micro_batch_size)))
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    gradients = whole_gradients(step.student)
    error = (0.0, "") if expected is None else worst_gradient(gradients, expected.gradients, groups=4)
    return sums.tolist(), error, len(gradients)


WEIGHTS: dict[str, Any] = {"logits_weight": 0.7, "ce_weight": 0.3, "temperature": TEMPERATURE}


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected]:
    """A cache with the whole vocabulary, written at TP2 with micro batches of 3, and what a step should give."""
    directory = tmp_path_factory.mktemp("whole")
    layout = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
    run_distributed(2, fill, directory, identity(), models["teacher"], layout, 3, SAMPLES)
    return directory, expected_step(models["student_hf"], models["teacher_hf"], microbatches(1), **WEIGHTS)


@pytest.mark.parametrize(
    ("size", "layout", "micro_batch_size", "divergence"),
    [
        (1, Layout(), 4, "forward_kl"),
        (1, Layout(), 1, "jsd"),
        (2, Layout(tensor_model_parallel_size=2), 2, "forward_kl"),
        (2, Layout(tensor_model_parallel_size=2, sequence_parallel=True), 1, "reverse_kl"),
        (2, Layout(pipeline_model_parallel_size=2), 1, "forward_kl"),
        (2, Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), 2, "forward_kl"),
        (2, Layout(), 2, "forward_kl"),
    ],
    ids=["one", "one jsd", "TP2", "TP2 SP reverse", "PP2", "PP2 VPP2", "DP2"],
)
@pytest.mark.slow
def test_with_the_whole_vocabulary_a_step_is_that_of_the_colocated_teacher(
    models: dict[str, Path],
    whole: tuple[Path, Expected],
    size: int,
    layout: Layout,
    micro_batch_size: int,
    divergence: str,
) -> None:
    """Both match the fp64 formula to 1e-5; in windows of 2 microbatches."""
    directory, expected = whole
    if divergence != "forward_kl":
        expected = expected_step(
            models["student_hf"], models["teacher_hf"], microbatches(1), divergence=divergence, **WEIGHTS
        )
    outcomes = run_distributed(
        size,
        cached_step,
        directory,
        identity(),
        models["student"],
        layout,
        DistillationObjective(divergence=divergence, **WEIGHTS),
        micro_batch_size,
        expected,
        buffer_bytes=2 * micro_batch_size * SEQUENCE * (VOCAB * 12 + 4),
    )
    check(outcomes, expected, layout.pipeline_model_parallel_size, size // layout.model_parallel_size)


@pytest.mark.parametrize("kind", [{"top_k": 20}, {"top_k": 8, "tail_samples": 12}], ids=["bucket", "sampled"])
def test_a_step_is_the_fp64_formula_of_the_stored_numbers(
    models: dict[str, Path], tmp_path: Path, kind: dict[str, int]
) -> None:
    from transformers import LlamaForCausalLM

    from tests.kernels.sparse_teachers import formula

    sparse = identity(**kind)
    run_distributed(1, fill, tmp_path, sparse, models["teacher"], Layout(), 4, SAMPLES)
    objective = DistillationObjective(temperature=TEMPERATURE)
    ((sums, _, _),) = run_distributed(1, cached_step, tmp_path, sparse, models["student"], Layout(), objective, 2)
    student = LlamaForCausalLM.from_pretrained(models["student_hf"], dtype=torch.float64, attn_implementation="eager")
    cache, total = TeacherCache(tmp_path, sparse), 0.0
    for batch in microbatches(1):
        teacher = cache.read(batch["sample_ids"]).teacher()
        logits = student(batch["tokens"]).logits[0]
        _, divergence, _ = formula(
            logits, teacher, batch["labels"][0], batch["token_weights"][0], temperature=TEMPERATURE
        )
        total += divergence.item()
    assert sums[0] == pytest.approx(total, rel=1e-5)


DRAWN = 200


def gradients_of_draws(directory: Path, paths: tuple[Path, Path], kind: Identity) -> dict[str, Tensor]:
    """On a rank: a cache for each of DRAWN seeds and the gradients of a step from it, [DRAWN, ...] by name."""
    launch.initialize(Layout(), seed=1)
    model = build_model(Architecture.load(paths[1]), Layout(), dtype=torch.float32)
    load_model(model, paths[1])
    assert model.output_layer is not None
    model.output_layer.mode = "hidden"
    step = built_step(paths[0], None, Layout(), DistillationObjective(temperature=TEMPERATURE))
    blend: Any = SomeBlend()
    found: dict[str, list[Tensor]] = {}
    for seed in range(DRAWN):
        place, own = directory / str(seed), replace(kind, seed=seed)
        blocks = TeacherCache.create(place, own).plan(some_visits(SAMPLES))
        write_blocks(model, TeacherCache(place, own), blocks, blend, SAMPLES, chunk_bytes=2**20)
        step.teacher = CachedTeacher(
            {SEQUENCE: TeacherCache(place, own)},
            Layout(),
            sequence_length=SEQUENCE,
            micro_batch_size=SAMPLES,
            buffer_bytes=2**30,
        )
        step(microbatches(SAMPLES))
        for name, gradient in whole_gradients(step.student).items():
            found.setdefault(name, []).append(gradient)
    return {name: torch.stack(gradients) for name, gradients in found.items()}


@pytest.mark.soak
def test_over_draws_of_the_tail_a_step_has_the_exact_gradient_in_the_mean(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Of every weight, through cache and model, against the fp64 formula; the error falls like 1 / sqrt(draws)."""
    kind = identity(top_k=64, tail_samples=24)
    paths = models["student"], models["teacher"]
    (drawn,) = run_distributed(1, gradients_of_draws, tmp_path, paths, kind, timeout=900.0)
    expected = expected_step(models["student_hf"], models["teacher_hf"], microbatches(1), temperature=TEMPERATURE)
    assert len(drawn) == len(expected.gradients) - 3 * 4  # queries, keys and values are one, as gate and up are
    for name, samples in drawn.items():
        layer = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else -1
        exact = rank_slice(expected.gradients, name, layer, tp=1, tp_rank=0, groups=4)
        samples = samples[:, : len(exact)].double()
        assert rate_of_convergence(samples, exact) == pytest.approx(-0.5, abs=0.1), name
        variance = samples.var(0).sum() / DRAWN
        assert (samples.mean(0) - exact).square().sum() < 3 * variance, name  # 1 is expected
        assert variance.sqrt() < 0.2 * exact.norm(), f"{name}: too few draws to tell"


def content(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


class Killed(Exception):
    pass


def _killed_after(stores: int, *args: Any) -> None:
    """On a rank: `fill`, with the process's end after that many files."""
    original: Callable[..., None] = TeacherCache._store
    left = [stores]

    def store(self: TeacherCache, name: str, block: int, rows: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        original(self, name, block, rows)

    TeacherCache._store = store  # type: ignore[method-assign]
    try:
        with pytest.raises(Killed):
            fill(*args)
    finally:
        TeacherCache._store = original  # type: ignore[method-assign]


@pytest.mark.slow
def test_an_interrupted_cache_goes_on_to_the_same_content(models: dict[str, Path], tmp_path: Path) -> None:
    kind, samples = identity(top_k=8, tail_samples=4), BLOCK + 10
    arguments = (kind, models["teacher"], Layout(), 2, samples)
    run_distributed(1, fill, tmp_path / "straight", *arguments)
    run_distributed(1, _killed_after, 6, tmp_path / "killed", *arguments)  # in the middle of the second block
    cache = TeacherCache(tmp_path / "killed", kind)
    with pytest.raises(UserError, match=rf"lacks 10 of the {samples} samples.*minitron cache-teacher"):
        cache.check(some_visits(samples))
    assert cache.plan(some_visits(samples)) == [1]
    run_distributed(1, fill, tmp_path / "killed", *arguments)
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


@pytest.mark.slow
def test_another_layout_writes_the_same_entries_and_a_cache_grows(models: dict[str, Path], tmp_path: Path) -> None:
    kind = identity(top_k=8, tail_samples=4)
    run_distributed(1, fill, tmp_path / "one", kind, models["teacher"], Layout(), 1, 6)
    layout = Layout(tensor_model_parallel_size=2)
    run_distributed(2, fill, tmp_path / "two", kind, models["teacher"], layout, 3, 6)
    run_distributed(1, fill, tmp_path / "one", kind, models["teacher"], Layout(), 4, 7)
    ids = [Source(SEQUENCE).sample(index)["id"] for index in range(7)]
    one, two = TeacherCache(tmp_path / "one", kind), TeacherCache(tmp_path / "two", kind)
    one.check(some_visits(7))
    first, second = one.read(ids[:6]), two.read(ids[:6])
    assert torch.equal(first.token_ids, second.token_ids)
    torch.testing.assert_close(first.log_probs, second.log_probs, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=f"lacks the sample {ids[6]}"):
        two.read(ids[6:])


@pytest.fixture
def small(tmp_path: Path) -> TeacherCache:
    """A cache of 3 samples, made without a model."""
    cache = TeacherCache.create(tmp_path / "cache", identity(top_k=2))
    assert cache.plan(some_visits(3)) == [0]
    generator = torch.Generator().manual_seed(0)
    entries = SparseEntries(
        torch.randint(0, VOCAB, (3 * SEQUENCE, 2), generator=generator),
        torch.randn(3 * SEQUENCE, 2, generator=generator),
        torch.randn(3 * SEQUENCE, generator=generator),
        2,
    )
    cache.write(0, sample_ids(3), entries)
    return TeacherCache(tmp_path / "cache", identity(top_k=2))


def sample_ids(count: int) -> list[str]:
    return [hashlib.sha256(bytes([index])).hexdigest() for index in range(count)]


@pytest.mark.parametrize("name", ["token_ids", "log_probs", "tail_log_probs", "sample_ids"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_file_is_named(small: TeacherCache, name: str, damage: str) -> None:
    small.read(sample_ids(3))
    file = small._file(name, 0)
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file}: damaged .*remove it and run `minitron cache-teacher`"):
        TeacherCache(small.directory, small.identity).read(sample_ids(3))
    file.unlink()
    if name == "sample_ids":
        with pytest.raises(UserError, match="lacks 3 of the 3 samples"):
            TeacherCache(small.directory, small.identity).check(some_visits(3))
    else:
        with pytest.raises(UserError, match=rf"{file}: damaged .*not there"):
            TeacherCache(small.directory, small.identity).read(sample_ids(3))
    assert TeacherCache(small.directory, small.identity).plan(some_visits(3)) == [0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "another"}, "the teacher was a teacher"),
        ({"temperature": 1.0}, "distill.temperature was 2.0"),
        ({"sequence_length": 32}, "data.sequence_length was 16"),
        ({"top_k": 3}, "teacher.cache.top_k was 2"),
        ({"tail_samples": 3}, "teacher.cache.tail_samples was 0"),
    ],
)
def test_a_cache_of_something_else_is_refused(small: TeacherCache, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TeacherCache(small.directory, replace(small.identity, **change))


def test_a_cache_of_other_data_is_refused(small: TeacherCache) -> None:
    with pytest.raises(UserError, match="made for other data.*tokenizer"):
        small.check(replace(some_visits(3), sources=("another",)))
    with pytest.raises(UserError, match="lacks 1 of the 3 samples"):
        small.check(some_visits(3, first=1))
    with pytest.raises(UserError, match=r"cache.json: not there; run `minitron cache-teacher`"):
        TeacherCache(small.directory / "elsewhere", small.identity)


def test_half_precision_stores_half_the_digits(tmp_path: Path) -> None:
    kind = identity(top_k=2, precision="fp16")
    cache = TeacherCache.create(tmp_path, kind)
    cache.plan(some_visits(1))
    log_probs = torch.full((SEQUENCE, 2), -1.0 / 3)
    cache.write(0, sample_ids(1), SparseEntries(torch.ones(SEQUENCE, 2).long(), log_probs, log_probs[:, 0], 2))
    found = TeacherCache(tmp_path, kind).read(sample_ids(1))
    assert torch.equal(found.log_probs, log_probs.half().float())
    assert torch.equal(found.tail_log_probs, log_probs[:, 0])


def test_draws_are_a_function_of_seed_sample_and_position() -> None:
    name = sample_ids(1)[0]
    numbers = draws(5, name, 1000, 4)
    assert numbers.shape == (1000, 4)
    assert np.array_equal(numbers[:10], draws(5, name, 10, 4))
    assert not np.intersect1d(numbers, draws(6, name, 1000, 4)).size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / numbers.size) ** 0.5
    assert draws(5, name, 1, 2).tolist() == [[0.7921431480965881, 0.3452938591436996]]  # with every NumPy
