"""GGUF files of Llama models, read only: dequantised by blocks of rows as they are read.

llama.cpp stores queries and keys with the two halves of each head's rotary pairs interleaved: its row 2i + h of a
head is row h * kv_channels / 2 + i of the Hugging Face tensor.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.huggingface import architecture_from_hf
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.checkpoint import tokenizer
from minitron_nemo.checkpoint.huggingface import hf_shapes
from minitron_nemo.checkpoint.source import check_tensors
from minitron_nemo.errors import UserError

NAMES = {  # Hugging Face -> GGUF
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PERMUTED = ("attn_q", "attn_k")
VALUES_PER_READ = 1 << 22  # dequantised at once: bounds the temporaries of dequantisation


class GGUFSource:
    """Reads one .gguf file. Weights are float32, whatever they are quantised to."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"{path}: truncated or not a GGUF file: {' '.join(str(error).split())}") from None
        self._fields = reader.fields
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self._architecture()
        self._tensors = {tensor.name: tensor for tensor in tensors(self.architecture)}
        wanted = {_gguf_name(name): shape for name, shape in hf_shapes(self.architecture).items()}
        found = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._stored.items()}
        check_tensors(path, found, wanted, set(found) - set(wanted))

    def _field(self, key: str, default: Any = None) -> Any:
        """A metadata value. Raises UserError when it is missing and there is no default."""
        if key in self._fields:
            return self._fields[key].contents()
        if default is None:
            raise UserError(f"{self.path}: key {key} is missing")
        return default

    def _architecture(self) -> Architecture:
        family = self._field("general.architecture")
        if family != "llama":
            raise UserError(f"{self.path}: general.architecture {family!r} is not supported; known: llama")
        if self._field("llama.expert_count", 0):
            raise UserError(f"{self.path}: experts are not read from GGUF; give the Hugging Face original")
        if "rope_freqs.weight" in self._stored or self._field("llama.rope.scaling.type", "none") != "none":
            raise UserError(
                f"{self.path}: scaled rotary frequencies cannot be read back; give the Hugging Face original"
            )
        heads = self._field("llama.attention.head_count")
        config = {
            "model_type": "llama",
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv", heads),
            "head_dim": self._field("llama.attention.key_length", 0),  # 0 means what a missing key does
            "vocab_size": int(self._tensor("token_embd.weight").shape[1]),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": round(self._field("llama.attention.layer_norm_rms_epsilon"), 12),  # stored as float32
            "rope_theta": self._field("llama.rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in self._stored,
        }
        return architecture_from_hf(config, str(self.path))

    def _tensor(self, name: str) -> Any:
        if name not in self._stored:
            raise UserError(f"{self.path}: tensor {name} is missing")
        return self._stored[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name]
        out = np.empty((stop - start, *tensor.spec.shape(self.architecture)[1:]), dtype=np.float32)
        for piece in tensor.hf_pieces(self.architecture):
            first, last = max(start, piece.start), min(stop, piece.start + piece.length)
            if first < last:
                row = piece.hf_start + first - piece.start
                out[first - start : last - start] = self._rows(_gguf_name(piece.hf_name), row, row + last - first)
        return torch.from_numpy(out)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Hugging Face rows [start, stop) of a tensor, dequantised."""
        if not name.removesuffix(".weight").endswith(PERMUTED):
            return self._stored_rows(name, start, stop)
        head = self.architecture.kv_channels
        rows = np.arange(start, stop)
        half, pair = np.divmod(rows % head, head // 2)
        stored = rows // head * head + 2 * pair + half
        first = int(stored.min())
        return self._stored_rows(name, first, int(stored.max()) + 1)[stored - first]

    def _stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._stored[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        row_bytes = tensor.n_bytes // shape[0]
        out = np.empty((stop - start, *shape[1:]), dtype=np.float32)
        step = max(1, VALUES_PER_READ // prod(shape[1:]))
        for row in range(start, stop, step):
            rows = min(step, stop - row)
            # Read, not mapped: mapped pages would stay in memory.
            data = np.fromfile(self.path, np.uint8, rows * row_bytes, offset=int(tensor.data_offset) + row * row_bytes)
            values = dequantize(_typed(data.reshape(rows, row_bytes), tensor), tensor.tensor_type)
            out[row - start : row - start + rows] = values.reshape(rows, *shape[1:])
        return out

    def weight_files(self) -> list[Path]:
        return [self.path]

    def layout(self) -> str:
        kinds = sorted({tensor.tensor_type.name for tensor in self._stored.values()})
        return f"whole tensors in 1 file, stored as {', '.join(kinds)}"

    def tokenizer_size(self) -> int | None:
        return len(self._fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in self._fields else None

    def copy_tokenizer(self, directory: Path) -> None:
        """Rebuild the Hugging Face tokenizer, its chat template included, from the file's vocabulary and merges."""
        from transformers import AutoTokenizer

        directory.mkdir(exist_ok=True)
        if self.tokenizer_size() is None:
            return
        AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name).save_pretrained(directory)
        ids = {
            key: self._field(f"tokenizer.ggml.{name}_token_id", -1)
            for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
        }
        tokenizer.write_generation_config(directory, {key: value for key, value in ids.items() if value >= 0})


def _gguf_name(hf_name: str) -> str:
    stem = hf_name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"


def _typed(data: np.ndarray, tensor: Any) -> np.ndarray:
    """Bytes viewed as what gguf's dequantiser takes: floats where the tensor is not quantised, else bytes."""
    return data.view(tensor.data.dtype)
