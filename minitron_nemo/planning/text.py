"""What is predicted, as lines of `minitron plan`."""

from __future__ import annotations

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import parameters_by_part
from minitron_nemo.planning.devices import USABLE, Device
from minitron_nemo.planning.estimate import Estimate
from minitron_nemo.planning.layouts import Candidate
from minitron_nemo.planning.memory import RankMemory

SHOWN = 5  # layouts, beside the recipe's own
NEGLIGIBLE = 0.001  # of an update
# docs/evidence/plan.md: wall time of an update over its prediction.
OFF = "tensor parallelism took 30% to 34% longer than predicted where it was measured, on a CPU; the rest 6% at most"
UNITS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}

Row = tuple[str, str]


def parts(architecture: Architecture) -> str:
    """Parameters of every part."""
    return ", ".join(f"{part} {count:,}" for part, count in parameters_by_part(architecture).items())


def rows(estimate: Estimate) -> list[Row]:
    """Memory, time and disk; all of it arithmetic."""
    return [*_memory(estimate), *_time(estimate), _disk(estimate)]


def layout_rows(estimate: Estimate) -> list[Row]:
    """A table of the fastest layouts that fit, with the recipe's own."""
    found = estimate.layouts
    if not found:
        return [("layouts", "no time to rank them by: set cluster.gpu, or train.peak_flops, and train.steps")]
    shown = found[:SHOWN]
    shown += [each for each in found[SHOWN:] if each.own]
    places = {id(each): place for place, each in enumerate(found, start=1)}
    device = estimate.device
    return [
        (
            "layouts",
            f"{len(found)} of {estimate.job.students} processes, by seconds of an update, GB of the fullest rank",
        ),
        *((f"  {places[id(each)]}", _candidate(each, device)) for each in shown),
        *([("", OFF)] if any(each.layout.tensor_model_parallel_size > 1 for each in found) else []),
    ]


def _candidate(each: Candidate, device: Device) -> str:
    remarks = [*(["the recipe's"] if each.own else [])]
    if device.fits(each.fullest.total) is False:
        remarks.append("does not fit")
    remark = f"   {', '.join(remarks)}" if remarks else ""
    return f"{each!s:<44}{each.seconds:>9.3g} s {each.fullest.total / 1e9:>7.3g} GB{remark}"


def _memory(estimate: Estimate) -> list[Row]:
    device, found = estimate.device, estimate.fullest
    if not found:
        return [("memory", "none planned: no step of this run calibrates, repairs or trains")]
    lacking = estimate.without_transformer_engine
    core = "TransformerEngine's layers" if device.transformer_engine else "layers without TransformerEngine"
    without = "without it, as where no cluster.container brings it and the environment of the nodes has none"
    return [
        (
            "memory",
            f"{found[0].total / 1e9:.3g} GB of a rank at most: {_verdict(device, found[0].total)}; {core} (arithmetic)",
        ),
        *([("", f"{lacking / 1e9:.3g} GB {without}: {_verdict(device, lacking)}")] if lacking is not None else []),
        *_recomputed(estimate),
        *((f"memory, {each.step}", _parts(each)) for each in found),
    ]


def _recomputed(estimate: Estimate) -> list[Row]:
    """What the other `train.recompute` would make of it."""
    device, other = estimate.device, estimate.other_recompute
    if other is None:
        return []
    toggled = "without" if estimate.job.recipe.train.recompute else "with"
    verdict = "" if device.memory_bytes is None else f": {_verdict(device, other.total)}"
    return [("", f"{other.total / 1e9:.3g} GB {toggled} train.recompute, fullest in {other.step}{verdict}")]


def _verdict(device: Device, amount: int) -> str:
    if device.memory_bytes is None:
        return "whether it fits is not known: set cluster.gpu or cluster.gpu_memory_bytes"
    room = f"{USABLE:.0%} of the {device.memory_bytes / 1e9:.4g} GB of {device.name}"
    return f"fits into {room}" if device.fits(amount) else f"DOES NOT FIT into {room}"


def _parts(each: RankMemory) -> str:
    held = ", ".join(f"{part} {amount / 1e9:.3g}" for part, amount in each.parts.items() if amount)
    return f"{each.total / 1e9:.3g} GB on pipeline rank {each.pipeline_rank}, fullest at its {each.moment}: {held}"


def _time(estimate: Estimate) -> list[Row]:
    device, update, seconds = estimate.device, estimate.update, estimate.seconds
    if device.peak_flops is None or seconds is None:
        return [("time", "not known: set cluster.gpu or train.peak_flops")]
    found = []
    if update is not None:
        spent = ", ".join(
            f"{part} {amount:.3g}" for part, amount in update.parts.items() if amount > NEGLIGIBLE * update.seconds
        )
        stated = "stated" if estimate.job.recipe.cluster.mfu is not None else "predicted"
        found = [
            ("seconds an update", f"{update.seconds:.3g}: {spent} (arithmetic)"),
            (
                "MFU",
                f"{update.mfu(device.peak_flops):.1%} {stated}; products at {estimate.efficiency:.0%} of "
                f"{device.peak_flops / 1e12:.4g} TFLOP/s while a rank computes",
            ),
        ]
        bubbles = ", ".join(f"{model} {share:.1%}" for model, share in update.bubbles.items() if share)
        if bubbles:
            found.append(("pipeline bubbles", f"{bubbles} of the work of their passes"))
    by_step = ", ".join(f"{step} {_duration(amount)}" for step, amount in seconds.items() if amount)
    total = sum(seconds.values())
    hours = total / 3600 * estimate.job.world_size
    timed = f"{_duration(total)}, {hours:,.1f} device-hours: {by_step} (arithmetic)"
    found.append(("time", timed if total else "not known of any step"))
    return found + [("", f"without {step}: {why}") for step, why in estimate.untimed.items()]


def _duration(seconds: float) -> str:
    unit, length = next(((unit, length) for unit, length in UNITS.items() if seconds >= 2 * length), ("seconds", 1.0))
    return f"{seconds / length:.3g} {unit}"


def _disk(estimate: Estimate) -> Row:
    found = estimate.disk
    kept = ", ".join(
        f"{each.what} {f'{each.count} x ' if each.count > 1 else ''}{each.bytes / 1e9:.3g}" for each in found
    )
    return "disk", f"{sum(each.total for each in found) / 1e9:.3g} GB: {kept} (arithmetic)"
