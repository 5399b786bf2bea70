"""Megatron-core's pipeline schedules, 1F1B and interleaved, as orders of forward and backward passes.

rank 0 of 2   F0 F1 B0 F2 B1 F3 B2 B3        before its first backward a rank runs the forwards that fill the
rank 1 of 2      F0 B0 F1 B1 F2 B2 F3 B3     ranks behind it; then one forward, one backward, until the end
"""

from __future__ import annotations

from collections.abc import Sequence


def most_in_flight(
    pipeline_size: int, virtual_stages: int, rank: int, microbatches: int, bytes_of_chunk: Sequence[int]
) -> int:
    """The most bytes that forward passes without their backward hold on a rank at once.

    `bytes_of_chunk` are those that a microbatch leaves in each of the rank's virtual stages. Warm-up and order as in
    megatron.core.pipeline_parallel.schedules (get_pp_rank_microbatches, get_schedule_table).
    """
    total = microbatches * virtual_stages
    warm_up = pipeline_size - rank - 1
    if virtual_stages > 1:
        warm_up = 2 * warm_up + (virtual_stages - 1) * pipeline_size
    held = most = 0
    for passes in range(min(warm_up, total)):
        held += bytes_of_chunk[_chunk(passes, pipeline_size, virtual_stages)]
    most = held
    for backward, forward in enumerate(range(min(warm_up, total), total)):
        held += bytes_of_chunk[_chunk(forward, pipeline_size, virtual_stages)]
        most = max(most, held)
        held -= bytes_of_chunk[virtual_stages - 1 - _chunk(backward, pipeline_size, virtual_stages)]
    return most


def pass_time(stages: Sequence[float], virtual_stages: int, microbatches: int) -> float:
    """Time of `microbatches` through a pipeline whose ranks take `stages` for one, over all their virtual stages.

    The slowest rank works all the time but while the pipeline fills and drains, for which the others once take theirs:
    m max + (sum - max) / v. With equal stages the idle share is (p - 1) / (v m) of the work.
    """
    slowest = max(stages)
    return microbatches * slowest + (sum(stages) - slowest) / virtual_stages


def bubble(pipeline_size: int, virtual_stages: int, microbatches: int) -> float:
    """Time in which an even pipeline fills and drains, as a share of its work: (p - 1) / (v m)."""
    return (pipeline_size - 1) / (virtual_stages * microbatches)


def _chunk(number: int, pipeline_size: int, virtual_stages: int) -> int:
    """Virtual stage of a rank's forward pass with this number: groups of p microbatches go through one after other."""
    return number // pipeline_size % virtual_stages
