"""What the tests of models share: Hugging Face as reference, its weights in Megatron's order, one training step.

The mapping of weights is written out here, apart from the package's table, so that both are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.families import EAGER, unfused, write_tiny
from tests.tiny import LLAMA3_ROPE, write_tiny_llama

SEQUENCE = 32
MICROBATCHES = 4  # of one sequence

LAYOUTS = {
    "tp1": (1, Layout()),
    "tp2": (2, Layout(tensor_model_parallel_size=2)),
    "pp2": (2, Layout(pipeline_model_parallel_size=2)),
    "tp2-pp2": (4, Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "tp2-sp": (2, Layout(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp3-uneven": (3, Layout(pipeline_model_parallel_size=3)),
    "pp2-vpp2": (2, Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
}

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied": {},
    "llama3-rope": {"rope_scaling": LLAMA3_ROPE | {"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 8.0}},
    "wide-heads": {"kv_channels": 16, "num_query_groups": 2},  # kv_channels x heads is 128, hidden_size 64
}


class TinyModel:
    """A random model as a Hugging Face directory, and converted."""

    def __init__(self, directory: Path, family: str = "llama", **shape: Any) -> None:
        write = write_tiny_llama if family == "llama" else partial(write_tiny, family)
        self.huggingface = write(directory / "hf", **shape)
        self.megatron = directory / "megatron"
        convert(self.huggingface, self.megatron, "megatron", progress=False)
        self.architecture = architecture(**shape) if family == "llama" else Architecture.load(self.megatron)


def architecture(
    *,
    tied: bool = False,
    rope_scaling: Any = None,
    kv_channels: int = 8,
    num_query_groups: int = 4,
    num_layers: int = 4,
) -> Architecture:
    """The architecture that `write_tiny_llama` writes."""
    return Architecture(
        num_layers=num_layers,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=num_query_groups,
        kv_channels=kv_channels,
        vocab_size=259,
        max_position_embeddings=512,
        rope_scaling=rope_scaling,
        share_embeddings_and_output_weights=tied,
    )


def tokens() -> Tensor:
    """[MICROBATCHES, SEQUENCE + 1]: inputs and, one on, labels."""
    return torch.randint(259, (MICROBATCHES, SEQUENCE + 1), generator=torch.Generator().manual_seed(7))


def huggingface_model(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **EAGER)


def megatron_order(named: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Tensors by Hugging Face name -> by name in an unsharded LanguageModel of the local spec."""
    named = unfused(named, architecture.num_attention_heads, architecture.num_query_groups)
    result = {
        name: named[theirs]
        for theirs, name in {
            "model.embed_tokens.weight": "embedding.word_embeddings.weight",
            "model.norm.weight": "decoder.final_layernorm.weight",
            "model.norm.bias": "decoder.final_layernorm.bias",
            "lm_head.weight": "output_layer.weight",
        }.items()
        if theirs in named
    }
    if architecture.share_embeddings_and_output_weights:
        result.pop("output_layer.weight", None)
    for layer in range(architecture.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" in named:
                blocks = [
                    named[f"{theirs}self_attn.{letter}_proj.{kind}"].unflatten(0, (architecture.num_query_groups, -1))
                    for letter in "qkv"
                ]
                result[f"{ours}self_attention.linear_qkv.{kind}"] = torch.cat(blocks, 1).flatten(0, 1)
            for name, module in ONE_TO_ONE.items():
                if f"{theirs}{module}.{kind}" in named:
                    result[f"{ours}{name}.{kind}"] = named[f"{theirs}{module}.{kind}"]
        if theirs + "mlp.gate_proj.weight" in named:
            halves = [named[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
            result[ours + "mlp.linear_fc1.weight"] = torch.cat(halves)
    return result


ONE_TO_ONE = {
    "input_layernorm": "input_layernorm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.up_proj",  # where there is no gate
    "mlp.linear_fc2": "mlp.down_proj",
}


def weights(directory: Path, architecture: Architecture) -> dict[str, Tensor]:
    """Run on one rank: the tensors of a torch_dist directory, by name in an unsharded model."""
    from minitron_nemo.models.build import build_model
    from minitron_nemo.models.checkpoint import load_model

    launch.initialize(Layout(), seed=1)
    model = build_model(architecture, Layout(), dtype=torch.float32)
    load_model(model, directory)
    return {name: parameter.detach().clone() for name, parameter in model.modules[0].named_parameters()}


def microbatches(data_parallel_rank: int = 0, data_parallel_size: int = 1) -> list[dict[str, Tensor]]:
    """This rank's share of the global batch."""
    return [
        {"tokens": row[None, :-1], "labels": row[None, 1:], "position_ids": torch.arange(SEQUENCE)[None]}
        for row in tokens()[data_parallel_rank::data_parallel_size]
    ]


def cross_entropy(vocab_size: int, output: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy [] of vocabulary-parallel logits [1, s, padded_vocab/tp]."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    first = parallel_state.get_tensor_model_parallel_rank() * output.shape[-1]
    padding = first + torch.arange(output.shape[-1]) >= vocab_size
    return vocab_parallel_cross_entropy(output.float().masked_fill(padding, -1e30), labels).sum()


def train_step(model: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Forward and backward of the global batch; the mean loss of this data-parallel rank, on the last stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(batches: Iterator[dict[str, Tensor]], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        output = chunk(batch["tokens"], batch["position_ids"], None)

        def report(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total = loss(output, batch["labels"])
            return total, torch.tensor(batch["labels"].numel(), dtype=torch.int), total.detach().clone()

        return output, report

    share = microbatches(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    iterators = [iter(share) for _ in model.chunks]
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    totals = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks if len(iterators) > 1 else model.chunks[0],
        num_microbatches=len(share),
        seq_length=SEQUENCE,
        micro_batch_size=1,
        forward_only=False,
    )
    return float(sum(totals)) / (len(share) * SEQUENCE) if totals else 0.0


def trainable(
    tiny: TinyModel,
    layout: Layout,
    *,
    recompute: bool = False,
    dtype: torch.dtype = torch.float32,
    **ddp: Any,
) -> Any:
    """The model on this rank, loaded and in DDP, whose options `ddp` are."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from minitron_nemo.models.build import build_model
    from minitron_nemo.models.checkpoint import load_model

    launch.initialize(layout, seed=1)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **ddp)
    model = build_model(tiny.architecture, layout, dtype=dtype, ddp=config, recompute=recompute)
    load_model(model, tiny.megatron)
    return model


def save_gradients(tiny: TinyModel, layout: Layout, recompute: bool, directory: Path) -> float:
    """One backward pass; the gradients are written as if they were the weights, which takes the layout out of them."""
    from minitron_nemo.models.checkpoint import save_model

    model = trainable(tiny, layout, recompute=recompute)
    loss = train_step(model, partial(cross_entropy, tiny.architecture.vocab_size))
    with torch.no_grad():
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    save_model(model, directory, tiny.huggingface)
    return loss


def optimizer(model: Any, **options: Any) -> Any:
    """Megatron's DistributedOptimizer with a large learning rate, so that steps differ."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True, **options
    )
    return get_megatron_optimizer(config, model.chunks)


def summed_nll(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
