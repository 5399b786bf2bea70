"""Losses of models without some layers by Hugging Face in fp64, and a model in which the cheapest block is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.importance.hugging_face import load
from tests.tiny import write_tiny_llama

Samples = list[dict[str, Any]]


def hugging_face_sums(directory: Path, left_out: Iterable[int], samples: Samples) -> np.ndarray:
    """Sum of weight * cross-entropy of each sample, [samples], of the model whose other layers are taken away."""
    model = load(directory)
    dropped = set(left_out)
    model.model.layers = nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in dropped)
    model.config.num_hidden_layers = len(model.model.layers)
    sums = []
    for sample in samples:
        with torch.no_grad():
            log_p = model(sample["tokens"][None], use_cache=False).logits[0].log_softmax(-1)
        ce = -log_p.gather(-1, sample["labels"][:, None])[:, 0]
        sums.append(float((ce * sample["token_weights"]).sum()))
    return np.array(sums)


def weights_of(samples: Samples) -> np.ndarray:
    return np.array([float(sample["token_weights"].double().sum()) for sample in samples])


def random_samples(count: int = 7, longest: int = 24, seed: int = 3) -> Samples:
    """Of several lengths; the beginnings do not count, one token counts half, and one sample does not count at all."""
    generator = torch.Generator().manual_seed(seed)
    samples: Samples = []
    for number in range(count):
        tokens = torch.randint(259, (longest + 1 - number % 3,), generator=generator)
        weights = torch.ones(len(tokens) - 1)
        weights[:2] = 0.0
        samples.append({"tokens": tokens[:-1], "labels": tokens[1:], "token_weights": weights, "id": str(number)})
    samples[1]["token_weights"][5] = 0.5
    samples[2]["token_weights"][:] = 0.0
    return samples


def likeliest_labels(directory: Path, samples: Samples) -> Samples:
    """`samples` with what the model holds likeliest as labels: it loses by what changes its mind."""
    model = load(directory)
    with torch.no_grad():
        return [sample | {"labels": model(sample["tokens"][None]).logits[0].argmax(-1)} for sample in samples]


def plant(directory: Path, planted: Sequence[int], num_layers: int, seed: int = 0) -> Path:
    """A model in which `planted` turn the residual stream around and change no logit.

    Three channels hold one vector much longer than all else, so that the norms' scales depend on little but its length.
    Each planted layer takes it from one of these channels to the next, and writes nothing else. No other layer writes
    to them, and only planted ones read them.
    """
    write_tiny_llama(directory, num_layers=num_layers, seed=seed)
    hidden, length, channels = 64, 200.0, (61, 62, 63)
    weights = load_file(directory / "model.safetensors")
    unit = length / np.sqrt(hidden)  # the norms' divisor
    weights["model.embed_tokens.weight"][:, channels] = torch.tensor([length, 0.0, 0.0])
    weights["lm_head.weight"] *= 8
    for name, tensor in weights.items():
        if name.endswith("norm.weight"):
            tensor *= unit
            tensor[list(channels)] = 0.0
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[list(channels)] = 0.0
    normed = np.sqrt(hidden)  # the long channel behind a norm with a gain of 1
    written = normed**2 / (1 + np.exp(-normed))  # silu(gate) * up of a neuron that reads it in both
    for place, layer in enumerate(planted):
        prefix = f"model.layers.{layer}."
        source, target = channels[place % 3], channels[(place + 1) % 3]
        gate, up, down = (weights[f"{prefix}mlp.{part}_proj.weight"].zero_() for part in ("gate", "up", "down"))
        weights[prefix + "self_attn.o_proj.weight"].zero_()
        weights[prefix + "post_attention_layernorm.weight"].zero_()[source] = 1.0
        gate[0, source] = up[0, source] = 1.0
        down[source, 0], down[target, 0] = -length / written, length / written
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
