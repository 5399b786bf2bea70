"""NeMo 2.7.3 without a GPU: what it does through CUDA or TransformerEngine, replaced for a test.

Nothing here takes part in how weights are named or converted: that is NeMo's own code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.collections.llm.gpt.model import base
from nemo.lightning import MegatronStrategy
from nemo.lightning.io import pl


class Norm(torch.nn.Module):
    """The weights of a norm, by the signature that layer specs are built with; no model runs here."""

    def __init__(self, config: Any, hidden_size: int, **_: Any) -> None:
        super().__init__()
        for name in norm_weights(config):
            self.register_parameter(name, torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype)))


class NormLinear(tensor_parallel.ColumnParallelLinear):
    """A column-parallel linear layer with the norm before it inside, as TransformerEngine's is."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        for name in norm_weights(config):
            weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
            self.register_parameter(f"layer_norm_{name}", weight)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        norm = {name: weight for name, weight in self.named_parameters() if name.startswith("layer_norm_")}
        return found | make_sharded_tensors_for_checkpoint(norm, prefix, {}, sharded_offsets)


def norm_weights(config: Any) -> tuple[str, ...]:
    return ("weight", "bias") if config.normalization == "LayerNorm" else ("weight",)


def layer_spec(config: Any) -> ModuleSpec:
    """Megatron-core's layers under the names that they have with TransformerEngine."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = IdentityOp
    spec.submodules.pre_mlp_layernorm = IdentityOp
    attention = spec.submodules.self_attention.submodules
    attention.linear_qkv = NormLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    spec.submodules.mlp.submodules.linear_fc1 = NormLinear
    spec.submodules.sharded_state_dict_keys_map = {}
    return spec


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Lets NeMo import, save, load and export on a machine without CUDA and TransformerEngine."""
    never_asynchronous = _with_defaults(MegatronStrategy, ckpt_async_save=False)
    patches = (
        # megatron/core/transformer/transformer_config.py:1266: raised unless TransformerEngine provides it. Connectors
        # make configurations with the default apply_rope_fusion=True (nemo/collections/llm/gpt/model/llama.py:81).
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", lambda *_, **__: None),
        # nemo/collections/llm/gpt/model/base.py:233: without TransformerEngine the norms have names that the
        # connectors do not convert.
        mock.patch.object(base, "local_layer_spec", layer_spec),
        # megatron/core/transformer/torch_norm.py:30: asserts not persist_layer_norm, which LlamaConfig sets.
        mock.patch("megatron.core.transformer.transformer_block.LayerNormImpl", Norm),
        # megatron/core/dist_checkpointing/strategies/filesystem_async.py:230
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        # megatron/core/dist_checkpointing/strategies/state_dict_saver.py:252
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        # nemo/lightning/megatron_parallel.py:617
        mock.patch.object(torch.cuda, "Stream", lambda *_, **__: None),
        mock.patch.object(torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        # nemo/lightning/io/pl.py:495 asserts torch.cuda.is_initialized()
        mock.patch.object(pl, "_fix_tensors_device", lambda checkpoint: checkpoint),
        # nemo/lightning/pytorch/strategies/megatron_strategy.py: the asynchronous writer needs CUDA streams.
        mock.patch("nemo.lightning.MegatronStrategy", never_asynchronous),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _with_defaults(function: Any, **defaults: Any) -> Any:
    return lambda *arguments, **given: function(*arguments, **{**defaults, **given})
