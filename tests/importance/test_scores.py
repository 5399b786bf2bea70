"""Scores: all nine aggregations from stored moments, and the file."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minitron_nemo.arch import Axis
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ARRAYS, Scores, data_fingerprint
from tests.importance.synthetic import architecture, random_values, scores_from
from tests.tiny import LLAMA3_ROPE

BATCH = {
    "mean": lambda values: values.mean(axis=0),
    "l2": lambda values: np.sqrt((values**2).sum(axis=0)),
    "var": lambda values: values.var(axis=0),
}


@pytest.mark.parametrize("batch", ["mean", "l2", "var"])
@pytest.mark.parametrize("position, sequence", [(0, "mean"), (1, "l2"), (2, "var")])
def test_every_aggregation_follows_from_the_stored_moments(position: int, sequence: str, batch: str) -> None:
    shape = architecture()
    values = random_values(shape)
    scores = scores_from(values, shape)
    for axis, name in ((Axis.FFN, "ffn"), (Axis.HEADS, "heads")):
        np.testing.assert_allclose(
            scores.get(axis, sequence, batch), BATCH[batch](values[name][:, position]), rtol=1e-12
        )
    hidden = BATCH[batch](values["hidden"][:, position]).sum(axis=0)
    np.testing.assert_allclose(scores.get(Axis.HIDDEN, sequence, batch), hidden, rtol=1e-12)
    np.testing.assert_array_equal(scores.get(Axis.LAYERS, sequence, batch), values["layers"])


def test_the_papers_aggregation_is_the_default() -> None:
    scores = scores_from(random_values(architecture()), architecture())
    np.testing.assert_array_equal(scores.get(Axis.FFN), scores.get(Axis.FFN, sequence="mean", batch="l2"))


def test_saved_scores_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    scores = scores_from(random_values(architecture()), architecture(rope_scaling=LLAMA3_ROPE))
    scores.save(tmp_path / "scores.npz")
    loaded = Scores.load(tmp_path / "scores.npz")
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(scores, name))
    for name in ("architecture", "sequences", "tokens", "model_fingerprint", "data_fingerprint", "settings"):
        assert getattr(loaded, name) == getattr(scores, name)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_the_same_scores_make_the_same_file(tmp_path: Path) -> None:
    scores = scores_from(random_values(architecture()), architecture())
    scores.save(tmp_path / "first.npz")
    scores.save(tmp_path / "second.npz")
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()


def _rewritten(path: Path, **changes: object) -> bytes:
    with np.load(path) as file:
        arrays = dict(file)
    metadata = json.loads(str(arrays.pop("metadata")))
    buffer = io.BytesIO()
    np.savez(buffer, metadata=np.array(json.dumps({**metadata, **changes})), **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "pickle", "array", "schema", "shape", "not finite"])
def test_anything_else_is_refused_in_one_line_that_names_the_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "scores.npz"
    scores = scores_from(random_values(architecture()), architecture())
    scores.save(path)
    whole = path.read_bytes()
    if damage in ("pickle", "array"):
        buffer = io.BytesIO()
        np.save(buffer, np.array([{"a": 1}]) if damage == "pickle" else np.zeros(3), allow_pickle=True)
        content = buffer.getvalue()
    else:
        content = {
            "empty": b"",
            "text": b"scores: none\n",
            "truncated": whole[: len(whole) // 2],
            "schema": _rewritten(path, schema_version=2),
            "shape": _rewritten(path, architecture=replace(scores.architecture, num_layers=5).to_dict()),
            "not finite": whole.replace(scores.ffn[0, 0, 0].tobytes(), np.full(12, np.nan).tobytes()),
        }[damage]
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Scores.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_scores_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such scores; calibrate first"):
        Scores.load(tmp_path / "scores.npz")


def test_values_that_are_not_finite_never_become_scores() -> None:
    values = random_values(architecture())
    values["ffn"][0, 0, 0, 0] = np.inf
    with pytest.raises(UserError, match="ffn is not finite"):
        scores_from(values, architecture())


@pytest.mark.parametrize("key", ["sequence", "batch"])
def test_an_unknown_aggregation_is_named(key: str) -> None:
    scores = scores_from(random_values(architecture()), architecture())
    with pytest.raises(UserError, match=f"prune.calibration.{key}_aggregation: 'max' is not one of mean, l2, var"):
        scores.get(Axis.FFN, **{key: "max"})


def test_constants_and_outputs_follow_from_the_stored_mean_squares() -> None:
    shape = architecture()
    values = random_values(shape)
    scores = scores_from(values, shape)
    kept = [0, 3, 4, 9]
    expected = [np.sqrt(sum(row[channel] for channel in kept) / 4) for row in values["squares"]]
    np.testing.assert_allclose(scores.norm_scales(kept), expected, rtol=1e-12)
    np.testing.assert_allclose(scores.norm_scales(range(10)), np.sqrt(values["squares"].mean(axis=1)), rtol=1e-12)
    squares = (values["ffn"][:, 1] ** 2).sum(axis=0) / scores.tokens
    np.testing.assert_allclose(scores.ffn_outputs(), np.sqrt(squares) * values["columns"], rtol=1e-12)


def passes() -> tuple[Scores, Scores, Scores]:
    """Two passes, and one over the samples of both."""
    shape = architecture()
    first, second = random_values(shape, seed=1, sequences=4), random_values(shape, seed=2, sequences=3)
    both = {name: np.concatenate([first[name], second[name]]) for name in ("hidden", "ffn", "heads")}
    both |= {name: (4 * first[name] + 3 * second[name]) / 7 for name in ("layers", "squares")}
    made = []
    for values, ids in ((first, "abcd"), (second, "efg"), ({**both, "columns": first["columns"]}, "abcdefg")):
        scores = scores_from({**values, "columns": first["columns"]}, shape, sequences=len(ids))
        settings = {"precision": "fp32", "sequence_length": 5, "samples": len(ids)}
        fingerprint = data_fingerprint(ids)
        made.append(replace(scores, sample_ids=tuple(ids), settings=settings, data_fingerprint=fingerprint))
    return made[0], made[1], made[2]


def test_merged_passes_give_what_one_pass_over_all_sequences_does() -> None:
    first, second, both = passes()
    for order in ((first, second), (second, first)):
        merged = Scores.merge(order)
        for array in ARRAYS:
            np.testing.assert_allclose(getattr(merged, array), getattr(both, array), rtol=1e-12, err_msg=array)
        for name in ("sequences", "tokens", "model_fingerprint", "data_fingerprint", "settings", "sample_ids"):
            assert getattr(merged, name) == getattr(both, name), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_fingerprint": "n" * 64}, "b.npz: measured on another model than a.npz"),
        ({"settings": {"precision": "bf16", "sequence_length": 5, "samples": 3}}, "b.npz: precision is bf16, that of"),
        ({"settings": {"precision": "fp32", "sequence_length": 6, "samples": 3}}, "b.npz: sequence_length is 6"),
        ({"settings": {"precision": "fp32", "samples": 3}}, "b.npz: sequence_length is None"),
        ({"sample_ids": ("e", "f", "d")}, "b.npz: 1 of its samples are in the passes before it"),
        ({"sample_ids": ()}, "b.npz: does not say which samples it is of"),
    ],
)
def test_what_is_not_of_one_kind_is_not_merged(change: dict, says: str) -> None:
    first, second, _ = passes()
    with pytest.raises(UserError, match=says) as error:
        Scores.merge([first, replace(second, **change)], ["a.npz", "b.npz"])
    assert "\n" not in str(error.value)
