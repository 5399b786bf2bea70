"""Predicted bytes that a layer moves, against the operands and results of the operations that torch runs."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.communication import randomised
from benchmarks.plan import job_of
from minitron_nemo.arch import Architecture
from minitron_nemo.models.build import build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.activations import Activations
from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.time import COPIES, distillation
from minitron_nemo.planning.traffic import backward_traffic, forward_traffic
from tests.pool import run_distributed

MICRO_BATCH = 2


class Moved(TorchDispatchMode):
    """Bytes of operands and results, but for products with a weight and what only makes a buffer or a mask."""

    LEFT_OUT = ("mm", "empty", "new_empty_strided", "ones", "triu")
    NOT_READ = ("baddbmm", "copy_", "new_zeros")  # their first operand; of baddbmm, since beta is 0

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # `_unsafe_view` is one by another name.
        if not func.is_view and func.overloadpacket.__name__ not in (*self.LEFT_OUT, "_unsafe_view"):
            operands = args[1:] if func.overloadpacket.__name__ in self.NOT_READ else args
            tensors = [leaf for leaf in tree_leaves((operands, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def moved_by_a_layer(model: Architecture, dtype: torch.dtype, sequence_length: int) -> tuple[int, int]:
    launch.initialize(Layout(), seed=1)
    gpt = randomised(build_model(model, Layout(), dtype=dtype)).modules[0]
    states = torch.randn(sequence_length, MICRO_BATCH, model.hidden_size, dtype=dtype, requires_grad=True)
    turns = gpt.rotary_pos_emb(sequence_length)
    with Moved() as forward:
        output = gpt.decoder.layers[0](states, attention_mask=None, rotary_pos_emb=turns)[0]
    with Moved() as backward:
        output.backward(torch.ones_like(output))
    return forward.bytes, backward.bytes


def architecture(**sizes: Any) -> Architecture:
    shape = {
        "hidden_size": 64,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "kv_channels": 8,
    }
    return Architecture(**{"num_layers": 1, "vocab_size": 128, "max_position_embeddings": 1024, **shape, **sizes})


# Each moves mostly scores, or mostly neurons; what is left out is a few percent of it then.
CASES = {
    "scores, bf16": (architecture(), torch.bfloat16, 1024),
    "scores, fp32": (architecture(), torch.float32, 1024),
    "neurons, bf16": (
        architecture(ffn_hidden_size=8192, num_attention_heads=2, num_query_groups=2),
        torch.bfloat16,
        16,
    ),
    "neurons of squared ReLU": (
        architecture(
            ffn_hidden_size=8192,
            num_attention_heads=2,
            num_query_groups=2,
            family="nemotron",
            model_type="nemotron",
            rotary_percent=0.5,
        ),
        torch.bfloat16,
        16,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_moves_what_is_predicted(case: str) -> None:
    model, dtype, length = CASES[case]
    forward, backward = run_distributed(1, moved_by_a_layer, model, dtype, length)[0]
    predicted = Activations(model, Layout(), MICRO_BATCH, length, dtype.itemsize)
    assert forward_traffic(predicted) == pytest.approx(forward, rel=0.1)
    of_cuda = 12 * predicted.scores()  # what its softmax's backward pass writes first, and a CPU's does not
    assert backward_traffic(predicted) - of_cuda == pytest.approx(backward, rel=0.1)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpu_without_transformer_engine_waits_for_what_its_layers_move(recompute: bool) -> None:
    sizes = Namespace(layers=4, vocab_size=1024, sequence_length=128, microbatches=4, chunk_bytes=2**20)
    job = job_of(sizes, 1, Layout(), recompute)
    slow = Device(peak_flops=1e12, memory_bandwidth=1e9)
    fast = replace(slow, memory_bandwidth=1e30)

    def waits(part: str, slow: Device) -> float:
        return distillation(job, job.segments[-1], slow, 0.5).parts[part] - unhindered[part]

    unhindered = distillation(job, job.segments[-1], fast, 0.5).parts
    student, teacher = (Activations(model, Layout(), 1, 128, 2) for model in (job.student, job.teacher))
    forward = forward_traffic(student) * (2 if recompute else 1)
    layers = sizes.layers * sizes.microbatches
    assert waits("student", slow) == pytest.approx(layers * (forward + backward_traffic(student)) / (COPIES * 1e9))
    assert waits("teacher", slow) == pytest.approx(layers * forward_traffic(teacher) / (COPIES * 1e9))
    for other in (replace(slow, cpu=True), replace(slow, transformer_engine=True)):
        assert distillation(job, job.segments[-1], other, 0.5).parts["teacher"] <= unhindered["teacher"]
