"""Architecture from the command-line arguments that Megatron-LM keeps in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.bridge import megatron_scaling
from minitron_nemo.arch.transformer_config import SILU, architecture_from_fields

# Argument: TransformerConfig's name for it, where they differ.
_RENAMED = {
    "max_position_embeddings": "seq_length",
    "norm_epsilon": "layernorm_epsilon",
    "swiglu": "gated_linear_unit",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "num_experts": "num_moe_experts",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}


def architecture_from_args(args: Mapping[str, Any], origin: str, tokenizer_size: int | None) -> Architecture:
    """Read an Architecture from the arguments of a training, by their names in Megatron-LM's arguments.py.

    Raises UserError, naming `origin`, for a feature that the family does not have. The model counts as a Llama.
    """
    fields = {name: value for name, value in args.items() if name != "seq_length"}  # of the training, not the model
    fields |= {field: args[name] for name, field in _RENAMED.items() if name in args}
    if args.get("swiglu"):
        fields["activation_func"] = SILU
    if not args.get("group_query_attention"):
        fields["num_query_groups"] = None
    if args.get("use_rotary_position_embeddings"):  # before there was position_embedding_type
        fields["position_embedding_type"] = "rope"
    fields["share_embeddings_and_output_weights"] = not args.get("untie_embeddings_and_output_weights")
    fields["vocab_size"] = args.get("vocab_size") or tokenizer_size or args.get("padded_vocab_size")
    return architecture_from_fields(
        fields,
        origin,
        model_type="llama",
        rope_scaling=megatron_scaling(args.get("use_rope_scaling"), args.get("rope_scaling_factor"), origin),
        tokenizer_size=tokenizer_size,
    )
