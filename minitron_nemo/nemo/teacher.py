"""The teacher inside NeMo's trainer: on the student's ranks, with its layout, a forward-only pass before each step.

    on_megatron_step_start -> TaughtStep -> [teacher: all microbatches, forward only] -> [student: NeMo's own schedule]

NeMo runs all microbatches of a step in one schedule, so the teacher's states of all of them are held: one vector per
token, sequence-sharded over the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides
from torch import Tensor

from minitron_nemo.checkpoint import safe_pickle
from minitron_nemo.errors import UserError
from minitron_nemo.models.output_layer import install_output_layer
from minitron_nemo.models.states import StateCapture, shard_sequence
from minitron_nemo.nemo.loss import step_sums
from minitron_nemo.parallel.layout import Layout

# What both models must share to run on the same ranks.
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "pipeline_dtype",
)


class Teacher:
    """A frozen model of NeMo, without the trainer's knowledge: no submodule, no DDP, in no checkpoint."""

    def __init__(self, config: Any, tokenizer: Any, path: str, student: Any, strategy: Any) -> None:
        """Build from the GPTConfig `config` and load the NeMo checkpoint `path`. Collective.

        `student` is the student's GPTConfig, `strategy` NeMo's MegatronStrategy, whose process groups exist.
        """
        for name in LAYOUT:
            setattr(config, name, getattr(student, name))
        dtypes = getattr(strategy.precision_plugin, "dtype_config", None)
        if dtypes is not None:
            config = update_config_with_dtype_overrides(dtypes, config)
        self.config = config
        self.layout = layout_of(config)
        self.capture: StateCapture | None = None  # of the states between layers that losses need
        self.model: GPTModel = config.configure_model(tokenizer)
        if self.model.post_process:
            install_output_layer(self.model).mode = "hidden"
        self.model.to(strategy.root_device, dtypes.pipeline_dtype if dtypes is not None else None)
        self.model.requires_grad_(False)
        self.model.eval()
        self._load(path, strategy)

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the output weight, [padded_vocab/tp, h_t], on the last pipeline stage."""
        tied = self.model.share_embeddings_and_output_weights
        weight: Tensor = self.model.shared_embedding_or_output_weight() if tied else self.model.output_layer.weight
        return weight

    def states(
        self, batches: Sequence[dict[str, Any]], sequence_length: int, micro_batch_size: int
    ) -> tuple[list[Tensor], list[dict[int, Tensor]]]:
        """States of NeMo's microbatches, [s/tp, b, h_t] each. Collective.

        The final ones, on the last stage, none elsewhere; and those that `capture` brings to this stage, by number.
        """
        found: list[Tensor] = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if self.capture is None:
            return found, [{} for _ in batches]
        return found, self.capture.take([(micro_batch_size, sequence_length)] * len(batches))

    def _forward_step(self, batches: Iterator[dict[str, Any]], model: GPTModel) -> tuple[Tensor, Any]:
        output = self.config.forward_step_fn(model, {**next(batches), "labels": None})
        # [b, s, h] -> [s, b, h]; the sequence is [s/tp] already under sequence parallelism
        return output, lambda output, non_loss_data: shard_sequence(output.transpose(0, 1), self.layout)

    def _load(self, path: str, strategy: Any) -> None:
        weights = ckpt_to_weights_subdir(path, is_saving=False)
        safe_pickle.check_metadata(weights)
        metadata = strategy.unwrapped_checkpoint_io.load_content_metadata(weights)
        wanted = self.model.sharded_state_dict(prefix="module.", metadata=metadata)
        # Without objects other than tensors: TransformerEngine's fp8 state, which a frozen model has no use for.
        tensors, _ = extract_matching_values(wanted, lambda value: not isinstance(value, ShardedObject))
        loaded = strategy.checkpoint_io.load_checkpoint(weights, {"state_dict": tensors})["state_dict"]
        state = {name.removeprefix("module."): value for name, value in loaded.items()}
        missing = self.model.load_state_dict(state, strict=False).missing_keys
        if missing := [name for name in missing if not name.endswith("_extra_state")]:
            raise UserError(f"{path}: has no {missing[0]}; is it a checkpoint of the teacher?")


def layout_of(config: Any) -> Layout:
    """The Layout of a GPTConfig, whose layers are split evenly."""
    names = [field.name for field in fields(Layout) if field.name != "num_layers_per_stage"]
    return Layout(**{name: getattr(config, name) for name in names})


class TaughtStep(MegatronStep):
    """NeMo's step of a training batch, begun with the teacher's pass."""

    def get_data_iterator_and_seq_length(self) -> tuple[Any, int | None]:
        """Called once a step, before the schedule."""
        data, sequence_length = super().get_data_iterator_and_seq_length()
        model = self.pl_module
        batches = [model.data_step(data) for _ in range(self.num_microbatches)]
        taught = model.teach(batches, sequence_length or self.seq_length, self.micro_batch_size)
        if not model.balance.measured:
            # The first dynamic weights come from a pass of its own: ratios are known when all forwards are done.
            model.begin(taught)
            reports = self.forward_backward_func(
                forward_step_func=self.forward_step_func,
                data_iterator=data,
                model=self.model,
                num_microbatches=self.num_microbatches,
                seq_length=sequence_length or self.seq_length,
                micro_batch_size=self.micro_batch_size,
                forward_only=True,
            )
            model.end(step_sums(model, reports))
        model.begin(taught)
        return data, sequence_length


class TeacherPass(pl.Callback):
    """Has every training step begin with the teacher's pass."""

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        if step.forward_only:
            return step
        return TaughtStep(**{field.name: getattr(step, field.name) for field in fields(MegatronStep)})
