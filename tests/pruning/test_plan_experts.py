"""Plans for mixtures of experts against brute force, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.config import PruneConfig, RepairConfig
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import Scores
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.repair import fits
from minitron_nemo.pruning.target import target_architecture
from tests.importance.synthetic import architecture
from tests.pruning.test_plan import best_subset

MIXTURE = architecture(
    num_layers=3,
    num_moe_experts=5,
    moe_ffn_hidden_size=12,
    moe_router_topk=2,
    moe_shared_expert_intermediate_size=8,
    family="qwen2_moe",
    model_type="qwen2_moe",
)


def scores(seed: int = 0, shape: Architecture = MIXTURE) -> Scores:
    random = np.random.default_rng(seed).random
    layers, experts = shape.num_layers, shape.size(Axis.EXPERTS)
    return Scores(
        architecture=shape,
        hidden=random((2, 3, 2 * layers, shape.hidden_size)),
        ffn=random((2, 3, layers, experts, shape.ffn_hidden_size)),
        heads=random((2, 3, layers, shape.num_attention_heads)),
        block_influence=random(layers),
        norm_squares=random((2 * layers + 1, shape.hidden_size)),
        ffn_column_norms=random((layers, experts, shape.ffn_hidden_size)),
        experts=random((layers, experts)),
        routed=np.ones((layers, experts)),
        shared_expert=random((2, 3, layers, shape.size(Axis.SHARED_FFN))),
        shared_expert_column_norms=random((layers, shape.size(Axis.SHARED_FFN))),
        sequences=7,
        tokens=35,
        model_fingerprint="m",
        data_fingerprint="d",
        settings={},
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ffn_score", ["output", "activation"])
def test_experts_and_the_neurons_of_those_that_stay_have_the_highest_scores(seed: int, ffn_score: str) -> None:
    """By default the mean square of a neuron times that of the column which reads it, of each expert on its own."""
    measured = scores(seed)
    config = PruneConfig(
        num_moe_experts=3,
        moe_ffn_hidden_size=5,
        moe_shared_expert_intermediate_size=4,
        drop_layers=[1],
        ffn_score=ffn_score,
    )
    made = make_plan(measured, MIXTURE, config)
    neurons, shared = np.sqrt(measured.ffn[1, 0]), np.sqrt(measured.shared_expert[1, 0])
    if ffn_score == "output":
        neurons = np.sqrt(measured.ffn[1, 1]) * measured.ffn_column_norms
        shared = np.sqrt(measured.shared_expert[1, 1]) * measured.shared_expert_column_norms
    for place, layer in enumerate((0, 2)):
        experts = best_subset(measured.experts[layer], 3)
        assert made.kept_experts is not None and made.kept_experts[place] == experts
        assert made.kept_moe_ffn is not None
        assert made.kept_moe_ffn[place] == tuple(best_subset(neurons[layer, expert], 5) for expert in experts)
        assert made.kept_shared_ffn is not None and made.kept_shared_ffn[place] == best_subset(shared[layer], 4)
        ranked = np.sort(measured.experts[layer])[::-1]
        assert made.gaps[f"num_moe_experts/{layer}"] == pytest.approx((ranked[2] - ranked[3]) / ranked[2])
        gaps = [np.sort(neurons[layer, expert])[::-1] for expert in experts]
        smallest = min((row[4] - row[5]) / row[4] for row in gaps)
        assert made.gaps[f"moe_ffn_hidden_size/{layer}"] == pytest.approx(smallest)
    assert made.target == replace(
        MIXTURE,
        num_layers=2,
        num_moe_experts=3,
        ffn_hidden_size=5,
        moe_ffn_hidden_size=5,
        moe_shared_expert_intermediate_size=4,
    )


def test_the_norm_before_the_experts_gets_the_factor_of_its_source() -> None:
    measured = scores()
    made = make_plan(measured, MIXTURE, PruneConfig(hidden_size=4, drop_layers=[1]))
    factors = measured.norm_scales(made.kept_hidden or ())
    assert made.norm_scales["decoder.layers.1.pre_mlp_layernorm.weight"] == pytest.approx(factors[5])
    assert made.norm_scales["decoder.final_layernorm.weight"] == pytest.approx(factors[6])


@pytest.mark.parametrize(
    "cut", [{"hidden_size": 4}, {"moe_ffn_hidden_size": 5}, {"moe_shared_expert_intermediate_size": 4}]
)
def test_least_squares_are_on_by_default(cut: dict[str, int]) -> None:
    smaller = target_architecture(MIXTURE, PruneConfig(**cut))
    assert fits(MIXTURE, smaller, RepairConfig())
    assert not fits(MIXTURE, smaller, RepairConfig(ffn=False, hidden=False))
    assert not fits(MIXTURE, target_architecture(MIXTURE, PruneConfig(num_moe_experts=3)), RepairConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_moe_experts": 6}, "prune.num_moe_experts: 6 is not a size to prune to; the source has 5"),
        ({"num_moe_experts": 1}, "prune.num_moe_experts: 1 are too few, a token is routed to 2; keep 2 or more"),
        ({"moe_ffn_hidden_size": 13}, "prune.moe_ffn_hidden_size: 13 is not a size to prune to; the source has 12"),
        ({"ffn_hidden_size": 6}, "prune.ffn_hidden_size: the layers of qwen2_moe have none; use prune.moe_ffn_hidden"),
    ],
)
def test_targets_that_cannot_be_reached_are_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        target_architecture(MIXTURE, PruneConfig(**config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"])
def test_a_model_without_experts_has_none_to_prune(key: str) -> None:
    with pytest.raises(UserError, match=f"prune.{key}: the layers of llama have none; leave it out"):
        target_architecture(architecture(), PruneConfig(**{key: 2}))


def test_layouts_that_megatron_does_not_train_experts_on_are_refused() -> None:
    with pytest.raises(UserError, match="parallel.sequence_parallel: .* set it to true"):
        Layout(tensor_model_parallel_size=2).check(MIXTURE, 2)
    Layout(tensor_model_parallel_size=2, sequence_parallel=True).check(MIXTURE, 2)
    odd = replace(MIXTURE, moe_shared_expert_intermediate_size=7)
    with pytest.raises(UserError, match="2 does not divide the model's moe_shared_expert_intermediate_size 7"):
        Layout(tensor_model_parallel_size=2, sequence_parallel=True).check(odd, 2)
