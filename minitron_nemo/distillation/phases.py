"""What every update of a run looks like: sequence length, batch sizes and blend, as `train.phases` and
`train.rampup_batch_size` change them.

    update    1 ........... 40 41 ........ 60 61 ......................... 100
    segment   ramp-up at 64    ramp-up at 128  phase 2: 32k, 16 sequences

A run is a list of segments of equal updates, computed from the recipe alone: no state, nothing to save. The learning
rate's schedule spans all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minitron_nemo.config import DataConfig, TrainConfig
from minitron_nemo.data.dataset import Blend
from minitron_nemo.data.sampler import Stretch
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.layout import Layout


@dataclass(frozen=True)
class Segment:
    """`steps` consecutive updates of one shape. `weights` of None are the blend's own; `key` is what made it."""

    steps: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    weights: tuple[float, ...] | None = None
    key: str = "train"

    @property
    def samples(self) -> int:
        return self.steps * self.global_batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    def __str__(self) -> str:
        text = f"{self.global_batch_size} x {self.sequence_length} tokens an update"
        return text if self.weights is None else f"{text}, weights {', '.join(f'{w:g}' for w in self.weights)}"


def segments(config: TrainConfig, sequence_length: int) -> tuple[Segment, ...]:
    """The run of `config`, whose phases take `sequence_length` (`data.sequence_length`) unless they say otherwise.

    Their steps add up to `config.steps`. Raises UserError for phases or a ramp-up that make no such run.
    """
    phases = _phases(config, sequence_length)
    if config.rampup_batch_size is None:
        return phases
    ramp = _rampup(config.rampup_batch_size, phases[0])
    grown = sum(segment.steps for segment in ramp)
    if grown == phases[0].steps and len(phases) > 1 and ramp[-1].global_batch_size < phases[0].global_batch_size:
        raise UserError(
            f"train.rampup_batch_size: the ramp-up does not end within the {phases[0].steps} updates of the first "
            "phase; make it shorter or the phase longer"
        )
    rest = (replace(phases[0], steps=phases[0].steps - grown),) if grown < phases[0].steps else ()
    return (*ramp, *rest, *phases[1:])


def segment_at(run: Sequence[Segment], position: int) -> Segment:
    """The segment of the update that starts after `position` samples; the last one has no end."""
    for segment in run[:-1]:
        if position < segment.samples:
            return segment
        position -= segment.samples
    return run[-1]


def stretches(config: TrainConfig, blend: Blend) -> list[Stretch]:
    """What a `Sampler` needs to give every update of `config` the samples of its phase.

    `blend` is that of the recipe's data. Raises UserError for a source that is shorter than one sample of a phase.
    """
    run = segments(config, blend.sequence_length)
    # A length's blends share their sources, and so the documents' order in memory.
    resized = {segment.sequence_length: blend for segment in run}
    for length in resized.keys() - {blend.sequence_length}:
        resized[length] = blend.resized(length)
    joined: list[Stretch] = []
    for segment in run:
        own = resized[segment.sequence_length]
        if segment.weights is not None:
            own = replace(own, weights=segment.weights)
        samples = segment.samples
        if joined and joined[-1].blend.fingerprint == own.fingerprint:  # only batch sizes change
            samples += joined.pop().samples
        joined.append(Stretch(own, samples))
    return joined


def check_phases(
    config: TrainConfig,
    data: DataConfig,
    layout: Layout,
    world_size: int,
    max_position_embeddings: int,
    section: str = "train",
) -> None:
    """Raise UserError, naming the recipe's key, unless every update of the run fits data, layout and model.

    `section` is the part of the recipe that `config` comes from.
    """
    for segment in segments(config, data.sequence_length):
        key = section if segment.key == "train" else segment.key
        if segment.weights is not None and len(segment.weights) != len(data.train):
            raise UserError(
                f"{key}.weights: {len(segment.weights)} weights for the {len(data.train)} sources of data.train"
            )
        try:
            layout.check_batches(
                segment.global_batch_size, segment.micro_batch_size, segment.sequence_length, world_size
            )
        except UserError as error:
            raise UserError(str(error) if key == "train" else f"{key}: {error}") from None
        if segment.sequence_length > max_position_embeddings:
            raise UserError(
                f"{key}: sequence_length {segment.sequence_length} is longer than the model's "
                f"max_position_embeddings {max_position_embeddings}"
            )


def _phases(config: TrainConfig, sequence_length: int) -> tuple[Segment, ...]:
    """One segment for each of `train.phases`, or one for a run without."""
    whole = Segment(config.steps, sequence_length, config.global_batch_size, config.micro_batch_size)
    if not config.phases:
        return (whole,)
    last = len(config.phases) - 1
    left, found = config.steps, []
    for number, phase in enumerate(config.phases):
        key = f"train.phases[{number}]"
        if phase.steps is None and number < last:
            raise UserError(f"{key}.steps: required; only the last phase may leave it out and take what is left")
        steps = left if phase.steps is None else phase.steps
        given = {
            name: value
            for name in ("sequence_length", "global_batch_size", "micro_batch_size")
            if (value := getattr(phase, name)) is not None
        }
        for name, value in {"steps": steps, **given}.items():
            if value < 1:
                raise UserError(
                    f"{key}.{name}: {value} must be greater than 0"
                    + (f"; the phases before take all of train.steps {config.steps}" if phase.steps is None else "")
                )
        found.append(replace(whole, steps=steps, weights=_shares(phase.weights, key), key=key, **given))
        left -= steps
    if left:
        raise UserError(
            f"train.phases: their steps add up to {config.steps - left}, but train.steps is {config.steps}; "
            "change one, or leave out the last phase's"
        )
    return tuple(found)


def _shares(weights: list[float] | None, key: str) -> tuple[float, ...] | None:
    if weights is None:
        return None
    if not weights or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"{key}.weights: {weights} must not be negative, and one must be greater than 0")
    return tuple(weight / sum(weights) for weight in weights)


def _rampup(rampup_batch_size: list[int], phase: Segment) -> tuple[Segment, ...]:
    """The updates of `phase` before its batch is full.

    After c samples the batch is `start + increment * floor(c / (samples / increments))`, as Megatron-core's
    RampupBatchsizeNumMicroBatchesCalculator has it, here in integers.
    """
    key, target = "train.rampup_batch_size", phase.global_batch_size
    if len(rampup_batch_size) != 3 or min(rampup_batch_size) < 1:
        raise UserError(f"{key}: {rampup_batch_size} is not [start, increment, samples], all greater than 0")
    start, increment, samples = rampup_batch_size
    increments, left_over = divmod(target - start, increment)
    if increments < 1 or left_over:
        raise UserError(
            f"{key}: steps of {increment} from {start} do not lead to the global_batch_size {target}; the difference "
            "must be a multiple of the increment"
        )
    found: list[Segment] = []
    consumed, left = 0, phase.steps
    while left and (level := consumed * increments // samples) < increments:
        size = start + level * increment
        until = -(-(level + 1) * samples // increments)  # samples after which the next size begins
        steps = min(-(-(until - consumed) // size), left)
        found.append(replace(phase, steps=steps, global_batch_size=size, key=key))
        consumed += steps * size
        left -= steps
    return tuple(found)
