"""Seconds of the chain's steps that run the model, and which of them are not known.

    correct, distill           updates (`time`)
    calibrate, score-depth     FLOPs / (processes x efficiency x peak in `prune.calibration.precision`)
    repair                     the same of its passes
    cache-teacher              the teacher's passes (`time`)

Of repairs are left out what is summed, in fp32 or fp64, and the systems that are solved, in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping

from minitron_nemo.planning.devices import Device
from minitron_nemo.planning.job import Job
from minitron_nemo.planning.time import caching, correction, distillation, efficiency
from minitron_nemo.pruning.depth import layers_to_drop
from minitron_nemo.pruning.repair import fits
from minitron_nemo.pruning.repair import planned as planned_repair


def whole(job: Job, device: Device, flops: Mapping[str, int]) -> dict[str, float] | None:
    """Seconds of the chain's steps that run the model, without those of `untimed`; None without a known peak.

    `flops` are those of `Preflight`.
    """
    if device.peak_flops is None:
        return None
    share, lacking = efficiency(job, device), untimed(job, device)
    found = {}
    if (segment := job.correction) is not None:
        found["correct"] = job.recipe.teacher.correction.steps * correction(job, segment, device, share).seconds
    if device.calibration_peak_flops is not None:
        speed = job.world_size * device.calibration_peak_flops * share
        passes = {"calibrate": flops["calibration"], "score-depth": flops["depth"], "repair": _repair_passes(job)}
        found |= {step: amount / speed for step, amount in passes.items() if step not in lacking}
    if job.caches:
        found["cache-teacher"] = caching(job, device, share)
    updates = (segment.steps * distillation(job, segment, device, share).seconds for segment in job.segments)
    return {**found, "distill": sum(updates)}


def untimed(job: Job, device: Device) -> dict[str, str]:
    """Steps whose time is not known even where that of a training is, each with the reason."""
    config, found = job.recipe.prune, {}
    measured = bool(layers_to_drop(job.source, job.student, config))
    if device.calibration_peak_flops is None:
        repaired = fits(job.source, job.student, config.repair)
        steps = (*["calibrate"] * job.calibrates, *["score-depth"] * measured, *["repair"] * repaired)
        why = f"no peak FLOP/s are known for prune.calibration.precision {config.calibration.precision}"
        found = dict.fromkeys(steps, why)
    if measured and config.depth.metric == "task":
        found["score-depth"] = "how long the questions of prune.depth.task are is not known before they are tokenised"
    return found


def _repair_passes(job: Job) -> int:
    """FLOPs of the source's passes for repairs."""
    config, length = job.recipe.prune, job.recipe.data.sequence_length
    if not fits(job.source, job.student, config.repair):
        return 0
    return config.repair.samples * length * planned_repair(job.source, job.student, config, job.layout, length)[1]
