"""The experts of a mixture by the formulas of the papers, in fp64, one after the other, from stored tensors alone.

The router's weights of a token: softmax over all experts, the largest of them, made to sum to 1 where `normalised`
(arXiv 2101.03961, 2401.04088; Qwen's `norm_topk_prob`). An expert: W_down (silu(W_gate x) * W_up x) (2002.05202). Its
score: the mean over the tokens routed to it of weight x |output| (REAP, 2510.13999). Of a shared expert the weight of
every token is a sigmoid of the product with one row; its neurons are as they are without that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray


def starve(weights: dict[str, torch.Tensor], expert: int) -> None:
    """Change the tensors of a Mixtral so that no token is routed to an expert.

    Channel 0 is the same positive number everywhere, and of the router's rows this expert's alone reads it, negated.
    """
    weights["model.embed_tokens.weight"][:, 0] = 0.5
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "w2.weight")):
            weight[0] = 0  # no layer writes to channel 0
        if name.endswith("block_sparse_moe.gate.weight"):
            weight[:, 0] = 0
            weight[expert] = 0
            weight[expert, 0] = -100


@dataclass
class Expert:
    """Of one expert: `weights` [b, s] of the router, 0 where it does not see a token; `neurons` [b, s, f] times them.

    `outputs` [b, s, h] times them; `columns` [f] the norms of W_down's columns.
    """

    weights: Array
    neurons: Array
    outputs: Array
    columns: Array

    def score(self, mask: Array) -> float:
        """The mean of weight x |output| over the tokens of `mask` [b, s] that it sees; 0 if it sees none."""
        seen = mask & (self.weights != 0)
        return float(np.linalg.norm(self.outputs[seen], axis=-1).mean()) if seen.any() else 0.0


def shared_expert(tensors: dict[str, torch.Tensor], layer: int, x: Array) -> Expert | None:
    """The expert of a layer that sees every token, where it has one."""
    prefix = f"model.layers.{layer}.mlp.shared_expert"
    if f"{prefix}_gate.weight" not in tensors:
        return None
    gate, up, down = (tensors[f"{prefix}.{part}_proj.weight"].double().numpy() for part in ("gate", "up", "down"))
    row = tensors[f"{prefix}_gate.weight"].double().numpy()[0]
    weights = 1 / (1 + np.exp(-(x @ row)))
    gated = x @ gate.T
    neurons = gated / (1 + np.exp(-gated)) * (x @ up.T)
    return Expert(weights, neurons, weights[..., None] * (neurons @ down.T), np.linalg.norm(down, axis=0))


def experts_of(tensors: dict[str, torch.Tensor], layer: int, x: Array, topk: int, normalised: bool) -> list[Expert]:
    """The experts of a layer on its normed states `x` [b, s, h]; `tensors` by Qwen3-MoE's names."""

    def matrix(name: str) -> Array:
        return tensors[f"model.layers.{layer}.mlp.{name}.weight"].double().numpy()

    logits = x @ matrix("gate").T  # [b, s, experts]
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    order = np.argsort(-shares, axis=-1, kind="stable")[..., :topk]
    chosen = np.zeros_like(shares)
    np.put_along_axis(chosen, order, np.take_along_axis(shares, order, -1), -1)
    if normalised:
        chosen /= chosen.sum(-1, keepdims=True)
    found = []
    for number in range(shares.shape[-1]):
        gate, up, down = (matrix(f"experts.{number}.{part}_proj") for part in ("gate", "up", "down"))
        gated = x @ gate.T
        neurons = chosen[..., number, None] * gated / (1 + np.exp(-gated)) * (x @ up.T)
        found.append(Expert(chosen[..., number], neurons, neurons @ down.T, np.linalg.norm(down, axis=0)))
    return found
