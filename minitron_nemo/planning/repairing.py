"""Memory of the ranks in `repair`: the source, second moments of the places of a pass, and what solving a place takes.

pass      second moments of the fullest pass, in fp64; one layer's forward pass; a place's product, in fp32 or fp64
solve     the same moments, less the place's own; all that least squares hold of the largest place, in fp64
rotate    of a rotated cut: one matrix of all norms and, on rank 0, its eigenvectors with LAPACK's workspace
"""

from __future__ import annotations

from minitron_nemo.arch import Axis
from minitron_nemo.importance.second_moments import SPAN_TOKENS
from minitron_nemo.planning.activations import FP32, Activations
from minitron_nemo.planning.job import Job
from minitron_nemo.pruning.repair import Sums, stage_passes
from minitron_nemo.pruning.target import rotates

FP64 = 8


def repair_moments(job: Job, own: Activations, rank: int) -> dict[str, dict[str, int]]:
    """Bytes by part and moment on the ranks of a pipeline rank, beside the weights; none where nothing is fitted.

    `own` are the activations of the source's passes.
    """
    config, work = job.recipe.prune, own.forward_work()
    passes = stage_passes(job.source, job.student, config.repair, job.layout, rank)
    found = {}
    if passes:
        fullest = max(sum(each.nbytes for each in run) for run in passes)
        places = {each for run in passes for each in run}
        spans = max(_span(each, job, own) for each in places)
        found["pass"] = {"second moments": fullest, "work": work + spans}
        found["solve"] = {"second moments": fullest, "work": max(_solving(each, job) for each in places)}
    if rotates(job.student, job.source, config):
        square = job.source.hidden_size**2
        tokens = job.source.hidden_size * min(own.tokens, SPAN_TOKENS)
        found["rotate"] = {
            "second moments": square * FP64,
            "work": max(4 * square * FP64, work + FP32 * (2 * tokens + square)),
        }
    return found


def _span(place: Sums, job: Job, own: Activations) -> int:
    """Tokens in fp32, behind a LayerNorm in fp64, what is kept of them, and their product."""
    tokens = min(own.tokens, SPAN_TOKENS)
    width = job.source.size(place.axis) * (2 if place.axis == Axis.HIDDEN else 1)
    entries = tokens * (width + place.rows + place.columns) + place.rows * place.columns
    return (FP64 if place.means else FP32) * entries


def _solving(place: Sums, job: Job) -> int:
    """The right side, its solution and the map [n, k]; the system, its factor and the identity [k, k].

    Of linear_fc2 whole moments besides, in which there is the system, too; less those that the rank had summed.
    """
    rows = job.source.size(place.axis)
    entries = 3 * rows * place.columns + 2 * place.columns**2
    if place.axis != Axis.HIDDEN:
        entries += rows * place.columns + place.columns**2 - place.rows * place.columns
    return FP64 * entries
