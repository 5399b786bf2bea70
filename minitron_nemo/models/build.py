"""An Architecture on a layout as Megatron-core modules: one GPTModel per virtual pipeline stage.

Weights are not initialised: whoever builds a model loads it (`models.checkpoint`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.family import family
from minitron_nemo.errors import UserError
from minitron_nemo.models.activation import ACTIVATIONS
from minitron_nemo.models.norm import Norm
from minitron_nemo.models.output_layer import OutputLayer, install_output_layer
from minitron_nemo.models.rope import scaled_frequencies
from minitron_nemo.parallel import device, launch
from minitron_nemo.parallel.layout import Layout

# Rows of the vocabulary that one tensor-parallel rank holds are a multiple of this, as Megatron-LM does.
VOCAB_MULTIPLE = 128


class LanguageModel(GPTModel):
    """GPTModel with our output layer."""

    output_layer: OutputLayer

    def setup_embeddings_and_output_layer(self) -> None:
        """Megatron's constructor calls this once the modules exist and before it ties and marks their weights."""
        if self.post_process:
            install_output_layer(self)
        if self.pre_process:
            self.embedding.register_forward_hook(_with_plain_strides)
        super().setup_embeddings_and_output_layer()


def _with_plain_strides(module: Any, arguments: Any, states: torch.Tensor) -> torch.Tensor:
    """The same states, [s, b, h], with the strides of a tensor that was made in this shape.

    Those of a single sequence are transposed without a copy, and their second dim, of size 1, keeps the stride that it
    had. torch.matmul then does not see that rows follow each other, and multiplies by a copy of a frozen weight for
    every token.
    """
    return states.view(states.shape)


@dataclass(frozen=True)
class Model:
    """A model on this rank: `chunks` has one module per virtual stage, wrapped in Megatron's DDP where asked for."""

    chunks: list[MegatronModule]
    architecture: Architecture
    layout: Layout
    config: TransformerConfig

    @property
    def modules(self) -> list[LanguageModel]:
        """The chunks without their wrapper."""
        return [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in self.chunks]

    @property
    def output_layer(self) -> OutputLayer | None:
        """The output layer, on ranks of the last pipeline stage."""
        last = self.modules[-1]
        return last.output_layer if last.post_process else None

    @property
    def output_weight(self) -> torch.Tensor | None:
        """[padded_vocab/tp, h], the embedding's where tied, on ranks of the last pipeline stage; without gradient."""
        layer, last = self.output_layer, self.modules[-1]
        if layer is None:
            return None
        tied = last.share_embeddings_and_output_weights
        weight: torch.Tensor = last.shared_embedding_or_output_weight() if tied else layer.weight
        return weight.detach()


