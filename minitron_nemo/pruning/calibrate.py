"""`minitron calibrate`: the teacher, the first samples of the training data, one forward-only pass -> Scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import distributed

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.config import Recipe
from minitron_nemo.data.dataset import Blend, open_train
from minitron_nemo.data.sampler import Microbatch, Sampler, microbatches
from minitron_nemo.errors import UserError
from minitron_nemo.importance.collect import Collector
from minitron_nemo.importance.scores import Scores, data_fingerprint
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.progress import Progress
from minitron_nemo.pruning.calibration_state import CalibrationState

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def calibrate(teacher: Path, prepared: Path, recipe: Recipe, layout: Layout, directory: Path) -> Scores:
    """Score every axis of the model in `teacher` on `prune.calibration.samples` sequences of the training data.

    The samples are the ones from `prune.calibration.first_sample` on in the order that `data.seed` gives, whatever the
    layout. An interrupted pass leaves its state in `directory`, and one on the same layout goes on from there; the
    caller removes it when the Scores are kept. Collective over the job; every rank gets the same Scores. Raises
    UserError for what does not fit together.
    """
    config = recipe.prune.calibration
    model, batches, blend = open_calibration(
        teacher, prepared, recipe, layout, config.samples, first_sample=config.first_sample
    )
    model_fingerprint = launch.from_rank_0(lambda: fingerprint(teacher))
    order = _visits(batches)
    sample_ids = tuple(sorted(sample_id for visits in order for sample_id, counts in visits if counts))
    content = data_fingerprint(sample_ids)
    settings = {
        "samples": config.samples,
        "precision": config.precision,
        "sequence_length": blend.sequence_length,
        "separators_counted": recipe.data.separator_weight != 0,  # a token of weight 0 does not
    }
    identity = {
        "model": model_fingerprint,
        "architecture": model.architecture.to_dict(),
        "order": order,  # which the seed, first_sample, the blend's weights and the packing decide
        "settings": settings,
        "micro_batch_size": config.micro_batch_size,
        "layout": asdict(layout),
    }
    scores = measure(
        model,
        batches,
        model_fingerprint=model_fingerprint,
        data_fingerprint=content,
        settings=settings,
        state=CalibrationState(directory, config.save_interval, identity),
    )
    return replace(scores, sample_ids=sample_ids)


def _visits(batches: Sequence[Microbatch]) -> list[list[tuple[str, bool]]]:
    """By data-parallel rank, its samples' ids in order, each with whether any token's weight is not 0. Collective."""
    mine = [
        (sample_id, bool((weights != 0).any()))
        for batch in batches
        for sample_id, weights in zip(batch["sample_ids"], batch["token_weights"], strict=True)
    ]
    everyones: list[Any] = [None] * launch.world_size()
    distributed.all_gather_object(everyones, (parallel_state.get_data_parallel_rank(), mine))
    return [visits for _, visits in sorted(dict(everyones).items())]  # ranks of one model have the same


def open_calibration(
    teacher: Path, prepared: Path, recipe: Recipe, layout: Layout, samples: int, first_sample: int = 0
) -> tuple[Model, list[Microbatch], Blend]:
    """The loaded teacher, and this data-parallel rank's microbatches of `samples` sequences. Collective.

    Ranks have equally many full microbatches; copies of the last sample fill them up, with weights of 0.
    """
    config = recipe.prune.calibration
    model = open_teacher(teacher, recipe, layout)
    blend = open_train(recipe.data, prepared)
    indices = Sampler(blend, recipe.data.seed).global_batch(first_sample, samples)
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    together = config.micro_batch_size * dp_size
    filled = [*indices, *indices[-1:] * (-len(indices) % together)]
    batches = microbatches(blend, filled, dp_rank, dp_size, config.micro_batch_size)
    for number, batch in enumerate(batches):
        first = number * together + dp_rank * config.micro_batch_size
        batch["token_weights"][max(0, samples - first) :] = 0.0
    return model, batches, blend


def open_teacher(teacher: Path, recipe: Recipe, layout: Layout) -> Model:
    """The loaded teacher in `prune.calibration.precision`. Collective. Raises UserError for context parallelism."""
    if layout.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size: {layout.context_parallel_size} is not supported by calibration; "
            f"calibrate with 1, the Scores serve every layout"
        )
    launch.initialize(layout, recipe.data.seed)
    model = build_model(Architecture.load(teacher), layout, dtype=DTYPES[recipe.prune.calibration.precision])
    load_model(model, teacher)
    return model


def measure(
    model: Model,
    batches: Sequence[Microbatch],
    *,
    model_fingerprint: str,
    data_fingerprint: str,
    settings: Mapping[str, Any],
    state: CalibrationState | None = None,
) -> Scores:
    """Score every axis of a loaded model on this data-parallel rank's microbatches, all of one shape [b, s].

    Sequences without any token of weight other than 0 are not counted. With `state` the pass is one run of the schedule
    after another, goes on from what is saved, and saves between them. Collective; every rank gets the same Scores.
    """
    micro_batch_size, sequence_length = batches[0]["tokens"].shape
    with Progress("calibrate", len(batches), "microbatches", shown=launch.rank() == 0) as bar, without_logits(model):
        collector = Collector(
            model.chunks,
            model.architecture,
            batches,
            sequence_parallel=model.layout.sequence_parallel,
            on_microbatch=bar.advance,
        )
        with collector:
            done = 0 if state is None else state.resume(collector)
            bar.skip(done)
            while done < len(batches):
                stop = len(batches) if state is None else min(done + state.interval, len(batches))
                collector.next_run(done, stop)
                run = batches[done:stop]
                forward_only(model, run, len(run), sequence_length, micro_batch_size, lambda output, batch: None)
                done = stop
                if state is not None and done < len(batches):
                    state.save(collector, done)
    return collector.scores(model_fingerprint=model_fingerprint, data_fingerprint=data_fingerprint, settings=settings)


@contextmanager
def without_logits(model: Model) -> Iterator[None]:
    """Nothing here reads logits, and with a large vocabulary they are most of a forward pass's memory."""
    layer = model.output_layer
    if layer is None:
        yield
        return
    mode, layer.mode = layer.mode, "hidden"
    try:
        yield
    finally:
        layer.mode = mode
