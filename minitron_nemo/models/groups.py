"""Query groups of zeros, where a model's number of them does not divide over the tensor-parallel ranks.

    3 groups, TP=2      rank 0: group 0, group 1      rank 1: group 2, zeros

A group of zeros has queries, keys and values of zero, and is read by columns of zero. What it adds is zero, and so is
every gradient that reaches it: AdamW leaves it as it is, and function and training are those of the model without it
(`Layout.padded`). Checkpoints hold the groups that the model has, each as a piece of its own, the optimizer's state
included: Megatron-core applies a `ShardedTensorFactory` of a weight to what belongs to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.axes import Axis
from minitron_nemo.arch.counts import forward_flops_per_token, parameters
from minitron_nemo.arch.tensors import table
from minitron_nemo.parallel.layout import Layout


def without_padding(state: dict[str, Any], architecture: Architecture, layout: Layout) -> dict[str, Any]:
    """A module's `sharded_state_dict` with the weights of heads stored, and loaded, without groups of zeros.

    What is loaded into a group of zeros is zero, whatever was there.
    """
    if layout.padded(architecture) == architecture:
        return state
    return {name: _unpadded(name, value, architecture, layout) for name, value in state.items()}


def padding(architecture: Architecture, layout: Layout, sequence_length: int) -> dict[str, Any] | None:
    """What the groups of zeros cost, as shares of the model's own; None where there are none."""
    padded = layout.padded(architecture)
    if padded == architecture:
        return None
    before, after = (forward_flops_per_token(shape, sequence_length) for shape in (architecture, padded))
    return {
        "num_attention_heads": padded.num_attention_heads,
        "num_query_groups": padded.num_query_groups,
        "parameters": parameters(padded) / parameters(architecture) - 1,
        "flops": after / before - 1,
    }


def _unpadded(name: str, value: Any, architecture: Architecture, layout: Layout) -> Any:
    if not isinstance(value, ShardedTensor):
        return value
    for spec in table(architecture):
        split = () if spec.tp_dim is None else spec.dims[spec.tp_dim].axes
        if Axis.HEADS in split and name.endswith(spec.name.split("{layer}")[-1]):
            return _by_group(value, spec.tp_dim or 0, architecture, layout)
    return value


def _by_group(whole: ShardedTensor, dim: int, architecture: Architecture, layout: Layout) -> ShardedTensorFactory:
    """This rank's groups of a weight whose `dim` runs over them, as Megatron-core describes it with its padding."""
    total = architecture.num_query_groups
    held = layout.padded(architecture).num_query_groups // layout.tensor_model_parallel_size
    first = parallel_state.get_tensor_model_parallel_rank() * held
    own = kept = min(held, total - first)
    stacked = tuple(
        (axis, whole.global_offset[axis], whole.global_shape[axis]) for axis in range(whole.prepend_axis_num)
    )
    replica = whole.replica_id
    if own < 1:  # Megatron-core knows no weight without a piece: a copy of the last group, which is not written
        assert isinstance(replica, tuple)
        first, own, kept, replica = total - 1, 1, 0, (1, *replica[1:])

    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        size = tensor.shape[dim] // held
        return [
            ShardedTensor.from_rank_offsets(
                key,
                tensor.detach().narrow(dim, index * size, size),
                *stacked,
                (dim + whole.prepend_axis_num, first + index, total),
                replica_id=replica_id,
                prepend_axis_num=whole.prepend_axis_num,
            )
            for index in range(own)
        ]

    merge = partial(_merge, shape=whole.local_shape, dim=dim, kept=kept)
    return ShardedTensorFactory(whole.key, whole.data, build, merge, replica)


def _merge(pieces: list[Tensor], *, shape: tuple[int, ...], dim: int, kept: int) -> Tensor:
    """The groups that were loaded, zeros after them."""
    padded = pieces[0].new_zeros(shape)
    start = 0
    for piece in pieces[:kept]:
        padded.narrow(dim, start, piece.shape[dim]).copy_(piece)
        start += piece.shape[dim]
    return padded
