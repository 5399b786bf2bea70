"""`minitron score-depth`: what the teacher loses without some of its layers -> DepthScores.

Forward-only passes in which many models run at once (`models/branches.py`), over the first calibration samples, or over
the choices of a task. The file is written again and again on the way: who starts anew goes on where it ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, distributed

import minitron_nemo
from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.config import Recipe
from minitron_nemo.data.choices import Choices, choice_samples, read_questions
from minitron_nemo.data.dataset import Sample, open_train
from minitron_nemo.data.sampler import Microbatch, Sampler, stack
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.kernels import linear_kd_loss
from minitron_nemo.models.branches import Branch, Branches, run_branches
from minitron_nemo.models.build import Model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.progress import Progress
from minitron_nemo.pruning.calibrate import open_teacher, without_logits
from minitron_nemo.pruning.depth import grouped, layers_to_drop, most_branches, summary, wanted
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.pruning.target import target_architecture

SAVED_MICROBATCHES = 16  # of each rank, measured between two writes of the file


def score_depth(
    teacher: Path, prepared: Path, recipe: Recipe, layout: Layout, path: Path, lent: Sequence[Path] = ()
) -> DepthScores:
    """Measure what `prune.depth_method` has to know for the target's depth, and write it to `path`.

    What `path`, or one of the files `lent` by other runs, holds of the same model, sequences, precision and version of
    this package is not measured again; of those that are lent, what is needed is copied. Collective over the job; every
    rank gets the same. Raises UserError for what does not fit together.
    """
    config = recipe.prune
    source = Architecture.load(teacher)
    drop = layers_to_drop(source, target_architecture(source, config), config)
    samples, choices, data = _read(teacher, prepared, recipe)
    identity = {
        "model_fingerprint": launch.from_rank_0(lambda: fingerprint(teacher)),
        "data_fingerprint": data,
        "metric": config.depth.metric,
        "precision": config.calibration.precision,
        "version": minitron_nemo.__version__,
    }
    weights = np.array([sample["token_weights"].sum(dtype=torch.float64).item() for sample in samples])
    if not weights.any():
        raise UserError("score-depth: no token has a weight other than 0; give longer text")
    scores = DepthScores(source, identity, weights, choices)
    scores.sums = launch.from_rank_0(partial(_measured_before, path, scores))
    borrowed = launch.from_rank_0(lambda: _all_measured(lent, scores))
    model, save = None, partial(_save, scores, path)
    while branches := wanted(scores, config.depth_method, drop, config.depth.normalize):
        if known := {branch: borrowed.pop(branch) for branch in branches if branch in borrowed}:
            scores.sums |= known
            continue
        model = model or open_teacher(teacher, recipe, layout)
        measure_branches(model, samples, branches, scores, recipe, save)
    launch.from_rank_0(save)
    if launch.rank() == 0:
        print(f"[score-depth] {summary(scores, config.depth_method, drop, config.depth.normalize)}", flush=True)
    return scores


def measure_branches(
    model: Model,
    samples: Sequence[Sample],
    branches: Sequence[Branch],
    scores: DepthScores,
    recipe: Recipe,
    save: Callable[[], None],
) -> None:
    """Measure `branches` of a loaded model on what they miss of `samples`, of any lengths, and add it to `scores`.

    `save` is called on rank 0 whenever there is something to keep. Collective; all ranks pass the same.
    """
    order = sorted(range(len(samples)), key=lambda sample: -len(samples[sample]["tokens"]))  # alike ones together
    b, longest = recipe.prune.calibration.micro_batch_size, len(samples[order[0]]["tokens"])
    num_layers = model.architecture.num_layers
    most = most_branches(model.architecture, model.layout, recipe.prune, b, longest)
    together = b * parallel_state.get_data_parallel_world_size()
    part = SAVED_MICROBATCHES * together
    work = []
    # What was interrupted misses another part of the samples than the rest.
    for start in sorted({_first_missing(scores, branch, order) for branch in branches}):
        alike = [branch for branch in branches if _first_missing(scores, branch, order) == start]
        for group in grouped(alike, most, num_layers):
            work += [(group, order[at : at + part]) for at in range(start, len(order), part)]
    passes = sum(-(-len(sequences) // together) for _, sequences in work)
    label = f"score-depth, {len(branches)} models"
    with Progress(label, passes, "microbatches", shown=launch.rank() == 0) as bar, without_logits(model):
        for group, sequences in work:
            microbatches = _dealt_out([samples[sequence] for sequence in sequences], b, model.layout)
            found = _sums(model, Branches(group, num_layers), microbatches, len(sequences), bar.advance)
            for branch, sums in zip(group, found, strict=True):
                scores.add(branch, sequences, sums)
            if launch.rank() == 0:
                save()


def _read(teacher: Path, prepared: Path, recipe: Recipe) -> tuple[list[Sample], Choices | None, str]:
    """The sequences to measure on, what scores a task, and what stands for their content."""
    config, data = recipe.prune.depth, recipe.data
    if config.metric == "task":
        assert config.task is not None, "check_depth has been called"
        tokenizer = load_tokenizer(teacher / "tokenizer")
        questions = read_questions(Path(config.task))
        samples = choice_samples(questions, tokenizer, Architecture.load(teacher).max_position_embeddings)
        tokens = [(sample["tokens"].tolist(), sample["labels"].tolist()[-1]) for sample in samples]
        scored = [int(sample["token_weights"].sum()) for sample in samples]
        return samples, Choices.of(questions), _digest(questions, tokens, scored)
    blend = open_train(data, prepared)
    samples = [blend.sample(index) for index in Sampler(blend, data.seed).global_batch(0, config.samples)]
    return samples, None, _digest(blend.fingerprint, data.seed, config.samples, data.separator_weight)


def _digest(*content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _measured_before(path: Path, scores: DepthScores) -> dict[Branch, Any]:
    if not path.exists():
        return {}
    before = DepthScores.load(path)
    same = before.architecture == scores.architecture and before.identity == scores.identity
    return before.sums if same else {}


def _all_measured(paths: Sequence[Path], scores: DepthScores) -> dict[Branch, Any]:
    """What the files have measured to the end."""
    found = [sums for path in paths for sums in _measured_before(path, scores).items()]
    return {branch: sums for branch, sums in found if not np.isnan(sums).any()}


def _save(scores: DepthScores, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scores.save(path)


def _first_missing(scores: DepthScores, branch: Branch, order: Sequence[int]) -> int:
    """Place in `order` from which on nothing is measured."""
    missing = scores.missing(branch)[order]
    return int(missing.argmax()) if missing.any() else len(order)


def _dealt_out(samples: Sequence[Sample], micro_batch_size: int, layout: Layout) -> list[Microbatch]:
    """This data-parallel rank's full microbatches, padded to one length; copies of weight 0 of the last fill them up.

    Microbatch m of rank r holds what follows (m * dp_size + r) * micro_batch_size.
    """
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    multiple = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    length = -(-max(len(sample["tokens"]) for sample in samples) // multiple) * multiple
    padded = [_padded(sample, length) for sample in samples]
    filler = padded[-1] | {"token_weights": torch.zeros(length)}
    padded += [filler] * (-len(samples) % (size * micro_batch_size))
    starts = range(rank * micro_batch_size, len(padded), size * micro_batch_size)
    return [stack(padded[start : start + micro_batch_size]) for start in starts]


def _padded(sample: Sample, length: int) -> Sample:
    """Padding stands behind all that counts, where no token that counts sees it."""
    missing = length - len(sample["tokens"])
    columns = ("tokens", "labels", "token_weights")
    return sample | {name: torch.nn.functional.pad(sample[name], (0, missing)) for name in columns}


def _sums(
    model: Model, branches: Branches, microbatches: Sequence[Microbatch], samples: int, advance: Callable[[], None]
) -> np.ndarray:
    """Sums of weight * cross-entropy, fp64 [branches, samples], on every rank. Collective."""
    (b, length), count = microbatches[0]["tokens"].shape, len(microbatches)

    def entering() -> Iterator[Microbatch]:
        for microbatch in microbatches:
            advance()
            yield microbatch

    parts = run_branches(model, branches, entering(), count, (b, length), partial(_cross_entropies, model, branches))
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    total = torch.zeros(len(branches.rows), count, size, b, dtype=torch.float64, device=current_device())
    if parts and parallel_state.get_tensor_model_parallel_rank() == 0:
        total[:, :, rank] = torch.stack(parts, dim=1)
    distributed.all_reduce(total)  # every sequence was counted by one rank
    return np.asarray(total.flatten(1)[:, :samples].cpu().numpy())


def _cross_entropies(model: Model, branches: Branches, states: Tensor, microbatch: Microbatch) -> Tensor:
    """Of the sequences of a microbatch in each branch, fp64 [branches, b]; `states` [rows, b, s(/tp), h]."""
    weight = model.output_weight
    assert weight is not None, "only the last stage has states"
    of_rows = torch.zeros(states.shape[:2], dtype=torch.float64, device=states.device)
    for row, of_row in enumerate(states):
        for place, sequence in enumerate(of_row):
            _, sums = linear_kd_loss(
                sequence,
                weight,
                None,
                None,
                microbatch["labels"][place],
                microbatch["token_weights"][place],
                vocab_size=model.architecture.vocab_size,
                logits_weight=0.0,
                ce_weight=1.0,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                sequence_parallel=model.layout.sequence_parallel,
            )
            of_rows[row, place] = torch.where(sums.nonfinite > 0, torch.nan, sums.ce)
    return of_rows[branches.rows]
