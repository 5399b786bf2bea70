"""`minitron repair`: a Plan + the teacher's activations -> the Plan with matrices that make up for what is cut.

Forward-only passes over the first calibration samples: one for the rotation of a rotated Plan, then those for least
squares. In each of these, every pipeline stage fills `repair.statistics_bytes` with the second moments of as many
places as fit, then its ranks solve for their maps and write them. A repair that was killed makes the passes that are
missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.blocks import EMBEDDING
from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.arch.family import family
from minitron_nemo.arch.matrix import ADD, BIAS, GAIN, REPLACE, Matrix
from minitron_nemo.arch.plan import FILE_NAME
from minitron_nemo.arch.tensors import bias_of
from minitron_nemo.checkpoint.dense import MatrixFile
from minitron_nemo.checkpoint.files import commit_partial
from minitron_nemo.config import PruneConfig, Recipe, RepairConfig
from minitron_nemo.data.sampler import Microbatch
from minitron_nemo.importance.places import Place, has_means, norm_read, owners, places
from minitron_nemo.importance.second_moments import Moments, NormCovariance, Watch, fit
from minitron_nemo.models.build import Model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.progress import Progress
from minitron_nemo.pruning.calibrate import open_calibration, without_logits
from minitron_nemo.pruning.norm_maps import student_norm
from minitron_nemo.pruning.repair_state import RepairState
from minitron_nemo.pruning.target import NEURONS, rotates

W = TypeVar("W", bound=Watch)

TOKENS_PER_COLUMN = 16  # fewer get a warning; 2 made things worse on tokens that the fit had not seen


def fits(source: Architecture, target: Architecture, config: RepairConfig) -> bool:
    """Whether this cut asks for least-squares repairs, which take passes over the teacher."""
    return bool(_fitted(source, target, config))


def _fitted(source: Architecture, target: Architecture, config: RepairConfig) -> list[Axis]:
    """The axes that are cut and fitted."""
    asked = {Axis.HIDDEN: config.hidden} | dict.fromkeys(NEURONS, config.ffn)
    return [axis for axis, on in asked.items() if on and target.size(axis) < source.size(axis)]


def repair_warnings(
    source: Architecture, target: Architecture, config: RepairConfig, sequence_length: int
) -> list[str]:
    """What a fit on so few tokens would be: fitted to them, and worse than the plain cut on others."""
    needed = {
        axis: -(-TOKENS_PER_COLUMN * target.size(axis) * of // (seen * sequence_length))
        for axis in _fitted(source, target, config)
        for seen, of in [_seen(source, axis)]
    }
    if config.samples >= max(needed.values(), default=0):
        return []
    axis = max(needed, key=needed.__getitem__)
    tokens, (seen, of) = config.samples * sequence_length, _seen(source, axis)
    come = f", {tokens * seen // of:,} an expert on average," if of > 1 else ""
    return [
        f"prune.repair.samples: {tokens:,} tokens{come} are few to fit {target.size(axis):,} columns to; "
        f"use {needed[axis]} samples"
    ]


def _seen(source: Architecture, axis: Axis) -> tuple[int, int]:
    """A token comes to so many of so many tensors of a layer whose columns are the same axis."""
    if axis != Axis.MOE_FFN:
        return 1, 1
    return source.moe_router_topk or 0, source.size(Axis.EXPERTS)


class Sums(NamedTuple):
    """The second moments of a place on one rank, [rows, columns]; of linear_fc2 its own rows alone.

    The columns are entries of `axis`. With the `means` of a LayerNorm's there is a row and a column more.
    """

    rows: int
    columns: int
    axis: Axis
    means: bool = False

    @property
    def nbytes(self) -> int:
        return (self.rows + self.means) * (self.columns + self.means) * torch.float64.itemsize


def stage_passes(
    source: Architecture, target: Architecture, config: RepairConfig, layout: Layout, rank: int
) -> list[list[Sums]]:
    """What the ranks of pipeline rank `rank` sum in each pass of a fit.

    At most: as if the layers that stay were all on the stage that has most of them.
    """
    axes = _fitted(source, target, config)
    norm = Sums(source.hidden_size + target.hidden_size, target.hidden_size, Axis.HIDDEN, means=has_means(source))
    layer = [norm, norm] * (Axis.HIDDEN in axes)
    for axis in (axis for axis in NEURONS if axis in axes):
        neurons = source.size(axis) // layout.tensor_model_parallel_size
        experts = target.size(Axis.EXPERTS) if axis == Axis.MOE_FFN else 1
        layer += [Sums(neurons, target.size(axis), axis)] * experts
    here = sum(layout.layers_per_stage(source.num_layers)[rank :: layout.pipeline_model_parallel_size])
    last = rank == layout.pipeline_model_parallel_size - 1
    untied = Axis.HIDDEN in axes and not target.share_embeddings_and_output_weights
    found = layer * min(target.num_layers, here) + [norm] * (last and untied)
    return [found[run] for run in _runs([each.nbytes for each in found], config.statistics_bytes)]


def planned(
    source: Architecture, target: Architecture, config: PruneConfig, layout: Layout, sequence_length: int
) -> tuple[int, int, int]:
    """Passes over `repair.samples` through the source's layers, and FLOPs of a token in all of them, and in the sums.

    Passes are in `calibration.precision`, sums in fp32, behind LayerNorms in fp64. At most, as `stage_passes`. The
    systems that are solved with the sums, once for a place, are left out.
    """
    stages = [
        stage_passes(source, target, config.repair, layout, rank) for rank in range(layout.pipeline_model_parallel_size)
    ]
    passes = max(map(len, stages))
    axes = _fitted(source, target, config.repair)
    hidden, columns, layers = source.hidden_size, target.hidden_size, target.num_layers
    means = has_means(source)
    # Elements of the sums of a place:
    norm = (hidden + columns + means) * (columns + means) if Axis.HIDDEN in axes else 0
    neurons = [axis for axis in axes if axis != Axis.HIDDEN]
    ffn = sum(source.size(axis) * target.size(axis) * _seen(source, axis)[0] for axis in neurons)
    multiplied = layers * (2 * norm + ffn) + norm * (not target.share_embeddings_and_output_weights)
    if rotates(target, source, config):
        passes, multiplied = passes + 1, multiplied + (2 * layers + 1) * hidden**2
    through = forward_flops_per_token(source, sequence_length) - 2 * source.vocab_size * hidden
    return passes, passes * through, 2 * multiplied


def repair(
    teacher: Path, prepared: Path, recipe: Recipe, layout: Layout, plan: Plan, directory: Path, key: str
) -> None:
    """Write `plan` with its repairs, and their matrices, to `directory`. Collective over the job.

    An interrupted repair of the same `key`, the step's, goes on. Raises UserError for what does not fit together.
    """
    model, batches, _ = open_calibration(teacher, prepared, recipe, layout, recipe.prune.repair.samples)
    repair_plan(model, batches, plan, recipe.prune.repair, directory, key)


def repair_plan(
    model: Model, batches: Sequence[Microbatch], plan: Plan, config: RepairConfig, directory: Path, key: str
) -> None:
    """`repair` with a loaded teacher, on this data-parallel rank's microbatches, all of one shape [b, s].

    `key` stands for the teacher, the samples and the settings.
    """
    wanted = partial(places, plan, ffn=config.ffn, hidden=config.hidden)
    size = (plan.source.hidden_size, plan.target.hidden_size)
    shapes: dict[str, tuple[int, int]] = {}
    for place in wanted(rotation=torch.empty(size) if plan.rotated else None):
        shapes |= _shapes(place, plan)
    if plan.rotated:
        shapes[EMBEDDING] = size
    identity = {
        "key": key,
        "plan": plan.to_json(),
        "microbatches": [len(batches), *batches[0]["tokens"].shape],
        "layout": asdict(model.layout),
    }
    state = RepairState(directory, shapes, identity)
    state.resume()
    rotation = _rotation(model, batches, plan, state) if plan.rotated else None
    _fit(model, batches, wanted(rotation=rotation), state, config)
    matrices = {name: matrix for part in _gathered(state.fitted) for name, matrix in part.items()}
    if launch.rank() == 0:
        repaired = replace(
            plan,
            matrices={name: matrices[name] for name in shapes},
            norm_scales={name: factor for name, factor in plan.norm_scales.items() if name not in matrices},
            provenance={**plan.provenance, **state.found, "ridge": config.ridge, "repair_samples": config.samples},
        )
        repaired.save(state.partial / FILE_NAME)
        state.end()
        commit_partial(directory)
    launch.barrier()


def _rotation(model: Model, batches: Sequence[Microbatch], plan: Plan, state: RepairState) -> Tensor:
    """The rotation [h, k], fp32, which becomes the embedding's matrix.

    `rotation_keeps` is the share that it keeps of the sum of squares behind the norms of the layers kept.
    """
    if EMBEDDING in state.fitted:
        return state.file.read(EMBEDDING).to(current_device())
    unknown = torch.empty(plan.source.hidden_size, 0)
    norms = places(plan, ffn=False, hidden=True, rotation=unknown)
    covariance = _watch(NormCovariance, model, batches, norms, "rotate")
    rotation, values = covariance.principal(plan.target.hidden_size)
    kept = float(values[: plan.target.hidden_size].sum() / values.sum())
    if launch.rank() == 0:
        written = {EMBEDDING: state.file.write(EMBEDDING, REPLACE, rotation.cpu())}
        state.record(EMBEDDING, written, {"rotation_keeps": kept})
    return rotation


def _fit(
    model: Model, batches: Sequence[Microbatch], wanted: Sequence[Place], state: RepairState, config: RepairConfig
) -> None:
    """Fit and write the maps of all places that are not there yet, each on one rank."""
    runs = _passes(model, wanted, config.statistics_bytes)
    before = set(state.fitted)
    # A pass that was left half done is made with all of its places: who adds up what, and so the bits, go by these.
    passes = [run for run in runs if any(place.name not in before for place in run)]
    count = max(_gathered(len(passes)))
    for number in range(count):
        now = passes[number] if number < len(passes) else []
        moments = _watch(Moments, model, batches, now, f"repair, pass {number + 1} of {count}")
        for place, totals in moments.totals():
            if place.name not in before:
                # No name for the map: it would stay until the next one is there.
                matrices = _write(state.file, place, fit(place, totals, moments.ridge(place, config.ridge)), model)
                state.record(place.name, matrices)


def _watch(kind: type[W], model: Model, batches: Sequence[Microbatch], watched: Sequence[Place], label: str) -> W:
    """What a forward-only pass showed at these places."""
    micro_batch_size, sequence_length = batches[0]["tokens"].shape
    with Progress(label, len(batches), "microbatches", shown=launch.rank() == 0) as bar, without_logits(model):
        watch = kind(
            model.chunks,
            model.architecture,
            batches,
            watched,
            sequence_parallel=model.layout.sequence_parallel,
            on_microbatch=bar.advance,
        )
        with watch:
            forward_only(model, batches, len(batches), sequence_length, micro_batch_size, lambda output, batch: None)
    return watch


def _write(file: MatrixFile, place: Place, fitted: Tensor, model: Model) -> dict[str, Matrix]:
    """What `fit` found, in the form in which the Plan keeps it."""
    if place.norm is None:
        removed = torch.ones(len(fitted), dtype=torch.bool)
        removed[place.cut] = False  # the kept neurons' rows are the identity
        return {place.name: file.write(place.name, ADD, fitted[removed.to(fitted.device)].float().cpu())}
    norm, traits = norm_read(place, model.chunks, model.architecture), family(model.architecture.family)
    found = student_norm(fitted, norm, zero_centered_gamma=traits.layernorm_zero_centered_gamma)
    written = {
        place.name: file.write(place.name, REPLACE, found.readers.float().cpu()),
        place.norm: file.write(place.norm, GAIN, found.gain.float().cpu()),
    }
    if found.bias is not None:
        bias = bias_of(place.norm)
        written[bias] = file.write(bias, BIAS, found.bias.float().cpu())
    return written


def _shapes(place: Place, plan: Plan) -> dict[str, tuple[int, int]]:
    """Of what `_write` writes, by name."""
    kept = place.columns
    if place.norm is None:
        return {place.name: (plan.source.size(place.axis) - kept, kept)}
    found = {place.name: (plan.source.hidden_size, kept), place.norm: (1, kept)}
    return found | ({bias_of(place.norm): (1, kept)} if has_means(plan.source) else {})


def _passes(model: Model, wanted: Sequence[Place], budget: int) -> list[list[Place]]:
    """This pipeline stage's places in order, in runs whose sums fit into `budget` bytes on a rank, one at least."""
    source, tp_size = model.architecture, model.layout.tensor_model_parallel_size
    here = {layer for chunk in model.chunks for layer in owners(chunk, source)}
    mine = [place for place in wanted if place.layer in here]
    return [mine[run] for run in _runs([_sums(place, source, tp_size).nbytes for place in mine], budget)]


def _sums(place: Place, source: Architecture, tp_size: int) -> Sums:
    means = place.norm is not None and has_means(source)
    return Sums(place.rows(source, tp_size), place.columns, place.axis, means)


def _runs(sums: Sequence[int], budget: int) -> list[slice]:
    """Sums of so many bytes, in order, in runs that fit into `budget` bytes, one at least."""
    runs, start, filled = [], 0, 0
    for place, size in enumerate(sums):
        if place > start and filled + size > budget:
            runs.append(slice(start, place))
            start, filled = place, 0
        filled += size
    return [*runs, slice(start, len(sums))] if sums else []


def _gathered(value: Any) -> list[Any]:
    """`value` of every rank of the job."""
    found: list[Any] = [None] * launch.world_size()
    distributed.all_gather_object(found, value)
    return found
