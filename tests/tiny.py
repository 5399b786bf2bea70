"""A tiny random Llama with a byte-level tokenizer, written as a Hugging Face directory.

Everything here is spelled out by hand: no line of the package takes part, so that tests compare with something else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|bos|>", "<|pad|>")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_tiny_llama(
    directory: Path,
    *,
    num_layers: int = 4,
    hidden_size: int = 64,
    ffn_hidden_size: int = 96,
    num_attention_heads: int = 8,
    num_query_groups: int = 4,
    kv_channels: int = 8,
    vocab_size: int = 259,
    tied: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    model_type: str = "llama",
) -> Path:
    """Write config.json, model.safetensors, tokenizer files and generation_config.json; returns `directory`.

    Matrices are normal with std 0.1, norms 1 +- 0.1, so that logits vary. The tokenizer has 259 entries whatever
    `vocab_size` is: 259 is odd, so every tensor-parallel layout has to pad it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.1).to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(hidden_size, generator=generator)).to(dtype)

    queries, keys = num_attention_heads * kv_channels, num_query_groups * kv_channels
    weights = {"model.embed_tokens.weight": matrix(vocab_size, hidden_size), "model.norm.weight": norm()}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(queries, hidden_size),
            prefix + "self_attn.k_proj.weight": matrix(keys, hidden_size),
            prefix + "self_attn.v_proj.weight": matrix(keys, hidden_size),
            prefix + "self_attn.o_proj.weight": matrix(hidden_size, queries),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "mlp.gate_proj.weight": matrix(ffn_hidden_size, hidden_size),
            prefix + "mlp.up_proj.weight": matrix(ffn_hidden_size, hidden_size),
            prefix + "mlp.down_proj.weight": matrix(hidden_size, ffn_hidden_size),
        }
    if not tied:
        weights["lm_head.weight"] = matrix(vocab_size, hidden_size)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[model_type]],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": ffn_hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_query_groups,
        "head_dim": kv_channels,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 257,
        "eos_token_id": 256,
    }
    if model_type == "mistral":
        config["sliding_window"] = None  # as Mistral-NeMo has it; not given, it is 4096
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 257, "eos_token_id": 256}))
    write_byte_tokenizer(directory)
    return directory


def write_byte_tokenizer(directory: Path) -> None:
    """256 bytes, then `<|endoftext|>` (256, the document separator), `<|bos|>` (257) and `<|pad|>` (258)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "bos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[2],
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
