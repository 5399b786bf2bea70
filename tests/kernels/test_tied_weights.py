"""The loss at the end of a Megatron model under DDP: every parameter's main_grad against Hugging Face's autograd.

With tied embeddings on one stage the output weight's gradient goes to main_grad directly and the embedding's arrives
through autograd on the same parameter: neither may be lost or counted twice.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from minitron_nemo.kernels import linear_kd_loss
from minitron_nemo.models.build import build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.kernels.inputs import relative_error
from tests.models.support import MICROBATCHES, SEQUENCE, TinyModel, huggingface_model, megatron_order, tokens
from tests.pool import run_distributed

SCALE = 0.25  # of the upstream gradient


def _teacher() -> tuple[Tensor, Tensor]:
    """States [microbatch, s, h] and output weight [384, h], padded as the student's."""
    generator = torch.Generator().manual_seed(11)
    states = torch.randn(MICROBATCHES, SEQUENCE, 48, generator=generator)
    return states, torch.randn(384, 48, generator=generator) * 0.2


def _main_grads(tiny: TinyModel, overlap: bool) -> dict[str, Tensor]:
    layout = Layout()
    launch.initialize(layout, seed=1)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap
    )
    model = build_model(tiny.architecture, layout, dtype=torch.float32, ddp=ddp)
    load_model(model, tiny.megatron)
    chunk, layer = model.chunks[0], model.output_layer
    assert layer is not None
    states, teacher_weight = _teacher()
    chunk.zero_grad_buffer()
    for index, row in enumerate(tokens()):
        layer.head = partial(_head, tiny.architecture.vocab_size, states[index], teacher_weight, row[1:])
        last = index == MICROBATCHES - 1
        if last:
            loss = chunk(row[None, :-1], torch.arange(SEQUENCE)[None], None)
            (loss.sum() * SCALE).backward()
        else:
            with chunk.no_sync():
                loss = chunk(row[None, :-1], torch.arange(SEQUENCE)[None], None)
                (loss.sum() * SCALE).backward()
    chunk.finish_grad_sync()
    return {name: parameter.main_grad.clone() for name, parameter in model.modules[0].named_parameters()}


def _head(
    vocab_size: int, states: Tensor, teacher_weight: Tensor, labels: Tensor, hidden: Tensor, weight: Tensor
) -> Tensor:
    total, _ = linear_kd_loss(
        hidden.flatten(0, 1),
        weight,
        states,
        teacher_weight,
        labels,
        torch.ones(len(labels)),
        vocab_size=vocab_size,
        ce_weight=0.5,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    return total


def _hugging_face_grads(tiny: TinyModel) -> dict[str, Tensor]:
    model = huggingface_model(tiny.huggingface, torch.float64)
    states, teacher_weight = _teacher()
    for index, row in enumerate(tokens()):
        log_p = model(row[None, :-1]).logits[0].log_softmax(-1)
        log_q = (states[index].double() @ teacher_weight.double().t())[:, :259].log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum()
        ce = -log_p.gather(1, row[1:, None]).sum()
        ((kl + 0.5 * ce) * SCALE).backward()
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in model.named_parameters()}
    return megatron_order(grads, tiny.architecture)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("tiny"), tied=request.param)


@pytest.mark.parametrize("overlap", [False, True])
def test_main_grads_equal_hugging_face(tiny: TinyModel, overlap: bool) -> None:
    found = run_distributed(1, _main_grads, tiny, overlap)[0]
    expected = _hugging_face_grads(tiny)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name][: len(gradient)], gradient) < 1e-5, name
        assert found[name][len(gradient) :].abs().sum() == 0, name
