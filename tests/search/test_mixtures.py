"""The grid of a mixture of experts against brute force with everything counted by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from minitron_nemo.arch import Architecture
from minitron_nemo.config import BudgetConfig, PruneConfig, SearchConfig, ServingConfig
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.target import target_architecture
from minitron_nemo.search.candidates import pruning
from minitron_nemo.search.shapes import candidates, grid

MIXTURE = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=259,
    max_position_embeddings=512,
    num_moe_experts=8,
    moe_ffn_hidden_size=48,
    moe_router_topk=2,
    family="qwen3_moe",
    model_type="qwen3_moe",
)


@pytest.mark.parametrize("limits", [{}, {"max_memory_bytes": 90_000}, {"max_latency_seconds": 2e-5}])
def test_the_candidates_of_a_mixture_are_those_of_brute_force(limits: dict[str, float]) -> None:
    """Qwen3-MoE with two experts a token; a pass of so many tokens reads the experts that it is expected to meet."""
    config = SearchConfig(
        num_layers=[2, 4],
        hidden_size=[16, 32],
        num_moe_experts=[2, 3, 8],
        moe_ffn_hidden_size={"min": 16, "divisor": 16},
        num_query_groups=[1, 2],
        serving=ServingConfig(batch_size=2, prompt_tokens=20, new_tokens=3, peak_flops=1e12, bandwidth=2e10),
        budget=BudgetConfig(**limits),
    )
    expected = set()
    for layers, hidden, experts, ffn, (heads, groups) in product(
        (2, 4),
        (16, 32),
        (2, 3, 8),
        (16, 32, 48),
        ((2, 1), (4, 2)),  # all heads of the groups that stay
    ):
        if (layers, hidden, experts, ffn, heads) == (4, 32, 8, 48, 4):
            continue  # the teacher
        dense = hidden * (2 * heads + 2 * groups) * 8 + experts * hidden  # attention and router
        norms = 2 * hidden + 2 * 8
        an_expert = 3 * hidden * ffn
        total = layers * (dense + norms + experts * an_expert) + hidden + 2 * 259 * hidden
        active = total - layers * (experts - 2) * an_expert
        cache = 2 * layers * groups * 8 * 2 * (2 * 23)
        # Bytes of the weights that passes over 40 and over 2 tokens read: of an expert, if a token has come to it.
        whole, in_experts = total - 259 * hidden, layers * experts * an_expert
        first, later = (2 * (whole - in_experts * (1 - 2 / experts) ** tokens) for tokens in (40, 2))
        attention = layers * heads * 8 * 4
        matrices = layers * (dense + 2 * an_expert)
        prompt = 2 * (20 * (2 * matrices + attention * 10) + 2 * 259 * hidden)
        seconds = max(prompt / 1e12, first / 2e10)
        for context in (21, 22):
            arithmetic = 2 * (2 * matrices + 2 * 259 * hidden + attention * context)
            keys = 2 * context * 2 * layers * groups * 8 * 2
            seconds += max(arithmetic / 1e12, (later + keys) / 2e10)
        if 2 * total + cache <= limits.get("max_memory_bytes", 1e9) and seconds <= limits.get("max_latency_seconds", 1):
            sizes = (layers, hidden, experts, ffn, heads, groups)
            expected.add((*sizes, total, active, 2 * total + cache, round(seconds, 12)))
    choice = grid(MIXTURE, PruneConfig(), config)
    assert choice.size == 2 * 2 * 3 * 3 * 2
    found = set()
    for each in candidates(choice, config):
        a, costs = each.architecture, each.costs
        shape = (a.num_layers, a.hidden_size, a.num_moe_experts, a.moe_ffn_hidden_size)
        heads_and_groups = (a.num_attention_heads, a.num_query_groups)
        counts = (costs.parameters, costs.active_parameters, costs.memory_bytes, round(costs.latency_seconds, 12))
        found.add((*shape, *heads_and_groups, *counts))
        assert each.name == "l{}-h{}-e{}-f{}-a{}-g{}".format(*shape, *heads_and_groups)
        assert target_architecture(MIXTURE, pruning(each, PruneConfig())) == a
    assert found == expected
    assert 0 < len(expected) < 71 if limits else len(expected) == 71


def test_a_mixture_begins_with_what_prune_has_and_its_shared_expert_is_an_axis() -> None:
    teacher = replace(
        MIXTURE, family="qwen2_moe", model_type="qwen2_moe", moe_shared_expert_intermediate_size=80, num_layers=2
    )
    config = SearchConfig(moe_shared_expert_intermediate_size=[40, 80])
    found = list(candidates(grid(teacher, PruneConfig(num_moe_experts=6), config), config))
    assert [each.name for each in found] == ["l2-h32-e6-f48-s40-a4-g2", "l2-h32-e6-f48-s80-a4-g2"]
    assert found[1].costs.parameters - found[0].costs.parameters == 2 * 3 * 32 * 40


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ffn_hidden_size": [32]}, "search.ffn_hidden_size: the layers of qwen3_moe have none; use search.moe_ffn"),
        ({"ffn_expansion": [1.0]}, "search.ffn_expansion: the layers of qwen3_moe have none; use search.moe_ffn"),
        ({"moe_shared_expert_intermediate_size": [8]}, "have none; leave it out"),
        ({"num_moe_experts": [1, 4]}, "search.num_moe_experts: 1 are too few, a token is routed to 2; begin with 2"),
        ({"moe_ffn_hidden_size": [49]}, "search.moe_ffn_hidden_size: 49 is not a size to prune to"),
    ],
)
def test_a_grid_that_a_mixture_cannot_be_cut_to_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        grid(MIXTURE, PruneConfig(), SearchConfig(**keys))
    assert words in str(error.value)
