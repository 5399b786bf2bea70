"""One distillation step by the book: two Hugging Face models in fp64, full logits, autograd, one process.

Also the way from Hugging Face's gradients to the slice that a rank of some layout holds, spelled out by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import EAGER, unfused

VOCAB = 259


def random_microbatches(
    count: int, *, sequence_length: int = 16, micro_batch_size: int = 1, seed: int = 1, fractional: bool = True
) -> list[dict[str, Any]]:
    """Random tokens; of the token weights a quarter is 0, the others are fractions (or 1)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (micro_batch_size, sequence_length)
    batches = []
    for index in range(count):
        text = torch.randint(0, VOCAB, (micro_batch_size, sequence_length + 1), generator=generator)
        weights = torch.rand(shape, generator=generator) + 0.25 if fractional else torch.ones(shape)
        weights[torch.rand(shape, generator=generator) < 0.25] = 0.0
        batches.append(
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "position_ids": torch.arange(sequence_length).expand(shape).contiguous(),
                "token_weights": weights,
                "sample_ids": [f"{index}-{row}" for row in range(micro_batch_size)],
            }
        )
    return batches


@dataclass(frozen=True)
class Expected:
    """Sums over all tokens, and the gradient of (weighted objective / tokens) per Hugging Face parameter name."""

    logits: float
    ce: float
    tokens: int
    weight: float
    gradients: dict[str, Tensor]


def expected_step(
    student_dir: Path,
    teacher_dir: Path | None,
    microbatches: list[dict[str, Any]],
    *,
    logits_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
) -> Expected:
    """`L = sum_k w_k (ce_weight * CE_k + logits_weight * T^2 * D(p_t, p_s)_k)`; its gradient over #{w_k != 0}."""
    student = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64, **EAGER)
    teacher = teacher_dir and AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64, **EAGER)
    divergence_sum = torch.zeros([], dtype=torch.float64)
    ce = torch.zeros([], dtype=torch.float64)
    for batch in microbatches:
        weights = batch["token_weights"].double()
        logits = student(batch["tokens"]).logits
        picked = logits.log_softmax(-1).gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
        ce = ce - (weights * picked).sum()
        if teacher:
            with torch.no_grad():
                target = (teacher(batch["tokens"]).logits / temperature).log_softmax(-1)
            apart = _divergence(target, (logits / temperature).log_softmax(-1), divergence, jsd_beta)
            divergence_sum = divergence_sum + temperature**2 * (weights * apart).sum()
    tokens = sum(int((batch["token_weights"] != 0).sum()) for batch in microbatches)
    ((logits_weight * divergence_sum + ce_weight * ce) / tokens).backward()
    return Expected(
        logits=divergence_sum.item(),
        ce=ce.item(),
        tokens=tokens,
        weight=sum(batch["token_weights"].double().sum().item() for batch in microbatches),
        gradients=unfused(
            {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None},
            student.config.num_attention_heads,
            student.config.num_key_value_heads,
        ),
    )


def states_of(model: Any) -> dict[int, Tensor]:
    """Filled by the next forward: the output of every norm that reads the stream after layer k, -1 the embedding."""
    norms = [layer.input_layernorm for layer in model.model.layers] + [model.model.norm]
    found: dict[int, Tensor] = {}
    for state, norm in enumerate(norms, start=-1):
        norm.register_forward_hook(lambda _module, _inputs, output, state=state: found.__setitem__(state, output))
    return found


def _divergence(teacher: Tensor, student: Tensor, name: str, beta: float) -> Tensor:
    """Of log-probabilities, per token."""
    if name == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if name == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    middle = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * (teacher.exp() * (teacher - middle)).sum(-1) + (1 - beta) * (student.exp() * (student - middle)).sum(
        -1
    )


def rank_slice(gradients: dict[str, Tensor], name: str, layer: int, tp: int, tp_rank: int, groups: int) -> Tensor:
    """The part of Hugging Face's gradients that Megatron's local parameter `name` of layer `layer` holds.

    Embedding and output come whole, without the padding of the vocabulary: the caller compares its own rows.
    """

    def rows(matrix: Tensor) -> Tensor:
        return matrix.chunk(tp, 0)[tp_rank]

    hf = f"model.layers.{layer}."
    for place, norm in NORMS.items():
        if place in name:
            whose = "model." if "final" in place else hf
            return gradients[f"{whose}{norm}.{name.split(place)[1]}"]
    if "linear_qkv." in name:
        kind = name.rsplit(".", 1)[1]
        parts = [gradients[f"{hf}self_attn.{part}_proj.{kind}"].unflatten(0, (groups, -1)) for part in "qkv"]
        return rows(torch.cat(parts, 1).flatten(0, 1))
    if name.endswith(("router.weight", "gate_weight")):
        return gradients[f"{hf}mlp.gate.weight" if "router" in name else f"{hf}mlp.shared_expert_gate.weight"]
    mlp = f"{hf}mlp."
    if "shared_experts." in name:
        mlp += "shared_expert."
    if "local_experts." in name:
        mlp += f"experts.{int(name.split('.')[-3])}."
    if name.endswith("linear_fc1.weight"):
        names = [f"{mlp}{part}_proj.weight" for part in ("gate", "up")]
        return torch.cat([rows(gradients[part]) for part in names if part in gradients])
    if name.endswith("linear_fc2.weight"):
        return gradients[f"{mlp}down_proj.weight"].chunk(tp, 1)[tp_rank]
    if name.endswith("linear_proj.weight"):
        return gradients[f"{hf}self_attn.o_proj.weight"].chunk(tp, 1)[tp_rank]
    tied = "lm_head.weight" not in gradients
    assert name.endswith(("word_embeddings.weight", "output_layer.weight")), name
    return gradients["model.embed_tokens.weight" if tied or "word_embeddings" in name else "lm_head.weight"]


NORMS = {  # of the local spec, and of TransformerEngine's fused modules
    "input_layernorm.": "input_layernorm",
    "linear_qkv.layer_norm_": "input_layernorm",
    "q_layernorm.": "self_attn.q_norm",
    "k_layernorm.": "self_attn.k_norm",
    "pre_mlp_layernorm.": "post_attention_layernorm",
    "linear_fc1.layer_norm_": "post_attention_layernorm",
    "final_layernorm.": "norm",
}