def padded_vocab_size(architecture: Architecture, layout: Layout) -> int:
    """Rows of embedding and output weight on this layout; the rows from `vocab_size` on belong to no token."""
    multiple = VOCAB_MULTIPLE * layout.tensor_model_parallel_size
    return -(-architecture.vocab_size // multiple) * multiple


def build_model(
    architecture: Architecture,
    layout: Layout,
    *,
    dtype: torch.dtype,
    ddp: DistributedDataParallelConfig | None = None,
    recompute: bool = False,
) -> Model:
    """Build this rank's part of the model, with undefined weights, in training mode.

    Where the tensor-parallel size does not divide the query groups, groups of zeros fill them up (`models.groups`).
    `launch.initialize` must have been called, with this layout or one of the same groups. With `ddp` the chunks are
    wrapped and the config's `finalize_model_grads_func` and `no_sync_func` set, as Megatron's schedules expect.
    `recompute` recomputes the activations of whole layers in the backward pass. Raises UserError for a layout that the
    architecture does not fit.
    """
    layout.check(architecture, launch.world_size())
    config = _transformer_config(layout.padded(architecture), layout, dtype, recompute)
    stages: list[int | None] = list(range(layout.virtual_pipeline_model_parallel_size or 0)) or [None]
    with launch.virtual_stages(layout):
        chunks = [_build_chunk(architecture, layout, config, stage) for stage in stages]
    if ddp is not None:
        chunks = [
            # Only the first chunk's gradient reduction overlaps with computation, so only it needs buckets.
            DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return Model(chunks, architecture, layout, config)


def _transformer_config(
    architecture: Architecture, layout: Layout, dtype: torch.dtype, recompute: bool
) -> TransformerConfig:
    fused = device.has_transformer_engine()
    layers = family(architecture.family)
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization=layers.normalization,
        layernorm_zero_centered_gamma=layers.layernorm_zero_centered_gamma,
        layernorm_epsilon=architecture.layernorm_epsilon,
        gated_linear_unit=layers.gated_linear_unit,
        activation_func=ACTIVATIONS[layers.activation],
        add_bias_linear=False,
        add_qkv_bias=layers.add_qkv_bias,
        qk_layernorm=layers.qk_layernorm,
        window_size=_window(architecture),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_uneven_stages(layout.layers_per_stage(architecture.num_layers)),
        context_parallel_size=layout.context_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        # With two pipeline ranks, interleaving under the default flags pairs sends and receives wrongly and
        # computes wrong numbers in silence: both ranks are each other's previous and next.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        init_method=_leave_undefined,
        output_layer_init_method=_leave_undefined,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=fused,
        bias_activation_fusion=fused and layers.gated_linear_unit,  # Megatron-core fuses no activation of ours alone
        bias_dropout_fusion=fused,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        **_experts(architecture),
    )


def _experts(architecture: Architecture) -> dict[str, Any]:
    """The fields of a mixture of experts. Nothing balances the load of the experts, and no token is dropped."""
    if architecture.num_moe_experts is None:
        return {}
    fields: dict[str, Any] = {
        "num_moe_experts": architecture.num_moe_experts,
        "moe_ffn_hidden_size": architecture.moe_ffn_hidden_size,
        "moe_router_topk": architecture.moe_router_topk,
        "moe_router_pre_softmax": architecture.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
    }
    if not architecture.has(Axis.SHARED_FFN):
        return fields
    if "moe_shared_expert_gate" not in TransformerConfig.__dataclass_fields__:
        raise UserError(f"family {architecture.family}: this megatron-core has no gate of shared experts; use 0.16.1")
    shared = architecture.moe_shared_expert_intermediate_size
    return fields | {"moe_shared_expert_intermediate_size": shared, "moe_shared_expert_gate": True}


def _window(architecture: Architecture) -> tuple[int, int] | None:
    """Tokens that attention reaches to the left and to the right of a token; None where nothing is out of reach."""
    size = architecture.window_size
    return None if size is None or size >= architecture.max_position_embeddings else (size - 1, 0)


def _uneven_stages(layers: list[int]) -> list[list[str]] | None:
    """Megatron's `pipeline_model_parallel_layout` of stages with these numbers of layers; None for equal ones."""
    if len(set(layers)) == 1:
        return None
    stages = [["decoder"] * count for count in layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _leave_undefined(weight: torch.Tensor) -> None:
    """An initialisation that does nothing.

    Not `perform_initialization=False`: with it, Megatron-core's layers (tensor_parallel/layers.py:873) do not mark
    their weights as tensor-parallel either, and the gradient norm that clipping uses leaves out all ranks but the
    first.
    """


def _build_chunk(
    architecture: Architecture, layout: Layout, config: TransformerConfig, vp_stage: int | None
) -> LanguageModel:
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    model = LanguageModel(
        config=config,
        transformer_layer_spec=_block_spec(config, vp_stage),
        vocab_size=padded_vocab_size(architecture, layout),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
        vp_stage=vp_stage,
    )
    model.to(device.current_device())  # Megatron-core makes routers and gates of shared experts on the CPU
    if architecture.rope_scaling is not None:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, architecture.rope_scaling)
    return model


def _block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """TransformerEngine's layers where it is installed, otherwise Megatron-core's own with our norm."""
    if device.has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, qk_layernorm=config.qk_layernorm)
        norm = TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(config.num_moe_experts, normalization=config.normalization), Norm
        layer.submodules.input_layernorm = norm
        layer.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm
        if config.num_moe_experts is not None:
            # TransformerEngine has no linear layer to fuse this norm into, and stores it under its own name.
            del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)
