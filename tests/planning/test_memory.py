"""Predicted bytes against what Megatron-core's models, buffers and optimizer hold, and what autograd saves."""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.communication import randomised
from benchmarks.plan import job_of, train
from minitron_nemo.arch import Architecture
from minitron_nemo.config import TrainConfig
from minitron_nemo.distillation.communication import Update
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import build_optimizer, ddp_config
from minitron_nemo.distillation.optimizer import update as apply
from minitron_nemo.distillation.step import Step
from minitron_nemo.kernels import linear_kd_loss
from minitron_nemo.kernels.backend import CPU_CHUNK_TOKENS, CUDA_CHUNK_TOKENS
from minitron_nemo.models.build import build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.job import Job
from minitron_nemo.planning.memory import activations_of_chunks, frozen, loss_bytes, memory, trained
from tests.distillation.reference import random_microbatches
from tests.distillation.test_communication import MIXTURE, SHARED, STUDENT, THREE_GROUPS, TIED
from tests.pool import run_distributed

SEQUENCE, MICRO_BATCH = 48, 2


def held_by_megatron(model: Architecture, layout: Layout, dtype: torch.dtype) -> list[int]:
    """Bytes of a rank: weights alone; then in training weights, gradients and, after an update, optimizer state."""
    launch.initialize(layout, seed=1)
    alone = build_model(model, layout, dtype=dtype)
    weights = sum(parameter.nbytes for chunk in alone.chunks for parameter in chunk.parameters())
    config = TrainConfig(steps=1, global_batch_size=4, precision="bf16" if dtype == torch.bfloat16 else "fp32")
    student = randomised(build_model(model, layout, dtype=dtype, ddp=ddp_config(config)))
    optimizer = build_optimizer(config, student)
    Step(student, None, DistillationObjective.cross_entropy(2**20))(random_microbatches(4))
    apply(optimizer)
    buffers = [buffer for chunk in student.chunks for buffer in chunk.buffers]
    state = 0
    for part in optimizer.chained_optimizers:
        for main, moments in part.optimizer.state.items():
            own = main.nbytes if dtype == torch.bfloat16 else 0  # in fp32 the main parameters are the model's
            state += own + moments["exp_avg"].nbytes + moments["exp_avg_sq"].nbytes
    return [
        weights,
        sum(each.param_data.nbytes for each in buffers),
        sum(each.grad_data.nbytes for each in buffers),
        state,
    ]


