"""Importance measured on Hugging Face's own models with hooks of its own, in fp64, by the papers' formulas but for one.

A neuron's activation is what the second matrix reads: 2407.14679 prints what goes into the activation function
(docs/method.md says why not). Nothing of the package takes part: whole activations are kept and reduced with numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.families import EAGER, unfused
from tests.importance.mixture import Expert, experts_of, shared_expert

SEQUENCE = {
    "mean": lambda x: np.abs(x).mean(axis=0),
    "l2": lambda x: np.sqrt((x**2).sum(axis=0)),
    "var": lambda x: np.abs(x).var(axis=0),
}
BATCH = {
    "mean": lambda x: x.mean(axis=0),
    "l2": lambda x: np.sqrt((x**2).sum(axis=0)),
    "var": lambda x: x.var(axis=0),
}


class Norm(torch.nn.Module):
    """RMSNorm in the precision of its input; Hugging Face's computes in fp32 whatever it is given."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


def load(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **EAGER).eval()
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            model.set_submodule(name, Norm(module))
    return model


def activations(model: Any, tokens: torch.Tensor) -> dict[str, list[np.ndarray]]:
    """All that is measured, each [b, s, n]: `norms` (two a layer), `ffn`, `heads`, the layers' `inputs` and `outputs`.

    `residuals` are the inputs of all norms, the final one's last. Mixtures have `mlps`, what their experts add, and no
    `ffn`.
    """
    names = ("norms", "ffn", "heads", "inputs", "outputs", "residuals", "mlps", "shared", "shared_columns")
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def keep(name: str, tensor: torch.Tensor) -> None:
        seen[name].append(tensor.detach().numpy())

    handles = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            handles.append(norm.register_forward_hook(lambda _, args, out: keep("norms", out)))
            handles.append(norm.register_forward_pre_hook(lambda _, args: keep("residuals", args[0])))
        reads = [("heads", layer.self_attn.o_proj), ("inputs", layer)]
        if hasattr(layer.mlp, "down_proj"):
            reads.append(("ffn", layer.mlp.down_proj))
        for name, module in reads:
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0])))
        handles.append(
            layer.register_forward_hook(lambda _, args, out: keep("outputs", out[0] if isinstance(out, tuple) else out))
        )
        handles.append(layer.mlp.register_forward_hook(lambda _, args, out: keep("mlps", out)))
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: keep("residuals", args[0])))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def rms_normed(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def mixtures_of(directory: Path, model: Any, seen: dict[str, list[np.ndarray]]) -> list[list[Expert]]:
    """The experts of every layer on the states that reached them, which must add up to what the layer added."""
    if not hasattr(model.config, "num_experts_per_tok"):
        return []
    tensors = unfused(load_file(directory / "model.safetensors"), 0, 0)
    layers = []
    for layer, added in enumerate(seen["mlps"]):
        states, topk = seen["norms"][2 * layer + 1], model.config.num_experts_per_tok
        layers.append(experts_of(tensors, layer, states, topk, getattr(model.config, "norm_topk_prob", True)))
        shared = shared_expert(tensors, layer, states)
        if shared is not None:
            seen["shared"].append(shared.neurons)
            seen["shared_columns"].append(shared.columns)
        outputs = sum(expert.outputs for expert in layers[-1]) + (0 if shared is None else shared.outputs)
        np.testing.assert_allclose(outputs, added, rtol=1e-5, atol=1e-6)
    return layers


def routed(expert: Expert, over_tokens: Any, row: int, weights: torch.Tensor) -> np.ndarray:
    """The expert's neurons over those tokens of a sequence that count and that it sees; zeros where it sees none."""
    tokens = (weights[row].numpy() != 0) & (expert.weights[row] != 0)
    return over_tokens(expert.neurons[row][tokens]) if tokens.any() else np.zeros(expert.neurons.shape[-1])


def reference_scores(
    directory: Path, tokens: torch.Tensor, weights: torch.Tensor
) -> dict[tuple[str, str, str] | str, np.ndarray]:
    """Scores of each (axis, sequence aggregation, batch aggregation), `layers`, `columns`, RMSNorms' `norm_squares`.

    Weight 0 does not count.
    """
    model = load(directory)
    seen = activations(model, tokens)
    kept = [row != 0 for row in weights.numpy() if (row != 0).any()]
    rows = [index for index, row in enumerate(weights.numpy()) if (row != 0).any()]
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    seen["heads"] = [
        np.linalg.norm(x.reshape(*x.shape[:2], -1, head_dim), axis=-1) for x in seen["heads"]
    ]  # [b, s, heads]
    scores: dict[tuple[str, str, str] | str, np.ndarray] = {}
    mixtures = mixtures_of(directory, model, seen)
    for sequence, over_tokens in SEQUENCE.items():
        for batch, over_sequences in BATCH.items():
            for axis in (axis for axis in ("norms", "ffn", "heads", "shared") if seen[axis]):
                per_module = [
                    over_sequences(np.stack([over_tokens(x[row][mask]) for row, mask in zip(rows, kept, strict=True)]))
                    for x in seen[axis]
                ]
                scores[axis, sequence, batch] = np.sum(per_module, axis=0) if axis == "norms" else np.stack(per_module)
            if mixtures:
                scores["ffn", sequence, batch] = np.stack(
                    [
                        [
                            over_sequences(np.stack([routed(expert, over_tokens, row, weights) for row in rows]))
                            for expert in layer
                        ]
                        for layer in mixtures
                    ]
                )
    mask = weights.numpy() != 0
    cosines = [
        (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
        for x, y in zip(seen["inputs"], seen["outputs"], strict=True)
    ]
    if hasattr(model.config, "rms_norm_eps"):
        normed = [rms_normed(x, model.config.rms_norm_eps) for x in seen["residuals"]]
        scores["norm_squares"] = np.stack([(x[mask] ** 2).mean(0) for x in normed])
    if mixtures:
        scores["columns"] = np.array([[expert.columns for expert in layer] for layer in mixtures])
        scores["shared_columns"] = np.array(seen["shared_columns"])
        scores["experts"] = np.array([[expert.score(mask) for expert in layer] for layer in mixtures])
    else:
        scores["columns"] = np.stack(
            [np.linalg.norm(layer.mlp.down_proj.weight.detach(), axis=0) for layer in model.model.layers]
        )
    scores["layers"] = np.array([1 - cosine[mask].mean() for cosine in cosines])
    return scores
