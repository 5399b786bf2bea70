"""Intermediate losses in NeMo's trainer: `distillation.intermediate` on NeMo's modules, for models of one width.

The map between two widths is left out: it is trained, and NeMo's optimizer and checkpoints hold the student alone.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from nemo.collections import llm

from minitron_nemo.arch import Architecture
from minitron_nemo.config import IntermediateConfig
from minitron_nemo.distillation.intermediate import IntermediateLoss, Pair, deliveries, resolve_pairs
from minitron_nemo.errors import UserError
from minitron_nemo.models.build import Model
from minitron_nemo.models.states import StateCapture
from minitron_nemo.nemo.teacher import Teacher, layout_of


def checked_pairs(config: IntermediateConfig, student: llm.GPTModel, teacher: llm.GPTModel) -> list[Pair]:
    """The pairs of an objective. Raises UserError for a pair that does not exist and for models of two widths."""
    pairs = resolve_pairs(config, _sizes(teacher.config), _sizes(student.config))
    widths = student.config.hidden_size, teacher.config.hidden_size
    if pairs and widths[0] != widths[1]:
        raise UserError(
            f"distill.intermediate.pairs: {config.pairs!r} asks for intermediate losses between hidden sizes "
            f"{widths[0]} and {widths[1]}; NeMo's trainer has no place for the map between them: set it to [], or use "
            "`minitron distill`"
        )
    return pairs


def intermediate_loss(
    pairs: list[Pair], config: IntermediateConfig, student: Any, teacher: Teacher
) -> IntermediateLoss:
    """Watch the states of the pairs in both models; `student` is a GPTModel that NeMo has wrapped already.

    Megatron's DDP gathers parameters in hooks of its own, and those of the losses have to come after them. Collective.
    """
    own = Model([student], _sizes(student.config), layout_of(student.config), student.config)
    config_of_teacher = copy(teacher.config)
    # As the weights were cast; MegatronMixedPrecision says fp32 of them unless it is told otherwise.
    config_of_teacher.params_dtype = next(teacher.model.parameters()).dtype
    other = Model([teacher.model], _sizes(teacher.config), teacher.layout, config_of_teacher)
    teacher.capture = StateCapture(other, deliveries(pairs, other, own))
    return IntermediateLoss(own, other.architecture, pairs, config, seed=0)


def _sizes(config: Any) -> Architecture:
    """The sizes of a GPTConfig, for those who ask for depth and width; of its family nothing is said."""
    return Architecture(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        vocab_size=1,
        max_position_embeddings=config.seq_length,
    )