CASES: dict[str, tuple[int, Layout, Architecture, torch.dtype]] = {
    "DP2, fp32": (2, Layout(), STUDENT, torch.float32),
    "TP2, a group of zeros": (2, Layout(2), THREE_GROUPS, torch.bfloat16),
    "PP2 VPP2 DP2, tied": (4, Layout(1, 2, 2), TIED, torch.bfloat16),
    "TP2 SP PP2, a shared expert": (4, Layout(2, 2, sequence_parallel=True), SHARED, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_weights_gradients_and_optimizer_state_are_those_that_megatron_holds(case: str) -> None:
    world_size, layout, model, dtype = CASES[case]
    measured = run_distributed(world_size, held_by_megatron, model, layout, dtype)
    shards = layout.data_parallel_size(world_size)
    held = layout.pipeline_model_parallel_size
    for stage in range(held):
        ranks = measured[stage * world_size // held : (stage + 1) * world_size // held]
        expected = trained(model, layout, stage, shards, dtype.itemsize)
        assert all(rank[0] == frozen(model, layout, stage, dtype.itemsize) for rank in ranks)
        assert all(rank[1:3] == [expected["weights"], expected["gradients"]] for rank in ranks)
        # A shard of the buffer has gaps where parameters are aligned, in which there is no state.
        assert all(0.98 * expected["optimizer"] <= rank[3] <= expected["optimizer"] for rank in ranks)


def saved_by_autograd(model: Architecture, layout: Layout, dtype: torch.dtype, recompute: bool) -> int:
    """Bytes of the storages that a forward pass to the final norm's output leaves for the backward pass, on a rank."""
    launch.initialize(layout, seed=1)
    built = randomised(build_model(model, layout, dtype=dtype, recompute=recompute))
    built.output_layer.mode = "hidden"
    weights = {parameter.untyped_storage().data_ptr() for parameter in built.modules[0].parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dtype != torch.bool:  # masks: one for all layers
            saved[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, model.vocab_size, (MICRO_BATCH, SEQUENCE))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        built.modules[0](tokens, torch.arange(SEQUENCE).expand(tokens.shape), None)
    return sum(storage.nbytes() for storage in saved.values())


DENSE = replace(STUDENT, num_layers=2)
SHAPES: dict[str, tuple[Layout, Architecture, torch.dtype, bool]] = {
    "bf16": (Layout(), DENSE, torch.bfloat16, False),
    "fp32, TP2": (Layout(2), DENSE, torch.float32, False),
    "bf16, TP2 SP": (Layout(2, sequence_parallel=True), DENSE, torch.bfloat16, False),
    "bf16, recomputed": (Layout(), DENSE, torch.bfloat16, True),
    "every head a group": (Layout(), replace(DENSE, num_query_groups=8), torch.bfloat16, False),
    "qwen3": (Layout(), replace(DENSE, family="qwen3", model_type="qwen3"), torch.bfloat16, False),
    "nemotron": (
        Layout(),
        replace(DENSE, family="nemotron", model_type="nemotron", rotary_percent=0.5),
        torch.bfloat16,
        False,
    ),
    "experts, TP2 SP": (Layout(2, sequence_parallel=True), replace(MIXTURE, num_layers=2), torch.bfloat16, False),
    "a shared expert": (Layout(), replace(SHARED, num_layers=2), torch.bfloat16, False),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.slow
def test_activations_are_those_that_autograd_saves(case: str) -> None:
    """Within 2%: left out are LayerNorm's gains plus one and, in the formula's favour, nothing else but rounding."""
    layout, model, dtype, recompute = SHAPES[case]
    world_size = layout.tensor_model_parallel_size
    update = Update(model, layout, world_size, 1, MICRO_BATCH, SEQUENCE, dtype.itemsize, recompute=recompute)
    (predicted,) = activations_of_chunks(update, 0, Device())
    for measured in run_distributed(world_size, saved_by_autograd, model, layout, dtype, recompute):
        assert predicted == pytest.approx(measured, rel=0.02)


def test_layers_of_transformer_engine_keep_what_is_written_out_here() -> None:
    """Llama 3.1 8B at TP4 with sequence parallelism, 8192 tokens, bf16: MB of a layer by hand."""
    model = Architecture(32, 4096, 14336, 32, 8, 128, 128256, 131072)
    update = Update(model, Layout(4, sequence_parallel=True), 4, 1, 1, 8192, 2)
    (kept,) = activations_of_chunks(update, 0, Device(transformer_engine=True))
    tokens, local = 8192, 2048
    norms_and_inputs = local * (4 * 4096 * 2 + 2 * 4)
    # Queries, context, keys, the product that the values are a view of, a number per head.
    attention = tokens * (1024 + 1024 + 256 + 1536) * 2 + tokens * 8 * 4
    mlp = tokens * 3 * 3584 * 2
    ends = tokens * 9 + local * (4096 * 2 + 4)
    assert kept == 32 * (norms_and_inputs + attention + mlp) + ends


def test_the_loss_holds_chunks_of_logits_and_both_gradients() -> None:
    """TP2: 50 of 128 rows' tokens at once for both models, dX and dW in fp32, the teacher's states gathered."""
    student, teacher = replace(STUDENT, vocab_size=200), replace(STUDENT, hidden_size=96)
    update = Update(student, Layout(2), 2, 1, 2, 50, 2, teacher=teacher)
    logits, hidden_gradient, weight_gradient = 2 * 50 * 128 * 4, 100 * 48 * 4, 128 * 48 * 4
    assert loss_bytes(update, 2 * 60 * 128 * 4) == logits + hidden_gradient + weight_gradient + 100 * 96 * 2
    alone = 100 * 128 * (4 + 2) + hidden_gradient + weight_gradient  # rounded to bf16 beside the logits
    assert loss_bytes(replace(update, teacher=None), 2**30) == alone


def most_allocated(work: Callable[[], Any]) -> int:
    """The most bytes that torch allocates on this thread while `work` runs, less what it frees of them.

    The least of three runs: what gloo's threads free is not seen.
    """
    return min(_most_allocated(work) for _ in range(3))


def _most_allocated(work: Callable[[], Any]) -> int:
    gc.collect()  # what an earlier profile saw allocated would count as freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(("taught", "chunk_bytes"), [(True, 2**20), (True, 2**24), (False, 2**24)])
@pytest.mark.slow
def test_the_loss_allocates_on_a_cpu_what_is_predicted(taught: bool, chunk_bytes: int) -> None:
    """In bf16, with several chunks and with one: a block of the student's weight in fp32, and all of the teacher's."""
    teacher = replace(STUDENT, hidden_size=192) if taught else None
    student = replace(STUDENT, hidden_size=320, vocab_size=7680)
    update = Update(student, Layout(), 1, 1, 1, 256, 2, teacher=teacher)
    states, weight = (torch.randn(size, 320).bfloat16().requires_grad_() for size in (256, 7680))
    teachers = [torch.randn(size, 192).bfloat16() if taught else None for size in (256, 7680)]
    labels, weights = torch.randint(0, 7680, (256,)), torch.ones(256)
    objective: dict[str, float] = {} if taught else {"logits_weight": 0.0, "ce_weight": 1.0}

    def loss() -> None:
        linear_kd_loss(
            states, weight, *teachers, labels, weights, vocab_size=7680, chunk_bytes=chunk_bytes, **objective
        )

    loss()
    assert most_allocated(loss) == pytest.approx(loss_bytes(update, chunk_bytes, cpu=True), rel=0.04)


def short_job(layout: Layout, sequence_length: int) -> Job:
    sizes = Namespace(layers=3, vocab_size=1024, sequence_length=sequence_length, microbatches=2, chunk_bytes=2**20)
    return job_of(sizes, layout.tensor_model_parallel_size, layout, False)


def allocated_by_updates(layout: Layout, sequence_length: int) -> int:
    launch.initialize(layout, seed=1)
    return most_allocated(lambda: train(short_job(layout, sequence_length), 1))


@pytest.mark.parametrize(
    ("layout", "sequence_length", "moment"), [(Layout(), 128, "reduction"), (Layout(2), 256, "backward")], ids=str
)
@pytest.mark.slow
def test_updates_allocate_what_is_predicted_for_the_fullest_moment(
    layout: Layout, sequence_length: int, moment: str
) -> None:
    """On a tensor-parallel rank most were copies of a frozen weight, once, which was multiplied token by token."""
    ranks = memory(short_job(layout, sequence_length), Device(cpu=True))
    (predicted,) = [each for each in ranks if each.step == "distill"]
    assert predicted.moment == moment
    world_size = layout.tensor_model_parallel_size
    for measured in run_distributed(world_size, allocated_by_updates, layout, sequence_length):
        assert measured == pytest.approx(predicted.total, rel=0.02)


def test_without_a_limit_a_chunk_has_the_tokens_that_the_kernels_take() -> None:
    model = replace(DENSE, vocab_size=1280)
    update = Update(model, Layout(), 1, 1, 2, 2048, 2, teacher=model)
    of_token = 2 * 4 * model.vocab_size  # both models' logits, in fp32
    for cpu, tokens in ((False, CUDA_CHUNK_TOKENS), (True, CPU_CHUNK_TOKENS)):
        assert loss_bytes(update, None, cpu) == loss_bytes(update, tokens * of_token, cpu)


def test_on_a_gpu_adam_takes_all_parameters_at_once() -> None:
    sizes = Namespace(layers=2, vocab_size=1024, sequence_length=16, microbatches=1, chunk_bytes=2**20)
    job = job_of(sizes, 1, Layout(), True)
    (rank,) = [each for each in memory(job, Device()) if each.step == "distill"]
    assert rank.moment == "optimizer"
    assert rank.parts["work"] == rank.parts["gradients"]  # fp32, too
