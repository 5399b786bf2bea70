"""One distillation step: teacher windows, the student's forward and backward through Megatron's schedule, gradients.

    for each window of microbatches:
        states = teacher.step(window)                    forward only, all ranks
        forward_backward(student, window, states)        1F1B or interleaved; gradients add up in main_grad
    finalize_model_grads                                 once: reduce over dp, tied embeddings, divide by the tokens

Megatron's schedules end with the reduction of the gradients. Windows before the last leave that out, count their
tokens, and hold back the overlapped reduction; so the gradients are the same, bit for bit, however many windows a
step takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.distillation.balance import Balance
from minitron_nemo.distillation.intermediate import IntermediateLoss
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.teacher import TeacherSignal, TeacherSource
from minitron_nemo.kernels import LossSums, SparseTeacher
from minitron_nemo.models.build import Model
from minitron_nemo.models.states import gather_sequence
from minitron_nemo.parallel.device import Stopwatch, current_device

# The sums a step reports: of the weighted divergence, of the weighted cross-entropy, of tokens, of their weights, of
# tokens whose loss is not finite; of the intermediate losses; of these and the cross-entropy with their own weights.
LOGITS_SUMS = ("logits", "ce", "tokens", "weight", "nonfinite")
SUMS = (*LOGITS_SUMS, "hidden", "alpha_hidden", "weighted_ce")
# A microbatch, the teacher's final states or what is known instead, and the states that intermediate losses here need.
Final = Tensor | SparseTeacher | None
Item = tuple[Microbatch, Final, dict[int, Tensor]]


class Step:
    """Forward and backward of one global batch; the optimizer is not its business."""

    def __init__(
        self,
        student: Model,
        teacher: TeacherSource | None,
        objective: DistillationObjective,
        *,
        intermediate: IntermediateLoss | None = None,
        ce_weight: float | str | None = None,
    ) -> None:
        """`ce_weight`: a number or dynamic; None: the objective's."""
        self.student = student
        self.intermediate = intermediate
        self.teacher = teacher
        self.objective = objective
        self.balance = Balance(
            objective.ce_weight if ce_weight is None else ce_weight, 0.0 if intermediate is None else intermediate.alpha
        )
        tp = student.layout.tensor_model_parallel_size
        self.tp_group = parallel_state.get_tensor_model_parallel_group() if tp > 1 else None
        self._objective = objective  # with the weights of the present step
        self._tokens: Tensor = torch.zeros([], dtype=torch.int, device=current_device())
        self._sums: LossSums | None = None
        self.teacher_wait = Stopwatch()
        self._reports: list[tuple[Microbatch, Tensor]] = []
        self._signal = TeacherSignal([], None)

    def __call__(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Leave the mean gradient of the global batch in `main_grad` and return this rank's `SUMS`, fp64 [8].

        Every rank passes its data-parallel share of the batch: microbatches of one shape, which may differ from call
        to call. Gradients: as Megatron leaves them, reduced over the
        data-parallel group (each rank's own shard of it), summed losses divided by the number of tokens whose weight
        is not 0. The sums are this data-parallel rank's, on the last pipeline stage; zero on the other stages, but for
        the intermediate losses, which count where they are.
        """
        if not self.balance.measured:
            # The first dynamic weights come from a pass of its own: ratios are known when all forwards are done.
            self.balance.update(dict(zip(SUMS, self._run(microbatches, forward_only=True), strict=True)))
        sums = self._run(microbatches)
        self.balance.update(dict(zip(SUMS, sums, strict=True)))
        return sums

    def _run(self, microbatches: Sequence[Microbatch], forward_only: bool = False) -> Tensor:
        """This rank's `SUMS` over the batch; with `forward_only` no gradient is touched."""
        for chunk in self.student.chunks:
            chunk.zero_grad_buffer()
        if self.intermediate is not None:
            self.intermediate.begin(self.balance.weight("alpha"))
        ce_weight = self.balance.weight("ce_weight")
        self._objective = replace(self.objective, ce_weight=ce_weight)
        self._tokens.zero_()
        self._reports = []
        size = len(microbatches) if self.teacher is None else self.teacher.window
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=current_device())
        for start in range(0, len(microbatches), size):
            window = microbatches[start : start + size]
            if self.teacher is not None:
                self._let_go()
                with self.teacher_wait:
                    self._signal = self.teacher.step(window)
            reports = self._forward_backward(window, start + size >= len(microbatches), forward_only)
            self._reports += zip(window, reports, strict=False)  # stages before the last have none
        self._let_go()
        for _, report in self._reports:
            sums[: len(LOGITS_SUMS)] += report
        if self.intermediate is not None:
            hidden, weighted, nonfinite = self.intermediate.sums()
            sums[SUMS.index("hidden")], sums[SUMS.index("alpha_hidden")] = hidden, weighted
            sums[SUMS.index("nonfinite")] += nonfinite
        sums[SUMS.index("weighted_ce")] = ce_weight * sums[SUMS.index("ce")]
        return sums

    def _let_go(self) -> None:
        """Hold nothing of the teacher's any more: its source has room for as much as was asked for, no more."""
        self._signal = TeacherSignal([], None)
        if self.student.output_layer is not None:
            self.student.output_layer.head = None
        if self.intermediate is not None:
            self.intermediate.let_go()

    def nonfinite(self) -> list[str]:
        """The microbatches of the last call whose loss is not finite, on the ranks that computed it."""
        counted = [(batch, report.tolist()) for batch, report in self._reports]
        found = [] if self.intermediate is None else self.intermediate.nonfinite()
        return found + [
            f"microbatch {index} (samples {', '.join(batch['sample_ids'])}): "
            f"{report[SUMS.index('nonfinite')]:.0f} of {batch['labels'].numel()} tokens"
            for index, (batch, report) in enumerate(counted)
            if report[SUMS.index("nonfinite")]
        ]

    def _forward_backward(self, window: Sequence[Microbatch], last: bool, forward_only: bool) -> list[Tensor]:
        chunks = self.student.chunks
        micro_batch_size, sequence_length = window[0]["tokens"].shape
        final: Sequence[Final] = self._signal.hidden or self._signal.sparse or [None] * len(window)
        states = self._signal.states or [{} for _ in window]
        items = list(zip(window, final, states, strict=True))
        config = self.student.config
        config.finalize_model_grads_func = partial(self._finalize, last)
        config.no_sync_func = self._no_sync_func(last)
        with ExitStack() as held:
            if not last:
                for chunk in chunks:
                    held.enter_context(chunk.no_sync())
            iterators = [iter(items) for _ in chunks]
            return get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(items),
                seq_length=sequence_length,
                micro_batch_size=micro_batch_size,
                forward_only=forward_only,
            )

    def _no_sync_func(self, last: bool) -> Any:
        """What holds back the overlapped reduction until a window's last microbatch; schedules take one or a list.

        Before the last window it is held back from outside, so the schedule must not release it.
        """
        funcs: list[Callable[[], AbstractContextManager[None]]] = [
            chunk.no_sync if last else nullcontext for chunk in self.student.chunks
        ]
        return funcs if len(funcs) > 1 else funcs[0]

    def _finalize(self, last: bool, model: list[Any], num_tokens: Tensor, **kwargs: Any) -> None:
        self._tokens += num_tokens
        if last:
            finalize_model_grads(model, self._tokens, **kwargs)
            if self.intermediate is not None:
                self.intermediate.reduce_gradients(self._tokens)

    def _forward_step(self, items: Iterator[Item], chunk: Any) -> tuple[Tensor, Any]:
        microbatch, final, states = next(items)
        if self.intermediate is not None:
            self.intermediate.current = (microbatch, states)
        layer = self.student.output_layer
        if layer is not None:
            # Only the chunk that owns the output layer calls it, within this forward.
            layer.head = partial(self._head, microbatch, final)
        return chunk(microbatch["tokens"], microbatch["position_ids"], None), self._report

    def _head(self, microbatch: Microbatch, final: Final, hidden: Tensor, weight: Tensor) -> Tensor:
        sequence_parallel = self.student.layout.sequence_parallel
        sparse = final if isinstance(final, SparseTeacher) else None
        states = final if isinstance(final, Tensor) else None
        if states is not None and not sequence_parallel:
            states = gather_sequence(states)
        total, self._sums = self._objective.loss(
            hidden,
            weight,
            states,
            self._signal.output_weight,
            microbatch["labels"],
            microbatch["token_weights"],
            vocab_size=self.student.architecture.vocab_size,
            tp_group=self.tp_group,
            sequence_parallel=sequence_parallel,
            sparse_teacher=sparse,
        )
        return total

    def _report(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What Megatron's schedule asks of a loss with `calculate_per_token_loss`: sum, integer count, report."""
        sums, self._sums = self._sums, None
        assert sums is not None, "the output layer did not call its head"
        report = torch.stack([getattr(sums, name).detach().to(torch.float64) for name in LOGITS_SUMS])
        # sum(): the schedule frees the output it gets, which must not be a view.
        return output.sum(), sums.tokens.to(torch.int), report
