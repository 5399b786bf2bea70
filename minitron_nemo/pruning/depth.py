"""Which layers to drop for what their absence costs, and which models have to be measured to tell.

`leave_one_out` drops the layers that cost least one by one (2407.14679 section 2.2, with perplexity); `greedy` measures
again behind every layer that it drops; `best_block` tries every block of neighbours, as 2408.11796 does, which found
that for a downstream task a block is better than the layers of least loss. The measurements are `DepthScores`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.config import DepthConfig, PruneConfig
from minitron_nemo.data.choices import read_questions
from minitron_nemo.errors import UserError
from minitron_nemo.models.branches import Branch, Branches
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.depth_scores import Cost, DepthScores

METHODS = ("leave_one_out", "greedy", "best_block")
METRICS = ("loss", "task")
ITEM_BYTES = {"fp32": 4, "bf16": 2}


def layers_to_drop(source: Architecture, target: Architecture, config: PruneConfig) -> int:
    """How many layers measurements decide about; 0 where none are needed."""
    if config.drop_layers is not None or config.depth_method not in METHODS:
        return 0
    return source.num_layers - target.num_layers


def candidates(method: str, num_layers: int, drop: int, dropped: Branch) -> list[Branch]:
    """The models that are compared once `dropped` are gone."""
    if method == "best_block":
        return [Branch(range(start, start + drop)) for start in range(num_layers - drop + 1)]
    return [dropped | {layer} for layer in range(num_layers) if layer not in dropped]


def wanted(scores: DepthScores, method: str, drop: int, normalize: bool) -> list[Branch]:
    """The models to measure next, the whole one first of all; none, once `choose` has what it needs."""
    dropped = Branch()
    for turn in range(drop if method == "greedy" else 1):
        compared = candidates(method, scores.architecture.num_layers, drop, dropped)
        asked = compared if turn else [Branch(), *compared]
        missing = [branch for branch in asked if scores.missing(branch).any()]
        if missing:
            return missing
        dropped = _ranked(scores, compared, normalize)[0]
    return []


def choose(scores: DepthScores, method: str, drop: int, normalize: bool) -> tuple[Branch, float]:
    """The layers to drop, and the gap of the closest decision: (cost of the next best - cost) / the larger of both.

    Ties go to the higher layers. Raises UserError where measurements are missing.
    """
    if wanted(scores, method, drop, normalize):
        raise UserError(f"depth scores: not measured for {method} of {drop} layers; run `minitron score-depth` again")
    dropped, gap = Branch(), float("inf")
    for _ in range(drop if method == "greedy" else 1):
        ranked = _ranked(scores, candidates(method, scores.architecture.num_layers, drop, dropped), normalize)
        place = drop if method == "leave_one_out" else 1
        dropped = Branch().union(*ranked[:place])
        if len(ranked) > place:
            gap = min(gap, _gap(*(scores.cost(branch, normalize) for branch in ranked[place - 1 : place + 1])))
    return dropped, gap if gap != float("inf") else 0.0


def summary(scores: DepthScores, method: str, drop: int, normalize: bool) -> str:
    """What `choose` drops, in one line, with what that costs where it was measured."""
    dropped, gap = choose(scores, method, drop, normalize)
    text = f"{method} drops layers {', '.join(map(str, sorted(dropped)))} (gap {gap:.2g})"
    if dropped not in scores.sums:
        return text
    if scores.choices is None:
        increase, error = scores.increase(dropped)
        return f"{text}: loss {scores.loss(Branch()):.4f}, without them {increase:+.4f} ± {error:.4f}"
    before, after = (-scores.cost(branch, normalize)[0] for branch in (Branch(), dropped))
    return f"{text}: accuracy {before:.1%}, without them {after:.1%}"


def grouped(branches: Sequence[Branch], most: int, num_layers: int) -> list[list[Branch]]:
    """`branches` in groups of at most `most`, of one size if possible; those with much in common are together."""
    ordered = sorted(branches, key=lambda branch: (*sorted(branch), num_layers))  # the whole model last
    count = -(-len(ordered) // most)
    ends = [group * len(ordered) // count for group in range(count + 1)]
    return [ordered[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def most_branches(
    source: Architecture, layout: Layout, config: PruneConfig, micro_batch_size: int, sequence_length: int
) -> int:
    """Branches whose rows of one microbatch fit into `depth.states_bytes` on a rank; one in any case."""
    tokens = micro_batch_size * sequence_length
    if layout.sequence_parallel:
        tokens //= layout.tensor_model_parallel_size
    row = tokens * source.hidden_size * ITEM_BYTES[config.calibration.precision]
    return max(1, config.depth.states_bytes // row)


def planned(source: Architecture, method: str, drops: Iterable[int], most: int) -> tuple[int, int]:
    """Models that will be measured, and evaluations of a layer that a sequence takes for them all.

    For dropping each of these numbers of layers, the largest first, with nothing measured twice.
    """
    measured, evaluations = set[Branch](), 0
    for drop in sorted(drops, reverse=True):
        dropped = Branch()
        for turn in range(drop if method == "greedy" else 1):
            compared = candidates(method, source.num_layers, drop, dropped) + ([] if turn else [Branch()])
            if branches := [branch for branch in compared if branch not in measured]:
                groups = grouped(branches, most, source.num_layers)
                evaluations += sum(Branches(group, source.num_layers).evaluations for group in groups)
                measured.update(branches)
            dropped |= {source.num_layers - 1 - turn}  # which ones greedy drops changes no number
    return len(measured), evaluations


def depth_search(
    source: Architecture, layout: Layout, config: PruneConfig, drops: Iterable[int], sequence_length: int
) -> dict[str, float]:
    """Models to measure to drop each of these numbers of layers, and evaluations of a layer for each sequence, also in
    passes through all.
    """
    most = most_branches(source, layout, config, config.calibration.micro_batch_size, sequence_length)
    models, evaluations = planned(source, config.depth_method, drops, most)
    passes = round(evaluations / source.num_layers, 2)
    return {"models": models, "layer_evaluations": evaluations, "forward_passes": passes}


def flops_per_token(source: Architecture, sequence_length: int, models: int, evaluations: int) -> int:
    """Of a token of the text, by arithmetic: evaluations of a layer, and one output projection for each model."""
    output = 2 * source.vocab_size * source.hidden_size
    layers = forward_flops_per_token(source, sequence_length) - output
    return layers * evaluations // source.num_layers + models * output


def check_depth(config: DepthConfig) -> None:
    """Raises UserError for a metric without its task, a task without its metric, and a file that is no task."""
    if config.metric == "task" and config.task is None:
        raise UserError("prune.depth.task: metric task needs one; give a jsonl file, or use metric loss")
    if config.metric != "task" and config.task is not None:
        raise UserError(f"prune.depth.task: {config.task} is not looked at by metric loss; set prune.depth.metric=task")
    if config.task is not None:
        try:
            read_questions(Path(config.task))
        except UserError as error:
            raise UserError(f"prune.depth.task: {error}") from None


def _ranked(scores: DepthScores, branches: Sequence[Branch], normalize: bool) -> list[Branch]:
    """The cheapest first; of equal ones that with the higher layers."""
    return sorted(branches, key=lambda branch: (scores.cost(branch, normalize), -sum(branch)))


def _gap(dropped: Cost, kept: Cost) -> float:
    """Relative difference of the first figures that differ; 0 for equal costs."""
    differing = ((ours, theirs) for ours, theirs in zip(dropped, kept, strict=True) if ours != theirs)
    return next((abs(theirs - ours) / max(abs(ours), abs(theirs)) for ours, theirs in differing), 0.0)
