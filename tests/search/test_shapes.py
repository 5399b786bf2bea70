"""The shapes of a grid against brute force with parameters counted by hand; the published list of candidates."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.config import BudgetConfig, PruneConfig, SearchConfig, ServingConfig, load_recipe
from minitron_nemo.errors import UserError
from minitron_nemo.preflight import preflight
from minitron_nemo.pruning.target import target_architecture
from minitron_nemo.search.candidates import pruning
from minitron_nemo.search.plan import SearchPlan, plan_search
from minitron_nemo.search.shapes import candidates, grid, shapes
from tests.tiny import LLAMA3_ROPE

RECIPES = Path(__file__).parents[2] / "recipes"
TEACHER = Architecture(
    num_layers=6,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=259,
    max_position_embeddings=512,
    rope_scaling=LLAMA3_ROPE,  # no mapping is hashable: nothing may rely on architectures that are
)
# (layers, heads, FFN, hidden) of 2407.14679, table 19.
TABLE_19 = """
    32 32 12800 5120   32 32 13824 4608   32 48 11520 4608   32 48 16384 4096   31 32 12800 5120
    31 32 16128 4608   31 48 13824 4608   31 48 16384 4096   30 32 12800 5120   30 32 16128 4608
    30 48 13824 4608   30 48 16384 4096   29 32 12800 5120   29 32 16128 4608   29 48 13824 4608
