"""The last layer of the model, which can be asked for logits, for its input, or for a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

# (hidden [s(/tp), b, h], weight [padded_vocab/tp, h]) -> anything; sequence-sharded under sequence parallelism
Head = Callable[[Tensor, Tensor], Tensor]


class OutputLayer(ColumnParallelLinear):
    """Megatron's output projection with the model's last step left to its user.

    `head`, where set, is called with the states after the final norm and the output weight (the embedding's, where
    tied) and its result is the output. Otherwise `mode` decides: `"logits"`, vocabulary-parallel
    [s, b, padded_vocab/tp], or `"hidden"`, the input as it is. GPTModel swaps dims 0 and 1 of whatever comes out; a
    scalar comes out as [1, 1]. It runs as a module in each case, so the hooks that fetch parameters and reduce
    gradients run as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mode = "logits"
        self.head: Head | None = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.head is not None:
            result = self.head(input_, self.weight if weight is None else weight)
            return result.reshape(1, 1) if result.dim() == 0 else result, None
        if self.mode == "hidden":
            return input_, None
        return super().forward(input_, weight, runtime_gather_output)


def install_output_layer(model: GPTModel) -> OutputLayer:
    """Put an OutputLayer in the place of a last stage's output projection, on the same weight (None where tied)."""
    weight = model.output_layer.weight
    layer = OutputLayer(
        model.config.hidden_size,
        model.vocab_size,
        config=model.config,
        init_method=model.config.init_method,
        bias=False,
        skip_weight_param_allocation=True,
        tp_group=model.pg_collection.tp,
    )
    layer.weight = weight
    model.output_layer = layer
    return layer
