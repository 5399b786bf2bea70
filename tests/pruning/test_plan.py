"""Plans against brute force: every other choice of the same size scores less."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.config import CalibrationConfig, PruneConfig, RepairConfig
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import Scores
from minitron_nemo.pruning.plan import entry_scores, make_plan
from minitron_nemo.pruning.target import target_architecture
from tests.importance.synthetic import architecture, random_values, scores_from


def plan(scores: Scores | None = None, **config: Any) -> Plan:
    scores = scores or scores_from(random_values(architecture()), architecture())
    return make_plan(scores, scores.architecture, PruneConfig(**{"ffn_score": "activation", **config}))


def with_influence(influence: list[float]) -> Scores:
    shape = architecture(num_layers=len(influence))
    return scores_from({**random_values(shape), "layers": np.array(influence)}, shape)


def best_subset(scores: np.ndarray, count: int) -> tuple[int, ...]:
    """The subset with the highest sum, by trying all."""
    return max(combinations(range(len(scores)), count), key=lambda kept: scores[list(kept)].sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("aggregation", ["mean", "l2", "var"])
def test_width_keeps_the_subsets_with_the_highest_scores(seed: int, aggregation: str) -> None:
    shape = architecture()
    scores = scores_from(random_values(shape, seed), shape)
    calibration = CalibrationConfig(sequence_aggregation=aggregation, batch_aggregation="mean")
    made = plan(scores, hidden_size=4, ffn_hidden_size=5, num_attention_heads=4, calibration=calibration)
    assert made.kept_hidden == best_subset(scores.get(Axis.HIDDEN, aggregation, "mean"), 4)
    assert made.kept_ffn is not None and made.kept_heads is not None
    for layer in range(6):
        assert made.kept_ffn[layer] == best_subset(scores.get(Axis.FFN, aggregation, "mean")[layer], 5)
        heads = scores.get(Axis.HEADS, aggregation, "mean")[layer]
        groups = best_subset(heads[:3], 2), tuple(head + 3 for head in best_subset(heads[3:], 2))
        assert made.kept_heads[layer] == groups[0] + groups[1]
    assert made.target == architecture(hidden_size=4, ffn_hidden_size=5, num_attention_heads=4)


def test_an_axis_may_rank_by_a_pair_of_its_own_and_the_plan_says_so(tmp_path: Path) -> None:
    shape = architecture()
    scores = scores_from(random_values(shape), shape)
    own = {"hidden_size": {"sequence": "l2", "batch": "var"}, "num_attention_heads": {"batch": "mean"}}
    sizes: dict[str, Any] = {"hidden_size": 4, "ffn_hidden_size": 5, "num_attention_heads": 2}
    general = {"sequence_aggregation": "var", "batch_aggregation": "l2"}
    made = plan(scores, **sizes, calibration=CalibrationConfig(**general, aggregations=own))
    assert made.kept_hidden == best_subset(scores.get(Axis.HIDDEN, "l2", "var"), 4)
    assert made.kept_ffn == tuple(best_subset(layer, 5) for layer in scores.get(Axis.FFN, "var", "l2"))
    best = scores.get(Axis.HEADS, "var", "mean").reshape(6, 2, 3).argmax(axis=2)
    assert made.kept_heads == tuple((int(first), 3 + int(second)) for first, second in best)
    without = plan(scores, **sizes, calibration=CalibrationConfig(**general))
    assert made.kept_hidden != without.kept_hidden and made.kept_heads != without.kept_heads
    made.save(tmp_path / "plan.json")
    written = Plan.load(tmp_path / "plan.json").provenance
    assert {key: written[key] for key in general} == general
    assert written["aggregations"] == {
        "hidden_size": {"sequence": "l2", "batch": "var"},
        "num_attention_heads": {"sequence": "var", "batch": "mean"},
    }
    for axis, pair in ((Axis.HIDDEN, ("l2", "var")), (Axis.FFN, ("var", "l2")), (Axis.HEADS, ("var", "mean"))):
        np.testing.assert_array_equal(entry_scores(scores, axis, written), scores.get(axis, *pair))


def test_query_groups_rank_by_the_pair_of_their_heads() -> None:
    shape = architecture(num_attention_heads=12, num_query_groups=4)
    scores = scores_from(random_values(shape), shape)
    calibration = CalibrationConfig(aggregations={"num_attention_heads": {"batch": "var"}})
    made = plan(scores, num_query_groups=2, calibration=calibration)
    heads = scores.get(Axis.HEADS, "mean", "var").reshape(6, 4, 3).sum(axis=2)
    assert made.kept_groups == tuple(best_subset(layer, 2) for layer in heads)


def test_neurons_rank_by_what_they_add_where_asked_for() -> None:
    shape = architecture()
    scores = scores_from(random_values(shape), shape)
    made = plan(scores, ffn_hidden_size=5, ffn_score="output")
    assert made.kept_ffn == tuple(best_subset(layer, 5) for layer in scores.ffn_outputs())


def test_every_norm_of_the_student_gets_the_factor_of_its_source() -> None:
    shape = architecture()
    values = random_values(shape)
    made = plan(scores_from(values, shape), hidden_size=4, drop_layers=[1])
    factors = np.sqrt(values["squares"][:, np.array(made.kept_hidden)].mean(axis=1))
    assert len(made.norm_scales) == 11
    assert made.norm_scales["decoder.final_layernorm.weight"] == pytest.approx(factors[12])
    qkv = made.norm_scales["decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"]
    fc1 = made.norm_scales["decoder.layers.4.mlp.linear_fc1.layer_norm_weight"]
    assert (qkv, fc1) == (pytest.approx(factors[4]), pytest.approx(factors[11]))  # source layers 2 and 5
    off = plan(scores_from(values, shape), hidden_size=4, repair=RepairConfig(norm_scale=False))
    assert off.norm_scales == {} and plan(scores_from(values, shape), ffn_hidden_size=5).norm_scales == {}


def test_what_needs_rms_norm_is_off_by_default_and_refused_by_key_for_another_norm() -> None:
    shape = architecture(family="nemotron", model_type="nemotron")
    scores = scores_from(random_values(shape), shape)
    assert plan(scores, hidden_size=4).norm_scales == {}
    with pytest.raises(UserError, match="prune.repair.norm_scale: needs RMSNorm .* nemotron has not") as error:
        plan(scores, hidden_size=4, repair=RepairConfig(norm_scale=True))
    assert "\n" not in str(error.value)


def test_a_plan_that_scales_gains_stored_minus_one_is_refused() -> None:
    shape = architecture(family="nemotron", model_type="nemotron")
    made = plan(scores_from(random_values(shape), shape), hidden_size=4)
    with pytest.raises(UserError, match="plan: norm_scales are not for the norms of nemotron"):
        replace(made, norm_scales={"decoder.final_layernorm.weight": 1.1})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drop", [1, 2, 3, 4])
def test_block_influence_drops_the_layers_that_change_their_input_least(seed: int, drop: int) -> None:
    influence = np.random.default_rng(seed).random(6)
    made = plan(with_influence(influence.tolist()), num_layers=6 - drop)
    dropped = set(range(6)) - set(made.kept_layers)
    assert dropped == set(min(combinations(range(1, 5), drop), key=lambda layers: influence[list(layers)].sum()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drop", [1, 2, 3, 4])
def test_contiguous_drops_the_block_with_the_smallest_summed_influence(seed: int, drop: int) -> None:
    influence = np.random.default_rng(seed).random(6)
    made = plan(with_influence(influence.tolist()), num_layers=6 - drop, depth_method="contiguous")
    start = min(range(1, 6 - drop), key=lambda start: influence[start : start + drop].sum())
    assert made.kept_layers == tuple(layer for layer in range(6) if not start <= layer < start + drop)


@pytest.mark.parametrize("method", ["block_influence", "contiguous"])
def test_automatic_depth_keeps_the_first_and_the_last_layer(method: str) -> None:
    scores = with_influence([0.0, 0.5, 0.6, 0.4, 0.0])
    assert plan(scores, num_layers=4, depth_method=method).kept_layers == (0, 1, 2, 4)
    assert plan(scores, num_layers=2, depth_method=method).kept_layers == (0, 4)


@pytest.mark.parametrize("drop_layers", [[0], [5], [0, 2, 5], [3, 2], [], [0, 1, 2, 4, 5]])
def test_explicit_layers_are_dropped_as_listed(drop_layers: list[int]) -> None:
    made = plan(drop_layers=drop_layers)
    assert made.kept_layers == tuple(layer for layer in range(6) if layer not in drop_layers)
    assert made.target.num_layers == 6 - len(drop_layers)
    assert made.gaps == {}


def test_ties_keep_the_lower_index() -> None:
    shape = architecture()
    flat = {name: np.ones_like(array) for name, array in random_values(shape).items()}
    made = plan(scores_from(flat, shape), hidden_size=3, ffn_hidden_size=2, num_attention_heads=2, num_layers=4)
    assert made.kept_hidden == (0, 1, 2)
    assert made.kept_ffn == ((0, 1),) * 4
    assert made.kept_heads == ((0, 3),) * 4
    assert made.kept_layers == (0, 1, 2, 5)
    assert plan(scores_from(flat, shape), num_layers=4, depth_method="contiguous").kept_layers == (0, 1, 2, 5)


def test_the_neurons_of_a_kept_layer_are_ranked_by_its_own_scores_after_layers_were_dropped() -> None:
    scores = scores_from(random_values(architecture()), architecture())
    made = plan(scores, ffn_hidden_size=5, num_attention_heads=4, drop_layers=[0, 3])
    alone = plan(scores, ffn_hidden_size=5, num_attention_heads=4)
    assert made.kept_ffn == tuple(alone.kept_ffn[layer] for layer in (1, 2, 4, 5))  # type: ignore[index]
    assert made.kept_heads == tuple(alone.kept_heads[layer] for layer in (1, 2, 4, 5))  # type: ignore[index]
    assert {key for key in made.gaps if key.startswith("ffn")} == {f"ffn_hidden_size/{n}" for n in (1, 2, 4, 5)}


def test_gaps_are_the_relative_distance_between_worst_kept_and_best_dropped() -> None:
    shape = architecture()
    scores = scores_from(random_values(shape), shape)
    made = plan(scores, hidden_size=4, ffn_hidden_size=5, num_attention_heads=4, num_layers=4)
    ranked = np.sort(scores.get(Axis.HIDDEN))[::-1]
    assert made.gaps["hidden_size"] == pytest.approx((ranked[3] - ranked[4]) / ranked[3])
    ranked = np.sort(scores.get(Axis.FFN)[0])[::-1]
    assert made.gaps["ffn_hidden_size/0"] == pytest.approx((ranked[4] - ranked[5]) / ranked[4])
    groups = np.sort(scores.get(Axis.HEADS)[0].reshape(2, 3))[:, ::-1]
    assert made.gaps["num_attention_heads/0"] == pytest.approx(((groups[:, 1] - groups[:, 2]) / groups[:, 1]).min())
    ranked = np.sort(scores.block_influence[1:5])[::-1]
    assert made.gaps["num_layers"] == pytest.approx((ranked[1] - ranked[2]) / ranked[1])
    influence = [0.9, 0.1, 0.2, 0.4, 0.3, 0.9]
    assert plan(with_influence(influence), num_layers=4, depth_method="contiguous").gaps == {
        "num_layers": pytest.approx((0.6 - 0.3) / 0.6)
    }


@pytest.mark.parametrize("seed", range(3))
def test_whole_query_groups_stay_where_their_heads_scores_have_the_highest_sum(seed: int) -> None:
    shape = architecture(num_attention_heads=12, num_query_groups=4)
    scores = scores_from(random_values(shape, seed), shape)
    made = plan(scores, num_query_groups=2, num_attention_heads=4)
    assert made.kept_groups is not None and made.kept_heads is not None
    for layer in range(6):
        heads = scores.get(Axis.HEADS)[layer]
        groups = best_subset(heads.reshape(4, 3).sum(axis=1), 2)
        assert made.kept_groups[layer] == groups
        best = [3 * group + head for group in groups for head in best_subset(heads[3 * group : 3 * group + 3], 2)]
        assert made.kept_heads[layer] == tuple(best)
    whole = plan(scores, num_query_groups=3)
    assert whole.target == architecture(num_attention_heads=9, num_query_groups=3)
    assert whole.kept_heads == tuple(
        tuple(3 * group + head for group in groups for head in range(3)) for groups in whole.kept_groups
    )
    assert set(whole.gaps) == {f"num_query_groups/{layer}" for layer in range(6)}


@pytest.mark.parametrize(
    "kept, pairs",
    [
        (5, [(5, 6)]),  # i = K alone, whose partner is K + 1; the paper's range begins one earlier, at a head 7
        (4, [(4, 5), (3, 6)]),
        (3, [(3, 4), (2, 5), (1, 6)]),
        (2, [(2, 3), (1, 4)]),
    ],
)
def test_heads_merge_in_the_papers_order_within_their_query_group(kept: int, pairs: list[tuple[int, int]]) -> None:
    shape = architecture(num_attention_heads=12)
    values = random_values(shape)
    ranks = {1: 2, 2: 0, 3: 5, 4: 1, 5: 4, 6: 3}  # of a group: which head is the best, the second, and so on
    for group in range(2):
        for rank, head in ranks.items():
            values["heads"][..., 6 * group + head] = 7 - rank
    made = plan(scores_from(values, shape), num_attention_heads=2 * kept, repair=RepairConfig(merge_heads=True))
    expected = [(6 * group + ranks[i], 6 * group + ranks[j]) for group in range(2) for i, j in pairs]
    assert made.merged_heads == (tuple(expected),) * 6


@pytest.mark.parametrize("pairs", [((0, 1),), ((4, 2),), ((1, 2), (1, 2)), ((0, 6),)])
def test_merges_that_are_not_of_a_kept_and_a_dropped_head_of_one_group_are_refused(pairs: tuple) -> None:
    made = plan(num_attention_heads=4)
    kept = ((0, 1, 3, 4),) * 6
    assert replace(made, kept_heads=kept, merged_heads=(((1, 2),),) * 6).merged_heads is not None
    with pytest.raises(UserError, match=r"plan: merged_heads\[0\]"):
        replace(made, kept_heads=kept, merged_heads=(pairs,) * 6)


def test_nothing_to_prune_is_the_identity() -> None:
    shape = architecture()
    made = plan(hidden_size=10, ffn_hidden_size=12, num_attention_heads=6, num_layers=6)
    assert made == Plan(shape, shape, tuple(range(6)), provenance=made.provenance)


def test_a_plan_says_where_it_comes_from() -> None:
    made = plan(hidden_size=4, calibration=CalibrationConfig(batch_aggregation="mean"))
    assert made.provenance["model_fingerprint"] == "m" * 64
    assert made.provenance["data_fingerprint"] == "d" * 64
    assert made.provenance["batch_aggregation"] == "mean"
    assert made.provenance["calibration"] == {"precision": "fp32"}


@pytest.mark.parametrize(
    "config, message",
    [
        ({"hidden_size": 11}, "prune.hidden_size: 11 .* the source has 10"),
        ({"ffn_hidden_size": 0}, "prune.ffn_hidden_size: 0 .* the source has 12"),
        ({"num_layers": 7}, "prune.num_layers: 7 .* the source has 6"),
        ({"num_layers": 1}, "prune.num_layers: 1 is too few.* prune.drop_layers"),
        ({"num_attention_heads": 8}, "prune.num_attention_heads: 8 .* the source has 6"),
        ({"num_attention_heads": 5}, "prune.num_attention_heads: 5 is not a multiple .* 2, .*; use one of 2, 4, 6"),
        ({"num_attention_heads": 4, "num_query_groups": 1}, "prune.num_attention_heads: 4 .* use one of 1, 2, 3"),
        ({"num_query_groups": 3}, "prune.num_query_groups: 3 .* the source has 2"),
        ({"num_layers": 4, "drop_layers": [1]}, "prune.drop_layers: prune.num_layers is given too"),
        ({"drop_layers": [6]}, "prune.drop_layers: there is no layer 6; .* 0 to 5"),
        ({"drop_layers": [-1]}, "prune.drop_layers: there is no layer -1"),
        ({"drop_layers": [1, 2, 1]}, "prune.drop_layers: layer 1 is listed twice"),
        ({"drop_layers": [0, 1, 2, 3, 4, 5]}, "prune.drop_layers: it lists all 6 layers"),
        ({"num_layers": 4, "depth_method": "magic"}, "prune.depth_method: 'magic' is not one of"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused_in_one_line_naming_the_key(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        target_architecture(architecture(), PruneConfig(**config))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        plan(**config)


@pytest.mark.parametrize(
    "given, score, message",
    [
        (["l2", "mean"], {}, r": \['l2', 'mean'\] is not a pair for each of some axes, {AXIS: {sequence: "),
        ({"num_layers": {"batch": "l2"}}, {}, ".num_layers: not one of the axes that have aggregations, hidden_size, "),
        ({"moe_ffn_hidden_size": {"batch": "l2"}}, {}, ".moe_ffn_hidden_size: the layers of llama have none"),
        ({"hidden_size": ["l2", "mean"]}, {}, r".hidden_size: \['l2', 'mean'\] is not {sequence: mean, batch: l2}"),
        ({"hidden_size": {"tokens": "l2"}}, {}, ".hidden_size: {'tokens': 'l2'} is not {sequence: mean, batch: l2}"),
        ({"hidden_size": {"batch": "max"}}, {}, ".hidden_size.batch: 'max' is not one of mean, l2, var"),
        ({"ffn_hidden_size": {}}, {"ffn_score": "output"}, ".ffn_hidden_size: prune.ffn_score is output, which has no"),
    ],
)
def test_a_pair_that_no_axis_can_have_is_refused(given: Any, score: dict[str, str], message: str) -> None:
    config: dict[str, Any] = {"calibration": CalibrationConfig(aggregations=given), **score}
    with pytest.raises(UserError, match=f"^prune.calibration.aggregations{message}") as error:
        plan(hidden_size=4, **config)
    assert "\n" not in str(error.value)


def test_one_layer_can_be_the_target_of_a_model_with_one() -> None:
    shape = architecture(num_layers=1)
    assert target_architecture(shape, PruneConfig(num_layers=1)) == shape


def test_scores_of_another_model_are_refused() -> None:
    scores = scores_from(random_values(architecture()), architecture())
    other: Architecture = architecture(vocab_size=64)
    with pytest.raises(UserError, match="scores: measured on a model with vocab_size 32, not 64"):
        make_plan(scores, other, PruneConfig(hidden_size=4))
