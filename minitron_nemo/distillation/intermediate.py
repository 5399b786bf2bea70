"""Intermediate losses: `L_hidden`, the sum over pairs (teacher state, student state) of their distance.

    stage that owns the student's state:  y = projection @ state  ->  distance to the teacher's, brought there
                                          alpha * gradient joins the stage's backward (`attach_loss`)

States are numbered as in `models.states`, after the norm that reads them, as 2407.14679 section 3 takes them. Where
the widths differ one learned linear map, without bias, takes the student's to the teacher's, shared by the pairs;
where they agree there is none, as the papers' map bridges the widths only. It is training state, no part of the
student.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.config import IntermediateConfig
from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.errors import UserError
from minitron_nemo.kernels import attach_loss, linear_hidden_loss
from minitron_nemo.models.build import Model
from minitron_nemo.models.states import EMBEDDING, Delivery, gather_sequence, owners, watch
from minitron_nemo.parallel.device import current_device

AUTO = "auto"
KEY = "hidden_projection.weight"


class Pair(NamedTuple):
    """State of the teacher that state `student` of the student is drawn to; `models.states.EMBEDDING` is -1."""

    teacher: int
    student: int


def resolve_pairs(config: IntermediateConfig, teacher: Architecture, student: Architecture) -> list[Pair]:
    """The recipe's pairs. `auto`: the outputs of the third last layers where depth is cut, none otherwise.

    The last two layers are too specialised to be imitated (2407.14679 section 3). Raises UserError.
    """
    if config.pairs == AUTO:
        if student.num_layers == teacher.num_layers:
            return []
        return [Pair(*(max(model.num_layers - 3, 0) for model in (teacher, student)))]
    pairs = parse_pairs(config)
    for pair in pairs:
        for name, state, model in zip(Pair._fields, pair, (teacher, student), strict=True):
            if state >= model.num_layers:
                raise UserError(
                    f"distill.intermediate.pairs: the {name} has no layer {state}; its layers are 0 to "
                    f"{model.num_layers - 1}, and {EMBEDDING} is the embedding's output"
                )
    return pairs


def parse_pairs(config: IntermediateConfig) -> list[Pair]:
    """The pairs of a recipe that lists them. Raises UserError for anything else."""
    wanted = f"give {AUTO} or a list of [teacher layer, student layer], {EMBEDDING} for the embedding's output"
    if not isinstance(config.pairs, list):
        raise UserError(f"distill.intermediate.pairs: {config.pairs!r} is no list; {wanted}")
    for pair in config.pairs:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(state) is int for state in pair)
        if not whole or min(pair) < EMBEDDING:
            raise UserError(f"distill.intermediate.pairs: {pair!r} is no pair; {wanted}")
    pairs = [Pair(*pair) for pair in config.pairs]
    if twice := [pair for pair in pairs if pairs.count(pair) > 1]:
        raise UserError(f"distill.intermediate.pairs: {list(twice[0])} occurs twice; remove one")
    return pairs


def deliveries(pairs: Sequence[Pair], teacher: Model, student: Model) -> list[Delivery]:
    """Which teacher states go from which pipeline rank to which."""
    sources, targets = (owners(model.architecture.num_layers, model.layout) for model in (teacher, student))
    return [Delivery(pair.teacher, sources[pair.teacher], targets[pair.student]) for pair in pairs]


class Projection(MegatronModule):
    """The learned map, [h_t, h_s], the same on every rank; called as a module so that DDP's hooks run."""

    def __init__(self, config: TransformerConfig, teacher_width: int, seed: int) -> None:
        super().__init__(config=config)
        bound = config.hidden_size**-0.5  # torch.nn.Linear's
        values = torch.empty(teacher_width, config.hidden_size)
        values.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(values.to(current_device(), config.params_dtype))

    def forward(self) -> Tensor:
        return self.weight