"""


def published() -> set[tuple[int, ...]]:
    numbers = [int(word) for word in TABLE_19.split()]
    return {tuple(numbers[start : start + 4]) for start in range(0, len(numbers), 4)}


def search_of(name: str, *overrides: str) -> SearchPlan:
    return plan_search(preflight(load_recipe(RECIPES / f"{name}.yaml", overrides)))


def quadruples(plan: SearchPlan) -> set[tuple[int, ...]]:
    found = [each.architecture for each in plan.candidates]
    return {(a.num_layers, a.num_attention_heads, a.ffn_hidden_size, a.hidden_size) for a in found}


def llama_parameters(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> tuple[int, int]:
    """All parameters and those without the two embeddings, matrix by matrix."""
    attention = hidden * heads * 8 + 2 * hidden * groups * 8 + heads * 8 * hidden
    inside = layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden
    return inside + 2 * 259 * hidden, inside


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"min_parameters": 90_000, "max_parameters": 150_000},
        {"max_non_embedding_parameters": 60_000},
        {"min_non_embedding_parameters": 60_000, "max_parameters": 160_000, "max_memory_bytes": 290_000},
        {"max_latency_seconds": 4.2e-5},
        {"min_parameters": 120_000, "max_latency_seconds": 7e-5, "max_memory_bytes": 330_000},
    ],
)
def test_the_candidates_are_those_of_brute_force(limits: dict[str, float]) -> None:
    serving = ServingConfig(batch_size=2, prompt_tokens=20, new_tokens=5, peak_flops=1e12, bandwidth=2e10)
    config = SearchConfig(
        num_layers={"min": 2, "max": 6, "divisor": 2},
        hidden_size=[64, 32, 48],
        ffn_hidden_size={"min": 90, "divisor": 32},
        num_attention_heads=[2, 4, 8],
        num_query_groups=[1, 2, 4],
        serving=serving,
        budget=BudgetConfig(**limits),
    )
    expected = set()
    for layers, hidden, ffn, heads, groups in product((2, 4, 6), (32, 48, 64), (96, 128, 160), (2, 4, 8), (1, 2, 4)):
        if heads % groups or heads // groups > 2:  # of two heads a group no more than two can stay
            continue
        if (layers, hidden, ffn, heads, groups) == (6, 64, 160, 8, 4):
            continue  # the teacher
        total, inside = llama_parameters(layers, hidden, ffn, heads, groups)
        cache = 2 * layers * groups * 8 * 2 * (2 * 25)
        attended = sum(21 + token for token in range(4))  # by the passes after the first
        attention = layers * heads * 8 * 4
        first = 2 * (20 * (2 * matrices(layers, hidden, ffn, heads, groups) + attention * 10) + 2 * 259 * hidden)
        seconds = max(first / 1e12, 2 * (total - 259 * hidden) / 2e10)
        for token in range(4):
            context = 21 + token
            arithmetic = 2 * (2 * matrices(layers, hidden, ffn, heads, groups) + 2 * 259 * hidden + attention * context)
            read = 2 * (total - 259 * hidden) + 2 * context * 2 * layers * groups * 8 * 2
            seconds += max(arithmetic / 1e12, read / 2e10)
        assert attended == 90
        figures = {
            "parameters": total,
            "non_embedding_parameters": inside,
            "memory_bytes": 2 * total + cache,
            "latency_seconds": seconds,
        }
        fits = all(
            figures[key[4:]] >= limit if key.startswith("min_") else figures[key[4:]] <= limit
            for key, limit in limits.items()
        )
        if fits:
            expected.add((layers, hidden, ffn, heads, groups, *(round(figures[key], 12) for key in figures)))
    found = {
        (
            each.architecture.num_layers,
            each.architecture.hidden_size,
            each.architecture.ffn_hidden_size,
            each.architecture.num_attention_heads,
            each.architecture.num_query_groups,
            each.costs.parameters,
            each.costs.non_embedding_parameters,
            each.costs.memory_bytes,
            round(each.costs.latency_seconds, 12),
        )
        for each in candidates(grid(TEACHER, PruneConfig(), config), config)
    }
    assert found == expected
    assert expected
    assert not limits or len(expected) < 161  # every budget leaves something out


def matrices(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> int:
    """Entries of the matrices inside the layers."""
    return layers * (hidden * (2 * heads + 2 * groups) * 8 + 3 * hidden * ffn)


def test_nothing_is_listed_before_it_is_asked_for() -> None:
    config = SearchConfig(
        num_layers={"min": 2}, hidden_size={"min": 1}, ffn_hidden_size={"min": 1}, budget=BudgetConfig(max_parameters=1)
    )
    assert next(shapes(grid(TEACHER, PruneConfig(), config)))[1:] == llama_parameters(2, 1, 1, 8, 4)


def test_axes_that_are_not_given_are_as_pruned() -> None:
    config = SearchConfig(hidden_size=[32, 48])
    found = grid(TEACHER, PruneConfig(ffn_hidden_size=96, num_query_groups=2, drop_layers=[1, 2]), config)
    assert {str(axis): sizes for axis, sizes in found.values.items()} == {
        "num_layers": [4],
        "hidden_size": [32, 48],
        "ffn_hidden_size": [96],
        "num_attention_heads": [4],
        "num_query_groups": [2],
    }


@pytest.mark.parametrize(
    ("prune", "pairs"),
    [
        ({}, [(2, 1), (4, 2), (8, 4)]),  # all heads of the groups that stay
        ({"num_query_groups": 2}, [(2, 1), (4, 2), (8, 4)]),
        ({"num_attention_heads": 4}, [(4, 2), (4, 4)]),
    ],
)
def test_without_sizes_of_their_own_heads_are_as_pruned(prune: dict[str, int], pairs: list[tuple[int, int]]) -> None:
    groups = grid(TEACHER, PruneConfig(**prune), SearchConfig(num_query_groups=[1, 2, 4]))
    assert [(a.num_attention_heads, a.num_query_groups) for a, _, _ in shapes(groups)] == pairs
    assert groups.size == 3


def test_an_untied_student_is_counted_with_its_two_embeddings() -> None:
    """`prune.untie` gives the candidates an output weight that the teacher has not."""
    teacher = replace(TEACHER, share_embeddings_and_output_weights=True)
    prune, config = PruneConfig(untie=True), SearchConfig(hidden_size=[32, 64], num_layers=[2, 6])
    found = list(candidates(grid(teacher, prune, config), config))
    assert len(found) == 3  # without the teacher's own sizes, untied or not
    for each in found:
        a = each.architecture
        total, inside = llama_parameters(a.num_layers, a.hidden_size, 160, 8, 4)
        assert (each.costs.parameters, each.costs.non_embedding_parameters) == (total, inside)
        assert each.costs.memory_bytes == 2 * total + 2 * a.num_layers * 4 * 8 * 2 * (2048 + 256)
        assert target_architecture(teacher, pruning(each, prune)) == a


def test_an_expansion_is_the_number_that_is_written() -> None:
    """4.15 x 1920 is 7968; the float next to 4.15 makes it 7968.000000000001."""
    teacher = replace(TEACHER, hidden_size=1920, ffn_hidden_size=8000)
    config = SearchConfig(ffn_expansion=[4.15, 0.05, 4.15, 5.0])
    found = grid(teacher, PruneConfig(), config)
    assert [a.ffn_hidden_size for a, _, _ in shapes(found)] == [96, 7968]
    assert found.size == 3


def test_a_depth_of_one_layer_is_for_methods_that_may_drop_the_first_or_the_last() -> None:
    config = SearchConfig(num_layers=[1, 3])
    for method in ("leave_one_out", "greedy", "best_block"):
        assert grid(TEACHER, PruneConfig(depth_method=method), config).values[Axis.LAYERS] == [1, 3]
    with pytest.raises(UserError, match=r"search\.num_layers: 1 is too few, contiguous keeps the first"):
        grid(TEACHER, PruneConfig(depth_method="contiguous"), config)


def test_the_published_candidates_for_8b_come_out_of_their_grid() -> None:
    """Table 19 of 2407.14679, which prints the grid's second hidden size as 4680: all its shapes have 4608."""
    plan = search_of("nemotron4_15b_to_minitron_8b")
    assert quadruples(plan) == published()
    assert (plan.grid_size, len(plan.candidates)) == (160, 15)


