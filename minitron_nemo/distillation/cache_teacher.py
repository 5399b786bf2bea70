"""`minitron cache-teacher`: run the teacher over the samples that the training will visit, and keep the likeliest.

    blocks that are not whole -> this replica's share -> forward-only pipeline -> top-k and draws -> TeacherCache

A token's draws depend on `teacher.cache.seed`, its sample's id and its position, on nothing else: a cache has one
content, whatever layout, batch size or number of interruptions wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.config import Recipe
from minitron_nemo.data.dataset import Blend
from minitron_nemo.data.sampler import Microbatch, stack
from minitron_nemo.distillation.cache import Identity, TeacherCache
from minitron_nemo.distillation.cached import needed_caches
from minitron_nemo.distillation.optimizer import params_dtype
from minitron_nemo.kernels import SparseEntries, sparse_entries
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.progress import track

SCHEMA_VERSION = 1


def cache_teacher(recipe: Recipe, *, teacher_dir: Path, prepared: Path, summary: Path) -> None:
    """Run the teacher over the samples that the training will visit and the cache lacks. Called on every rank.

    An interrupted call is made again: whole blocks stay. `summary` gets, on rank 0, what the training may rely on.
    Raises UserError for a cache of another teacher, temperature or kind.
    """
    layout = Layout.from_config(recipe.parallel)
    architecture = Architecture.load(teacher_dir)
    layout.check(architecture, launch.world_size())
    launch.initialize(layout, recipe.train.seed)
    needed = needed_caches(recipe, teacher_dir, prepared)
    unfinished = launch.from_rank_0(
        lambda: [TeacherCache.create(each.directory, each.identity).plan(each.visits) for each in needed]
    )
    if any(unfinished):
        model = build_model(architecture, layout, dtype=params_dtype(recipe.train))
        load_model(model, teacher_dir)
        if model.output_layer is not None:
            model.output_layer.mode = "hidden"
        for each, blocks in zip(needed, unfinished, strict=True):
            write_blocks(
                model, each.open(), blocks, each.blend, each.micro_batch_size, chunk_bytes=recipe.distill.chunk_bytes
            )
    launch.barrier()
    if launch.rank() == 0:
        caches = [asdict(each.identity) | {"samples": each.visits.fingerprint} for each in needed]
        write_atomic(summary, json.dumps({"schema_version": SCHEMA_VERSION, "caches": caches}, indent=2) + "\n")


def write_blocks(
    model: Model,
    cache: TeacherCache,
    blocks: Sequence[int],
    blend: Blend,
    micro_batch_size: int,
    *,
    chunk_bytes: int | None,
) -> None:
    """Compute these blocks of the cache, each in one data-parallel replica of the teacher, which gives hidden states.

    Collective within a replica; every rank passes the same blocks. `blend` has the samples' sources. Raises
    FloatingPointError, naming the samples, for logits that are not finite.
    """
    own = list(blocks)[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    numbers = {source.fingerprint: number for number, source in enumerate(blend.sources)}
    collect = partial(_entries, model, cache.identity, chunk_bytes)
    tokens = cache.identity.sequence_length
    for block in track(own, "cache-teacher", "blocks", shown=launch.rank() == 0):
        samples = [
            blend.sample((numbers[cache.sources[source]], sample)) for source, sample in cache.planned(block).tolist()
        ]
        filled = samples + samples[-1:] * (-len(samples) % micro_batch_size)
        batches = [stack(filled[at : at + micro_batch_size]) for at in range(0, len(filled), micro_batch_size)]
        results = forward_only(model, iter(batches), len(batches), tokens, micro_batch_size, collect)
        if results and parallel_state.get_tensor_model_parallel_rank() == 0:
            cache.write(block, [sample["id"] for sample in samples], _joined(results, len(samples), tokens))


def _entries(
    model: Model, identity: Identity, chunk_bytes: int | None, output: Tensor, microbatch: Microbatch
) -> SparseEntries:
    """Entries of [b*s] tokens, on the CPU, from states after the final norm, [b, s, h] or [b, s/tp, h]."""
    samples, tokens = microbatch["tokens"].shape
    layout, weight = model.layout, model.output_weight
    assert weight is not None
    uniforms = np.stack(
        [draws(identity.seed, name, tokens, identity.tail_samples) for name in microbatch["sample_ids"]], 1
    )  # [s, b, m]
    found = sparse_entries(
        output.transpose(0, 1).flatten(0, 1),
        weight,
        top_k=identity.top_k,
        uniforms=torch.from_numpy(uniforms).flatten(0, 1).to(output.device),
        vocab_size=identity.vocab_size,
        temperature=identity.temperature,
        tp_group=parallel_state.get_tensor_model_parallel_group() if layout.tensor_model_parallel_size > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        chunk_bytes=chunk_bytes,
    )
    if found.tail_log_probs.isnan().any() or found.log_probs.isnan().any():
        raise FloatingPointError(
            f"the teacher's logits are not finite in one of the samples {', '.join(microbatch['sample_ids'])}"
        )

    def turned(values: Tensor) -> Tensor:
        return values.unflatten(0, (tokens, samples)).transpose(0, 1).flatten(0, 1).cpu()

    return SparseEntries(turned(found.token_ids), turned(found.log_probs), turned(found.tail_log_probs), identity.top_k)


def draws(seed: int, sample_id: str, tokens: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), fp64 [tokens, count]: a function of the arguments alone.

    The raw stream of Philox, which NumPy keeps the same between versions.
    """
    key = hashlib.sha256(f"{seed} {sample_id}".encode()).digest()[:16]
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(tokens * count)
    uniform: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53  # 53 bits: exact
    return uniform.reshape(tokens, count)


def _joined(parts: Sequence[SparseEntries], samples: int, tokens: int) -> SparseEntries:
    """Those of a block's samples, without what filled the last microbatch."""

    def join(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[: samples * tokens]

    return SparseEntries(join("token_ids"), join("log_probs"), join("tail_log_probs"), parts[0].top_k)
