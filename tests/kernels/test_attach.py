"""A loss attached to a tensor on its way through the pipeline, with what Megatron's schedules do to that tensor."""

from __future__ import annotations

import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from torch import Tensor

from minitron_nemo.kernels import attach_loss, linear_hidden_loss
from tests.kernels.counting import Count

TOKENS, WIDTH = 16, 64


class _Stage:
    """hidden = x @ weight.T with an intermediate-state loss attached, as the last thing of a pipeline stage."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x, self.teacher, self.upstream = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(3))
        self.weight = torch.randn(WIDTH, WIDTH, generator=generator).requires_grad_()
        self.projection = torch.randn(WIDTH, WIDTH, generator=generator).requires_grad_()
        self.scale = torch.ones([])

    def loss(self, hidden: Tensor) -> Tensor:
        return linear_hidden_loss(hidden, self.projection, self.teacher, torch.ones(TOKENS))[0]

    def forward(self) -> Tensor:
        hidden = torch.nn.functional.linear(self.x, self.weight)
        return attach_loss(hidden, self.loss(hidden), self.scale)

    def gradients(self) -> list[Tensor]:
        assert self.weight.grad is not None and self.projection.grad is not None
        return [self.weight.grad, self.projection.grad]


def _added_up(scale: float) -> list[Tensor]:
    """Gradients of what the next stages make of the states plus scale * loss, by plain autograd."""
    stage = _Stage()
    hidden = torch.nn.functional.linear(stage.x, stage.weight)
    ((hidden * stage.upstream).sum() + scale * stage.loss(hidden)).backward()
    return stage.gradients()


def test_the_loss_gets_the_scale_that_is_set_when_the_gradient_passes() -> None:
    stage = _Stage()
    output = stage.forward()
    assert torch.equal(output, torch.nn.functional.linear(stage.x, stage.weight))
    stage.scale.fill_(0.25)
    output.backward(stage.upstream)
    for mine, expected in zip(stage.gradients(), _added_up(0.25), strict=True):
        torch.testing.assert_close(mine, expected)


def test_megatron_may_free_the_output_of_a_stage_that_ends_with_it() -> None:
    stage = _Stage()
    with Count() as count:
        output = stage.forward()
        before = count.alive
        deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
        assert count.alive <= before - 4 * TOKENS * WIDTH + 4
    custom_backward(output, stage.upstream)
    for mine, expected in zip(stage.gradients(), _added_up(1.0), strict=True):
        torch.testing.assert_close(mine, expected)


def test_without_gradients_nothing_is_attached() -> None:
    with torch.no_grad():
        output = _Stage().forward()
    assert output.grad_fn is None