class IntermediateLoss:
    """Watches the student's paired states, adds their loss to its backward, and owns the map between the widths.

    Each step: `begin`, for every forward `current = (microbatch, teacher's states)`, after the last backward
    `reduce_gradients`. `alpha` is the recipe's, a number or dynamic; `begin` is told what it amounts to.
    """

    def __init__(
        self, student: Model, teacher: Architecture, pairs: Sequence[Pair], config: IntermediateConfig, seed: int
    ) -> None:
        """`student` has its chunks wrapped in DDP; the hooks stay on its modules."""
        self.student = student
        self.pairs = list(pairs)
        self.kind = config.loss
        self.alpha = config.alpha
        self.current: tuple[Microbatch, dict[int, Tensor]] | None = None
        self._alpha = torch.zeros([], dtype=torch.float32, device=current_device())
        self._sum = torch.zeros([], dtype=torch.float64, device=current_device())
        self._nonfinite: list[tuple[Pair, Microbatch, Tensor]] = []
        tp = student.layout.tensor_model_parallel_size
        self._tp_group = parallel_state.get_tensor_model_parallel_group() if tp > 1 else None
        # Forwards of a recomputed layer, in the order in which their backward repeats them.
        self._waiting: dict[Pair, deque[Any]] = {}
        for pair in self.pairs:
            if watch(student, pair.student, partial(self._see, pair)):
                self._waiting[pair] = deque()
        by_state = owners(student.architecture.num_layers, student.layout)
        self._stages = sorted({by_state[pair.student] for pair in self.pairs})
        self.projection: DistributedDataParallel | None = None
        self._held = ExitStack()
        self._learned = teacher.hidden_size != student.architecture.hidden_size
        if self._learned and self._waiting:
            module = Projection(student.config, teacher.hidden_size, seed)
            # The gradient norm counts one of the copies, as it does for embeddings tied across stages.
            module.weight.shared = self._stage != self._stages[0]  # type: ignore[attr-defined]
            self.projection = DistributedDataParallel(
                config=student.config, ddp_config=student.chunks[0].ddp_config, module=module, disable_bucketing=True
            )
        self._shape = (teacher.hidden_size, student.architecture.hidden_size)

    @property
    def chunks(self) -> list[DistributedDataParallel]:
        """What the optimizer updates besides the student's chunks."""
        return [] if self.projection is None else [self.projection]

    @property
    def _stage(self) -> int:
        return parallel_state.get_pipeline_model_parallel_rank()

    def begin(self, alpha: float) -> None:
        """Forget the sums and gradients of the last step; `alpha` weighs the losses in the next backward passes."""
        self._sum.zero_()
        self._nonfinite = []
        self._held.close()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
            # Pairs of several chunks, and recomputed layers, deliver gradients more than once per microbatch: the
            # reduction waits for `reduce_gradients`, whatever overlaps.
            self._held.enter_context(chunk.no_sync())
        self._alpha.fill_(alpha)

    def let_go(self) -> None:
        """Hold no states of the teacher any more; after the last backward of the microbatches that came with them."""
        self.current = None
        for waiting in self._waiting.values():
            waiting.clear()

    def sums(self) -> Tensor:
        """fp64 [3] of this rank's pairs since `begin`: loss, alpha * loss, tokens without a finite loss."""
        nonfinite = sum((count for _, _, count in self._nonfinite), torch.zeros_like(self._sum))
        return torch.stack([self._sum, self._sum * self._alpha, nonfinite])

    def nonfinite(self) -> list[str]:
        """The microbatches since `begin` with a token whose loss is not finite, on the ranks that own the pair."""
        return [
            f"samples {', '.join(batch['sample_ids'])}: intermediate loss {list(pair)} of {int(count)} tokens"
            for pair, batch, count in self._nonfinite
            if count
        ]

    def reduce_gradients(self, num_tokens: Tensor) -> None:
        """Leave the map's mean gradient in `main_grad`, as `finalize_model_grads` does for the student's weights.

        Summed over the tensor-parallel ranks where they see different tokens, over the stages that own pairs, and over
        the data-parallel group (each rank's shard); divided by `num_tokens` of the global batch.
        """
        self._held.close()
        if not self._learned:
            return
        if self.projection is None:
            gradient = torch.zeros(self._shape, dtype=torch.float32, device=current_device())
        else:
            gradient = self.projection.module.weight.main_grad
            if self.student.layout.sequence_parallel:
                torch.distributed.all_reduce(gradient, group=self._tp_group)
        if len(self._stages) > 1:
            torch.distributed.all_reduce(gradient, group=parallel_state.get_pipeline_model_parallel_group())
        for chunk in self.chunks:
            chunk.finish_grad_sync()
            if num_tokens > 0:
                chunk.scale_gradients(1.0 / num_tokens)

    def sharded_state_dict(self) -> dict[str, Any]:
        """What a training checkpoint holds of it; copies of other stages and ranks are replicas."""
        state: dict[str, Any] = {}
        if self.projection is not None:
            replica = (
                self._stages.index(self._stage),
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_data_parallel_rank(with_context_parallel=True),
            )
            state["projection"] = ShardedTensor.from_rank_offsets(
                KEY, self.projection.module.weight, replica_id=replica
            )
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint of `sharded_state_dict` held. The optimizer loads its own copy of the map."""
        if self.projection is not None:
            self.projection.module.weight.copy_(state["projection"])

    def _see(self, pair: Pair, x: Tensor, state: Tensor) -> Tensor | None:
        if self.current is None:  # a forward pass of somebody else
            return None
        waiting, differentiable = self._waiting[pair], torch.is_grad_enabled()
        repeated = differentiable and bool(waiting)
        seen = waiting.popleft() if repeated else self.current
        if not differentiable:
            waiting.append(seen)
        microbatch, targets = seen
        target = targets[pair.teacher]
        sequence_parallel = self.student.layout.sequence_parallel
        loss, sums = linear_hidden_loss(
            state.flatten(0, 1),  # [s(/tp)*b, h_s]
            None if self.projection is None else self.projection.module(),
            (target if sequence_parallel else gather_sequence(target)).flatten(0, 1),  # [s(/tp)*b, h_t]
            microbatch["token_weights"].t().reshape(-1),  # [s*b] in the order of the states
            kind=self.kind,
            tp_group=self._tp_group,
            sequence_parallel=sequence_parallel,
        )
        if not repeated:
            self._sum += sums.loss
            self._nonfinite.append((pair, microbatch, sums.nonfinite))
        return attach_loss(x, loss, self._alpha) if differentiable else None
