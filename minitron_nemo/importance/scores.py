"""`Scores`: what one calibration pass measured, on every axis at once, and its file.

Activations become one number per entry in two steps (arXiv 2407.14679 section 2.2): first over the tokens of a
sequence, then over sequences. Kept are, for each way of the first step, the sum over sequences and the sum of squares:
all nine combinations, and any target shape, follow from these without another forward pass.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.family import family
from minitron_nemo.checkpoint.files import write_atomic, writing
from minitron_nemo.errors import UserError

AGGREGATIONS = ("mean", "l2", "var")
AGGREGATED = (Axis.HIDDEN, Axis.FFN, Axis.MOE_FFN, Axis.SHARED_FFN, Axis.HEADS)  # axes that `get` aggregates
ARRAYS = (
    *("hidden", "ffn", "heads", "block_influence", "norm_squares", "ffn_column_norms"),
    *("experts", "routed", "shared_expert", "shared_expert_column_norms"),
)
SCHEMA_VERSION = 3

FINAL_NORM = "decoder.final_layernorm.weight"

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """Measurements of one model on one calibration set; float64.

    `hidden` [2, 3, 2 x num_layers, hidden_size], `ffn` [2, 3, num_layers, ffn_hidden_size] and `heads` [2, 3,
    num_layers, num_attention_heads] hold moments over sequences (sum, sum of squares) of each sequence aggregation
    (mean, l2, var of the absolute activations of a sequence). The third dim of `hidden` counts norms: the input norm
    and the pre-MLP norm of layer 0, of layer 1, and so on. `block_influence` [num_layers] is 1 - the mean cosine
    between a layer's input and output (2407.14679 section 2.2), over all tokens.

    `norm_squares` [2 x num_layers + 1, hidden_size] is the mean square over all tokens of every RMSNorm's output before
    its gain, the final norm's last; of families with LayerNorm it has no rows. `ffn_column_norms` [num_layers,
    ffn_hidden_size] is the L2 norm of the column of linear_fc2 that reads a neuron.

    In a mixture of experts `ffn` is [2, 3, num_layers, num_moe_experts, moe_ffn_hidden_size] and `ffn_column_norms`
    [num_layers, num_moe_experts, moe_ffn_hidden_size]: of each expert, on the tokens that were routed to it, the
    activation times the router's weight; a sequence none of whose tokens were counts as zeros. `experts` [num_layers,
    num_moe_experts] is the mean over those tokens of the router's weight times the L2 norm of the expert's output
    (REAP, arXiv 2510.13999), 0 where there was none, and `routed` their number; without experts both are
    [num_layers, 0]. `shared_expert` [2, 3,
    num_layers, n] and `shared_expert_column_norms` [num_layers, n] are of the n neurons, 0 without one, of the expert
    that sees every token, before its gate.

    `sequences` and `tokens` count what was measured: tokens of weight 0, and sequences without any other, are not.
    `data_fingerprint` stands for the sequences that were counted; `sample_ids` are the hashes of their tokens, one for
    each sequence, where they are known. Raises UserError for a wrong shape or a value that is not finite.
    """

    architecture: Architecture
    hidden: Array
    ffn: Array
    heads: Array
    block_influence: Array
    norm_squares: Array
    ffn_column_norms: Array
    experts: Array
    routed: Array
    shared_expert: Array
    shared_expert_column_norms: Array
    sequences: int
    tokens: int
    model_fingerprint: str
    data_fingerprint: str
    settings: Mapping[str, Any]
    sample_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shapes = _shapes(self.architecture)
        for name in ARRAYS:
            array = getattr(self, name)
            if array.shape != shapes[name]:
                raise UserError(f"scores: {name} has shape {array.shape}, the architecture needs {shapes[name]}")
            if not np.isfinite(array).all():
                raise UserError(f"scores: {name} is not finite everywhere; does the model give finite logits?")

    def get(self, axis: Axis, sequence: str = "mean", batch: str = "l2") -> Array:
        """One score per entry: [n] for hidden channels and layers, [num_layers, n] for FFN neurons, heads and experts.

        [num_layers, num_moe_experts, n] for the neurons of experts but the shared one. Scores of hidden channels are
        summed over the norms of all layers, each aggregated on its own. The aggregations have no bearing on layers,
        which are scored by Block Influence, and on experts.
        """
        if axis == Axis.LAYERS:
            return self.block_influence
        if axis == Axis.EXPERTS:
            return self.experts
        for key, value in (("sequence_aggregation", sequence), ("batch_aggregation", batch)):
            if value not in AGGREGATIONS:
                raise UserError(f"prune.calibration.{key}: {value!r} is not one of {', '.join(AGGREGATIONS)}")
        if axis == Axis.HIDDEN:
            return self.hidden_by_norm(sequence, batch).sum(axis=0)
        if axis in (Axis.FFN, Axis.MOE_FFN):
            return self._over_sequences(self.ffn, sequence, batch)
        if axis == Axis.SHARED_FFN:
            return self._over_sequences(self.shared_expert, sequence, batch)
        if axis == Axis.HEADS:
            return self._over_sequences(self.heads, sequence, batch)
        raise ValueError(f"no scores are measured for axis {axis}")

    def hidden_by_norm(self, sequence: str = "mean", batch: str = "l2") -> Array:
        """The terms of the sum that scores a hidden channel: [2 x num_layers, hidden_size]."""
        return self._over_sequences(self.hidden, sequence, batch)

    def ffn_outputs(self, axis: Axis = Axis.FFN) -> Array:
        """What each FFN neuron adds to the residual stream: rms(activation) x column norm, in the shape of `get(axis)`.

        The L2 norm of the difference that removing the neuron alone makes, per token in root mean square.
        """
        shared = axis == Axis.SHARED_FFN
        moments, norms = (
            (self.shared_expert, self.shared_expert_column_norms) if shared else (self.ffn, self.ffn_column_norms)
        )
        squares = moments[1, AGGREGATIONS.index("l2")] / self.tokens
        return np.sqrt(squares) * norms

    def norm_scales(self, kept: Sequence[int]) -> Array:
        """For each RMSNorm, the factor on its gain when only the channels `kept` stay: [2 x num_layers + 1].

        RMSNorm divides by the root mean square of the channels that it sees. That of k kept channels is smaller than
        that of all d where the dropped ones are the large ones, and the other way round; the ratio of both, in root
        mean square over tokens, is sqrt(sum of the kept channels' mean squares after the norm / k).
        """
        return np.sqrt(self.norm_squares[:, list(kept)].mean(axis=1))

    def _over_sequences(self, moments: Array, sequence: str, batch: str) -> Array:
        total, squares = moments[:, AGGREGATIONS.index(sequence)]
        if batch == "mean":
            return total / self.sequences
        if batch == "l2":
            return np.sqrt(squares)
        return np.maximum(squares / self.sequences - (total / self.sequences) ** 2, 0.0)

    @staticmethod
    def merge(passes: Sequence[Scores], names: Sequence[str] = ()) -> Scores:
        """What one pass over the samples of all `passes`, one at least, measures; `names` are theirs in errors.

        Moments are sums, and means over tokens are weighted with the tokens. Raises UserError for another model,
        other settings, samples in common, and for Scores that do not say which samples they are of.
        """
        names = names or [f"pass {number}" for number in range(1, len(passes) + 1)]
        first, samples = passes[0], list[str]()
        for scores, name in zip(passes, names, strict=True):
            scores._check_merges(first, name, names[0])
            if shared := set(samples) & set(scores.sample_ids):
                raise UserError(f"{name}: {len(shared)} of its samples are in the passes before it, too; leave it out")
            samples += scores.sample_ids
        tokens = [scores.tokens for scores in passes]
        routed = np.sum([scores.routed for scores in passes], axis=0)
        return replace(
            first,
            hidden=np.sum([scores.hidden for scores in passes], axis=0),
            ffn=np.sum([scores.ffn for scores in passes], axis=0),
            heads=np.sum([scores.heads for scores in passes], axis=0),
            shared_expert=np.sum([scores.shared_expert for scores in passes], axis=0),
            experts=np.sum([scores.experts * scores.routed for scores in passes], axis=0) / np.maximum(routed, 1),
            routed=routed,
            block_influence=np.average([scores.block_influence for scores in passes], axis=0, weights=tokens),
            norm_squares=np.average([scores.norm_squares for scores in passes], axis=0, weights=tokens),
            sequences=sum(scores.sequences for scores in passes),
            tokens=sum(tokens),
            data_fingerprint=data_fingerprint(samples),
            settings={**first.settings, "samples": sum(scores.settings["samples"] for scores in passes)},
            sample_ids=tuple(sorted(samples)),
        )

    def _check_merges(self, first: Scores, name: str, first_name: str) -> None:
        """Raise UserError unless the two are of one model, measured in one way, and say of which samples."""
        if not self.sample_ids:
            raise UserError(f"{name}: does not say which samples it is of, so they might count twice; calibrate again")
        if self.model_fingerprint != first.model_fingerprint or self.architecture != first.architecture:
            raise UserError(f"{name}: measured on another model than {first_name}; merge passes of one model")
        for key in sorted({*self.settings, *first.settings} - {"samples"}):
            found, wanted = self.settings.get(key), first.settings.get(key)
            if found != wanted:
                raise UserError(f"{name}: {key} is {found}, that of {first_name} {wanted}; merge passes of one kind")

    def save(self, path: Path) -> None:
        """Write one .npz file, atomically: the arrays, and `metadata`, which is JSON. Raises UserError if it cannot."""
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "architecture": self.architecture.to_dict(),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "model_fingerprint": self.model_fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "settings": dict(self.settings),
            "sample_ids": self.sample_ids,
        }
        file = io.BytesIO()
        np.savez(file, metadata=np.array(json.dumps(metadata)), **{name: getattr(self, name) for name in ARRAYS})
        with writing(path):
            write_atomic(path, file.getvalue())

    @staticmethod
    def load(path: Path) -> Scores:
        """Read what `save` wrote. Raises UserError, naming the file, for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                metadata = json.loads(str(file["metadata"]))
                if metadata["schema_version"] != SCHEMA_VERSION:
                    raise UserError(
                        f"{path}: schema_version {metadata['schema_version']} is not {SCHEMA_VERSION}; calibrate again"
                    )
                return Scores(
                    architecture=Architecture.from_dict(metadata["architecture"], f"{path}: architecture"),
                    sequences=int(metadata["sequences"]),
                    tokens=int(metadata["tokens"]),
                    model_fingerprint=str(metadata["model_fingerprint"]),
                    data_fingerprint=str(metadata["data_fingerprint"]),
                    settings=dict(metadata["settings"]),
                    sample_ids=tuple(metadata["sample_ids"]),
                    **{name: file[name].astype(np.float64) for name in ARRAYS},
                )
        except FileNotFoundError:
            raise UserError(f"{path}: no such scores; calibrate first") from None
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        # numpy reports a file that is no .npz as any of these.
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not a scores file ({' '.join(str(error).split())}); calibrate again") from None


def data_fingerprint(sample_ids: Iterable[str]) -> str:
    """Of samples, each as often as it was measured, whatever their order."""
    return hashlib.sha256(" ".join(sorted(sample_ids)).encode()).hexdigest()


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    layers, per_sequence = architecture.num_layers, (2, len(AGGREGATIONS))
    norms = 2 * layers + 1 if family(architecture.family).normalization == "RMSNorm" else 0
    experts = architecture.size(Axis.EXPERTS)
    neurons = (experts, architecture.size(Axis.MOE_FFN)) if experts else (architecture.ffn_hidden_size,)
    return {
        "hidden": (*per_sequence, 2 * layers, architecture.hidden_size),
        "ffn": (*per_sequence, layers, *neurons),
        "heads": (*per_sequence, layers, architecture.num_attention_heads),
        "block_influence": (layers,),
        "norm_squares": (norms, architecture.hidden_size),
        "ffn_column_norms": (layers, *neurons),
        "experts": (layers, experts),
        "routed": (layers, experts),
        "shared_expert": (*per_sequence, layers, architecture.size(Axis.SHARED_FFN)),
        "shared_expert_column_norms": (layers, architecture.size(Axis.SHARED_FFN)),
    }
