"""`minitron repair`: a Plan + the teacher's activations -> the Plan with matrices that make up for what is cut.

Forward-only passes over the first calibration samples; in each, every pipeline stage fills `repair.statistics_bytes`
with the second moments of as many places as fit, then its ranks solve for their maps and write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.plan import ADD, FILE_NAME, REPLACE, Matrix
from minitron_nemo.checkpoint.dense import MatrixFile
from minitron_nemo.checkpoint.files import commit_partial, make_partial, partial_path
from minitron_nemo.config import Recipe, RepairConfig
from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.importance.second_moments import Moments, Place, fit, gain_of, owners, places
from minitron_nemo.models.build import Model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import open_calibration, progress, without_logits
from minitron_nemo.pruning.plan import repairs_of

TOKENS_PER_COLUMN = 16  # fewer get a warning; 2 made things worse on tokens that the fit had not seen


def fits(source: Architecture, target: Architecture, config: RepairConfig) -> bool:
    """Whether this cut asks for least-squares repairs, which take passes over the teacher.

    Raises UserError for repairs that the family has not.
    """
    return bool(_fitted(source, target, config))


def _fitted(source: Architecture, target: Architecture, config: RepairConfig) -> list[Axis]:
    """The axes that are cut and fitted."""
    repairs = repairs_of(source, config)
    asked = {Axis.HIDDEN: repairs.hidden, Axis.FFN: repairs.ffn}
    return [axis for axis, on in asked.items() if on and target.size(axis) < source.size(axis)]


def repair_warnings(
    source: Architecture, target: Architecture, config: RepairConfig, sequence_length: int
) -> list[str]:
    """What a fit on so few tokens would be: fitted to them, and worse than the plain cut on others."""
    columns = max((target.size(axis) for axis in _fitted(source, target, config)), default=0)
    tokens = config.samples * sequence_length
    if tokens >= TOKENS_PER_COLUMN * columns:
        return []
    return [
        f"prune.repair.samples: {tokens:,} tokens are few to fit {columns:,} columns to; "
        f"use {-(-TOKENS_PER_COLUMN * columns // sequence_length)} samples"
    ]


def repair(teacher: Path, prepared: Path, recipe: Recipe, layout: Layout, plan: Plan, directory: Path) -> None:
    """Write `plan` with its repairs, and their matrices, to `directory`. Collective over the job.

    Raises UserError for what does not fit together.
    """
    model, batches, _ = open_calibration(teacher, prepared, recipe, layout, recipe.prune.repair.samples)
    repair_plan(model, batches, plan, recipe.prune.repair, directory)


def repair_plan(model: Model, batches: Sequence[Microbatch], plan: Plan, config: RepairConfig, directory: Path) -> None:
    """`repair` with a loaded teacher, on this data-parallel rank's microbatches, all of one shape [b, s]."""
    config = repairs_of(plan.source, config)
    wanted = places(plan, ffn=bool(config.ffn), hidden=bool(config.hidden))
    if launch.rank() == 0:
        make_partial(directory)
    launch.barrier()
    entries = _write_matrices(model, batches, plan, wanted, config, partial_path(directory)) if wanted else {}
    folded = tuple(place.norm for place in wanted if place.norm is not None)
    repaired = replace(
        plan,
        matrices={place.name: entries[place.name] for place in wanted},
        folded_norms=folded,
        norm_scales={name: factor for name, factor in plan.norm_scales.items() if name not in folded},
        provenance={**plan.provenance, "ridge": config.ridge, "repair_samples": config.samples},
    )
    if launch.rank() == 0:
        repaired.save(partial_path(directory) / FILE_NAME)
        commit_partial(directory)
    launch.barrier()


def _write_matrices(
    model: Model,
    batches: Sequence[Microbatch],
    plan: Plan,
    wanted: Sequence[Place],
    config: RepairConfig,
    directory: Path,
) -> dict[str, Matrix]:
    """Fit and write the maps of all places; every rank gets all entries."""
    file = MatrixFile(directory, {place.name: _shape(place, plan) for place in wanted})
    if launch.rank() == 0:
        file.prepare()
    launch.barrier()
    passes = list(_passes(model, wanted, config.statistics_bytes))
    count = max(_gathered(len(passes)))
    micro_batch_size, sequence_length = batches[0]["tokens"].shape
    entries: dict[str, Matrix] = {}
    for number in range(count):
        with progress(f"repair, pass {number + 1} of {count}", len(batches)) as advance, without_logits(model):
            moments = Moments(
                model.chunks,
                plan.source,
                batches,
                passes[number] if number < len(passes) else [],
                sequence_parallel=model.layout.sequence_parallel,
                on_microbatch=advance,
            )
            with moments:
                forward_only(
                    model, batches, len(batches), sequence_length, micro_batch_size, lambda output, batch: None
                )
        for place, totals in moments.totals():
            entries[place.name] = _write(file, place, fit(place, totals, config.ridge), model)
    return {name: entry for part in _gathered(entries) for name, entry in part.items()}


def _write(file: MatrixFile, place: Place, fitted: Tensor, model: Model) -> Matrix:
    """A fitted map [n, k] in the form in which the Plan keeps it."""
    if place.norm is None:
        removed = np.setdiff1d(np.arange(len(fitted)), place.kept)  # the kept neurons' rows are the identity
        return file.write(place.name, ADD, fitted[torch.from_numpy(removed).to(fitted.device)].float().cpu())
    gain = gain_of(place, model.chunks, model.architecture).double()
    return file.write(place.name, REPLACE, (gain[:, None] * fitted).float().cpu())


def _shape(place: Place, plan: Plan) -> tuple[int, int]:
    kept = len(place.kept)
    return (plan.source.hidden_size, kept) if place.norm is not None else (plan.source.ffn_hidden_size - kept, kept)


def _passes(model: Model, wanted: Sequence[Place], budget: int) -> Iterator[list[Place]]:
    """This pipeline stage's places in order, in runs whose sums fit into `budget` bytes on a rank, one at least."""
    source, tp_size = model.architecture, model.layout.tensor_model_parallel_size
    here = {layer for chunk in model.chunks for layer in owners(chunk, source)}
    run: list[Place] = []
    filled = 0
    for place in (place for place in wanted if place.layer in here):
        size = place.rows(source, tp_size) * len(place.kept) * torch.float64.itemsize
        if run and filled + size > budget:
            yield run
            run, filled = [], 0
        run.append(place)
        filled += size
    if run:
        yield run


def _gathered(value: Any) -> list[Any]:
    """`value` of every rank of the job."""
    found: list[Any] = [None] * launch.world_size()
    distributed.all_gather_object(found, value)
    return found
