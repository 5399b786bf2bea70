"""Memory against what Hugging Face allocates, latency against the roofline's two ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import active_parameters, parameters
from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.config import ServingConfig
from minitron_nemo.search.costs import key_value_bytes, latency_seconds, memory_bytes
from tests.tiny import write_tiny_llama


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_memory_is_what_hugging_face_holds(tmp_path: Path, tied: bool, dtype: torch.dtype, name: str) -> None:
    """Weights of the loaded model, keys and values after a batch has been run, byte by byte."""
    directory = write_tiny_llama(tmp_path / "model", num_layers=3, num_query_groups=2, tied=tied)
    architecture = open_source(directory).architecture
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.no_grad():
        past = model(torch.zeros(5, 13, dtype=torch.int64), use_cache=True).past_key_values
    cache = sum(part.numel() * part.element_size() for layer in past.layers for part in (layer.keys, layer.values))
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    serving = ServingConfig(batch_size=5, prompt_tokens=10, new_tokens=3, dtype=name)
    assert 5 * key_value_bytes(architecture, 13, name) == cache
    assert memory_bytes(architecture, serving) == weights + cache


def llama(**changes: int | bool | str) -> Architecture:
    sizes = {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }
    return Architecture(**{**sizes, **changes})


def test_keys_and_values_of_llama_31_8b() -> None:
    """128 KiB a token in bf16: 2 x 32 layers x 8 groups x 128 channels x 2 bytes; with a window, of its tokens."""
    assert key_value_bytes(llama(), 8192, "bfloat16") == 8192 * 128 * 1024
    assert key_value_bytes(llama(window_size=1000), 8192, "bfloat16") == 1000 * 128 * 1024


def test_generation_is_bound_by_bandwidth_and_a_prompt_by_arithmetic() -> None:
    """An infinitely fast half leaves the other one: bytes over bandwidth, FLOPs over peak."""
    serving = ServingConfig(batch_size=1, prompt_tokens=1000, new_tokens=1)
    read = (parameters(llama()) - 128256 * 4096) * 2  # of the embedding, a few rows
    memory_bound = replace(serving, peak_flops=1e30, bandwidth=3.35e12)
    assert latency_seconds(llama(), memory_bound) == pytest.approx(read / 3.35e12)
    cache = sum(range(1001, 1010)) * 128 * 1024
    assert latency_seconds(llama(), replace(memory_bound, new_tokens=10)) == pytest.approx(
        (10 * read + cache) / 3.35e12
    )
    # 2 per multiply-add: matrices of every token, causal attention over 500 on average, one token's logits.
    matrices = 32 * (4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 14336)
    attention = 32 * 4 * 500 * 32 * 128
    flops = 1000 * (2 * matrices + attention) + 2 * 128256 * 4096
    arithmetic_bound = replace(serving, peak_flops=1e15, bandwidth=1e30)
    assert latency_seconds(llama(), arithmetic_bound) == pytest.approx(flops / 1e15)
    assert latency_seconds(llama(), replace(arithmetic_bound, batch_size=3)) == pytest.approx(3 * flops / 1e15)
    twice = latency_seconds(llama(), replace(arithmetic_bound, new_tokens=2)) - flops / 1e15
    assert twice == pytest.approx((2 * (matrices + 128256 * 4096) + 32 * 4 * 1001 * 32 * 128) / 1e15)


def test_a_tied_embedding_is_read_as_the_output_weight() -> None:
    serving = ServingConfig(prompt_tokens=1, new_tokens=1, peak_flops=1e30, bandwidth=1.0)
    tied = llama(share_embeddings_and_output_weights=True)
    assert latency_seconds(tied, serving) == latency_seconds(llama(), serving) == 2 * parameters(tied)


def test_a_pass_reads_the_experts_that_its_tokens_are_expected_to_meet() -> None:
    """Against the mean over all ways in which three tokens can choose two of four experts each."""
    mixture, both = (
        llama(num_moe_experts=n, moe_router_topk=2, moe_ffn_hidden_size=14336, family="mixtral", model_type="mixtral")
        for n in (4, 2)
    )
    ways = list(product(combinations(range(4), 2), repeat=3))
    met = sum(len(set().union(*way)) for way in ways) / len(ways)
    an_expert = 32 * 3 * 4096 * 14336
    read = parameters(mixture) - 128256 * 4096 - (4 - met) * an_expert
    serving = ServingConfig(batch_size=3, prompt_tokens=1, new_tokens=1, peak_flops=1e30, bandwidth=1.0)
    assert latency_seconds(mixture, serving) == pytest.approx(2 * read)
    one = latency_seconds(mixture, replace(serving, batch_size=1))
    assert one == pytest.approx(2 * (active_parameters(mixture) - 128256 * 4096))
    # Arithmetic is that of the two experts of a token, whatever there is to read.
    busy = replace(serving, peak_flops=1.0, bandwidth=1e30)
    router = 32 * 2 * 4096
    assert latency_seconds(mixture, busy) - latency_seconds(both, busy) == pytest.approx(3 * 2 * router)