def test_what_the_published_window_of_five_percent_gives() -> None:
    """Around Minitron 8B's own size it holds the 15 of table 19 and five more, which the paper does not list."""
    window = [f"search.budget.{end}_parameters={8.2717e9 * factor}" for end, factor in (("min", 0.95), ("max", 1.05))]
    assert quadruples(search_of("nemotron4_15b_to_minitron_8b", *window)) - published() == {
        (32, 48, 13824, 4608),
        (32, 32, 16128, 4608),
        (29, 48, 16128, 4608),
        (29, 48, 12800, 5120),
        (29, 32, 18432, 4608),
    }
    # With 4680 as printed, no shape of hidden size 4608 can come out.
    narrow = ("search.hidden_size=[4096,4680,5120,5632,6144]", "parallel.tensor_model_parallel_size=4")
    printed = search_of("nemotron4_15b_to_minitron_8b", *window, *narrow)
    assert published() & quadruples(printed) == {shape for shape in published() if shape[3] != 4608}


def test_the_grid_for_4b_gives_as_many_candidates_as_published_and_the_chosen_one() -> None:
    plan = search_of("nemotron4_15b_to_minitron_4b")
    assert len(plan.candidates) == 18
    assert (32, 24, 9216, 3072) in quadruples(plan)


def test_the_documents_promise_latencies_of_a_recipe_that_names_a_device() -> None:
    page = (RECIPES.parent / "docs" / "search.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("    minitron plan ")]
    name = Path(line.split()[2]).stem
    latencies = {each.costs.latency_seconds is not None for each in search_of(name).candidates}
    assert latencies == {"latency" in line}


def test_the_section_that_the_documents_show_is_one_for_llama_31_8b() -> None:
    page = (RECIPES.parent / "docs" / "search.md").read_text()
    block = [line for line in page.splitlines() if line.startswith("    ") and not line.startswith("    minitron")]
    section = yaml.safe_load("\n".join(line for line in block if "tail" not in line))["search"]
    plan = search_of("llama31_8b_to_4b_width", f"search={json.dumps(section)}")
    assert (32, 32, 9216, 3072) in quadruples(plan)
    assert plan.entrants == [len(plan.candidates), -(-len(plan.candidates) // 2)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_size": 64}, "search.hidden_size: 64 is neither a list of sizes nor"),
        ({"hidden_size": []}, "search.hidden_size: [] is neither"),
        ({"hidden_size": [65]}, "search.hidden_size: 65 is not a size to prune to; the source has 64"),
        ({"hidden_size": [32.5]}, "search.hidden_size: 32.5 is not a size"),
        ({"hidden_size": {"min": 32, "step": 8}}, "search.hidden_size.step: no such key"),
        ({"hidden_size": {"divisor": 8}}, "search.hidden_size.min: required"),
        ({"hidden_size": {"min": 32, "divisor": 0}}, "search.hidden_size.divisor: 0 must be a whole number"),
        ({"hidden_size": {"min": 33, "max": 39, "divisor": 8}}, "no multiple of 8 lies between 33 and 39"),
        ({"num_layers": [1, 2]}, "search.num_layers: 1 is too few"),
        ({"num_attention_heads": [6]}, "search.num_attention_heads: 6 is no multiple"),
        ({"num_query_groups": [2], "num_attention_heads": [8]}, "search.num_attention_heads: 8 is no multiple"),
        ({"ffn_expansion": [2.0], "ffn_hidden_size": [96]}, "search.ffn_hidden_size is given too"),
        ({"ffn_expansion": [0.0]}, "search.ffn_expansion: [0.0] must be"),
        ({"ffn_expansion": [float("inf")]}, "search.ffn_expansion: [inf] must be"),
        ({"ffn_expansion": [2.51]}, "search.ffn_expansion: 2.51 x hidden_size 64 is 160.64"),
        ({"num_moe_experts": [4]}, "search.num_moe_experts: the layers of llama have none; leave it out"),
    ],
)
def test_a_grid_that_the_teacher_cannot_be_cut_to_is_refused(keys: dict[str, Any], words: str) -> None:
    config = SearchConfig(**keys)
    with pytest.raises(UserError) as error:
        list(candidates(grid(TEACHER, PruneConfig(), config), config))
    assert words in str(error.value)


def test_a_list_of_layers_to_drop_and_depths_are_not_both_followed() -> None:
    with pytest.raises(UserError, match=r"search\.num_layers: prune\.drop_layers"):
        grid(TEACHER, PruneConfig(drop_layers=[1]), SearchConfig(num_layers=[4]))
