"""What the checkpoint tests share: weights of Hugging Face directories, and random Plans."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.huggingface import architecture_from_hf


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory, read by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def architecture_of(directory: Path) -> Architecture:
    return architecture_from_hf(json.loads((directory / "config.json").read_text()))


def random_plan(source: Architecture, seed: int = 0, groups: int | None = None) -> Plan:
    """Cuts every axis: 3 of 4 layers, half of the heads of each group, 3/4 of hidden channels, 2/3 of the neurons.

    With `groups` so many query groups of each layer are kept, None: all. Of a mixture, one expert of each layer goes.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(total: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))

    layers = choose(source.num_layers, source.num_layers * 3 // 4)
    hidden, ffn = source.hidden_size * 3 // 4, source.ffn_hidden_size * 2 // 3
    per_group = source.heads_per_group
    kept_groups = [
        choose(source.num_query_groups, groups) if groups is not None else range(source.num_query_groups)
        for _ in layers
    ]
    heads = tuple(
        tuple(group * per_group + head for group in of_layer for head in choose(per_group, per_group // 2))
        for of_layer in kept_groups
    )
    sizes = {Axis.LAYERS: len(layers), Axis.HIDDEN: hidden, Axis.HEADS: len(heads[0])}
    if groups is not None:
        sizes[Axis.GROUPS] = groups
    kept_hidden = choose(source.hidden_size, hidden)
    neurons: dict[str, Any]
    if source.num_moe_experts is None:
        sizes[Axis.FFN] = ffn
        neurons = {"kept_ffn": tuple(choose(source.ffn_hidden_size, ffn) for _ in layers)}
    else:
        experts = source.num_moe_experts - 1
        sizes |= {Axis.EXPERTS: experts, Axis.MOE_FFN: ffn}
        shared = source.moe_shared_expert_intermediate_size
        neurons = {
            "kept_experts": tuple(choose(source.num_moe_experts, experts) for _ in layers),
            "kept_moe_ffn": tuple(tuple(choose(source.ffn_hidden_size, ffn) for _ in range(experts)) for _ in layers),
        }
        if shared is not None:
            sizes[Axis.SHARED_FFN] = shared // 2
            neurons["kept_shared_ffn"] = tuple(choose(shared, shared // 2) for _ in layers)
    return Plan(
        source=source,
        target=source.resized(sizes),
        kept_layers=layers,
        kept_hidden=kept_hidden,
        kept_heads=heads,
        kept_groups=None if groups is None else tuple(tuple(of_layer) for of_layer in kept_groups),
        **neurons,
    )


_PEAK = """
import resource, sys
from pathlib import Path
import torch
from minitron_nemo.arch import Plan
from minitron_nemo.checkpoint.transform import convert
torch.ones(8).bfloat16().float()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = Plan.load(Path(sys.argv[4])) if len(sys.argv) > 4 else None
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], plan=plan, progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak_memory(*arguments: object) -> float:
    """MiB above torch itself that converting SOURCE to DESTINATION in FORMAT takes, by the plan in a FILE if given."""
    command = [sys.executable, "-c", _PEAK, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
