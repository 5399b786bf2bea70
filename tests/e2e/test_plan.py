"""What `minitron plan` says of a recipe: shapes, tokens, FLOPs, costs of a search, by hand and as published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from minitron_nemo.cli import main


def test_plan_shows_what_a_search_will_do(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    overrides = ("prune.num_layers=null", "search.num_layers=[2,3]", "search.hidden_size=[32,48]", "search.keep=0.3")
    assert main(["plan", str(recipe), *overrides, "search.rungs=[5,10]"]) == 0
    printed = capsys.readouterr().out
    assert "4 candidates within the budget, of 4 in the grid" in printed
    assert "4 of 5 updates, 2 of 10 updates" in printed
    assert main(["plan", str(recipe), *overrides, "search.rungs=[5,10]", "--json"]) == 0
    search = json.loads(capsys.readouterr().out)["search"]
    tokens = (4 * 5 + 2 * 10) * 4 * 64
    assert search["tokens"] == {"depth": 8 * 64, "repair": 4 * 16 * 64, "distillation": tokens}
    assert search["candidates"][0]["name"] == "l3-h48-f64-a8-g4"

    def inside(layers: int, hidden: int, ffn: int) -> int:
        """FLOPs of a token among 64: matrices of layers, attention over 32 on average."""
        return 2 * layers * (hidden * (8 + 4 + 4 + 8) * 8 + 3 * hidden * ffn) + layers * 4 * 32 * 64

    def forward(layers: int, hidden: int, ffn: int) -> int:
        return inside(layers, hidden, ffn) + 2 * 259 * hidden

    updates = [forward(4, 64, 96) + 3 * forward(layers, hidden, 64) for layers in (3, 2) for hidden in (48, 32)]
    largest = sorted(updates)[2:]
    assert search["flops"]["distillation"] == 4 * 64 * (5 * sum(updates) + 10 * sum(largest))
    # Least squares sum products of 64 channels and those that stay, of 96 neurons and the 64 that stay.
    sums = sum(layers * 2 * (2 * (64 + hidden) * hidden + 96 * 64) for layers in (3, 2) for hidden in (48, 32))
    assert search["flops"]["repair"] == 16 * 64 * (4 * inside(4, 64, 96) + sums)
    # Greedy, down to two layers, which serves three: 4 + 3 + 2 + 1 evaluations of a layer, then 1 + 2 + 2 + 0.
    assert search["depth_search"] == {"models": 8, "layer_evaluations": 15, "forward_passes": 3.75}
    assert search["flops"]["depth"] == 8 * 64 * (inside(4, 64, 96) * 15 // 4 + 8 * 2 * 259 * 64)
    assert "8 models, 3.75 passes through the layers and 8 through the output, each of 8 sequences" in printed
    # In fp32. One is trained at a time: its latest, best and next checkpoint, of weights and thrice as much of AdamW's.
    sizes = [4 * candidate["parameters"] for candidate in search["candidates"]]
    matrices = [
        4 * layers * (2 * (64 + 1) * hidden + (96 - 64) * 64) for layers in (3, 2) for hidden in (48, 32)
    ]  # the output is tied: its norm has no reader of its own
    assert {each["what"]: each["total"] for each in search["disk"]} == {
        "student, pruned (4)": sum(sizes),
        "distillation, checkpoints (1)": 3 * 4 * max(sizes),
        "student, distilled (4)": sum(sizes),
        "repair, matrices (4)": sum(matrices),
    }
    assert f"{'disk, search':<30}at most " in printed
    one_rung = ("search.rungs=[5]", "search.top_k=2", "search.launcher=slurm", "search.jobs=8", "--json")
    assert main(["plan", str(recipe), *overrides, *one_rung]) == 0
    disk = {each["what"]: each["total"] for each in json.loads(capsys.readouterr().out)["search"]["disk"]}
    assert disk["distillation, checkpoints (2)"] == 3 * 4 * sum(sizes[:2])
    assert disk["student, distilled (2)"] == sum(sizes[:2])


def test_a_recipe_may_end_with_the_cut(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    assert main(["plan", str(recipe), "train.steps=0", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["tokens_per_step"], plan["tokens"]["distillation"], plan["flops"]["distillation"]) == (0, 0, 0)
    assert main(["plan", str(recipe), "train.steps=0"]) == 0
    assert "nothing: no distillation" in capsys.readouterr().out


def test_plan_shows_both_worlds(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    """The batch divides over the student's two ranks, not over the job's three."""
    overrides = ["teacher.placement=separate", "teacher.layout={}", "teacher.processes=1", "train.global_batch_size=2"]
    assert main(["plan", str(recipe), *overrides, "cluster.processes_per_node=3"]) == 2
    assert "global_batch_size: 2 is not a multiple" in capsys.readouterr().err  # of the correction, on all ranks
    arguments = ["plan", str(recipe), *overrides, "cluster.processes_per_node=3", "teacher.correction.steps=0"]
    assert main(arguments) == 0
    assert "student: 2 of tp=1 pp=1 dp=2, teacher: 1 of tp=1 pp=1 dp=1" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["distillation"]["student"] == {"processes": 2, "data_parallel_size": 2}


def test_plan_says_what_groups_of_zeros_cost(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    """Two heads of each of three groups on TP2; the teacher's four groups divide."""
    tp2 = ["parallel.tensor_model_parallel_size=2", "cluster.processes_per_node=2", "prune.num_query_groups=3"]
    assert main(["plan", str(recipe), *tp2]) == 0
    said = capsys.readouterr().out
    assert "student, padded           to 8 heads in 4 groups, by zeros: " in said and "teacher, padded" not in said
    assert main(["plan", str(recipe), *tp2, "--json"]) == 0
    padding = json.loads(capsys.readouterr().out)["padding"]
    assert padding["teacher"] is None and padding["student"]["num_query_groups"] == 4


def test_plan_says_what_measuring_without_layers_costs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["prune.depth_method=leave_one_out", "prune.depth.samples=3"]
    assert main(["plan", str(recipe), *overrides, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # Of four layers: 4 evaluations of the whole model, and 3, 2, 1 and 0 behind the layer that is left out.
    assert plan["depth_search"] == {"models": 5, "layer_evaluations": 10, "forward_passes": 2.5}
    assert plan["tokens"]["depth"] == 3 * 64 and plan["flops"]["depth"] > 2.5 * plan["flops"]["calibration"] * 3 / 8
    assert main(["plan", str(recipe), *overrides]) == 0
    assert "5 models, 2.5 passes through the layers and 5 through the output, each of 3 seq" in capsys.readouterr().out
    assert main(["plan", str(recipe), "prune.depth_method=block_influence", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["depth_search"] is None and plan["tokens"]["depth"] == 0


@pytest.mark.parametrize(
    ("name", "student", "non_embedding"),
    [
        ("llama31_8b_to_4b_width", 4.513e9, 3.725e9),
        ("llama31_8b_to_4b_depth", 4.540e9, 3.490e9),
        ("mistral_nemo_12b_to_8b", 8.414e9, 7.340e9),
        ("nemotron4_15b_to_minitron_8b", 8.272e9, 6.175e9),
        ("nemotron4_15b_to_minitron_4b", 4.191e9, 2.618e9),
    ],
)
@pytest.mark.fast_cases(1)
def test_plan_gives_the_published_parameter_counts(
    capsys: pytest.CaptureFixture[str], name: str, student: float, non_embedding: float
) -> None:
    root = Path(__file__).parents[2]
    assert main(["plan", str(root / "recipes" / f"{name}.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["student"]["parameters"] == pytest.approx(student, rel=2e-4)
    assert plan["student"]["non_embedding_parameters"] == pytest.approx(non_embedding, rel=2e-4)


@pytest.mark.slow
def test_the_shipped_stages_have_the_published_parameter_counts(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "nemotron4_15b_to_8b_to_4b.yaml"
    assert main(["plan", str(recipe), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    students = [stage["student"]["non_embedding_parameters"] for stage in stages.values()]
    assert students == pytest.approx([6.175e9, 2.618e9], rel=2e-4)
    assert stages["minitron_4b"]["source"] == stages["minitron_8b"]["student"]
    assert stages["minitron_4b"]["teacher"] == stages["minitron_8b"]["teacher"]


@pytest.mark.slow
def test_plan_of_a_mixture_says_what_a_token_meets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "llama31_8b_to_4b_width.yaml").read_text())
    recipe["model"]["architecture"] = {
        "num_layers": 48,
        "hidden_size": 2048,
        "ffn_hidden_size": 768,
        "moe_ffn_hidden_size": 768,
        "num_moe_experts": 128,
        "moe_router_topk": 8,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "kv_channels": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "family": "qwen3_moe",
        "model_type": "qwen3_moe",
    }
    recipe["prune"] = {"num_moe_experts": 96}
    recipe["parallel"] = {"pipeline_model_parallel_size": 4}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "8 of 128 experts of ffn 768" in shown and "8 of 96 experts of ffn 768" in shown
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["teacher"]["active_parameters"] == pytest.approx(3.353e9, rel=2e-4)
    gone = 48 * 32 * (3 * 2048 * 768 + 2048)  # experts, and rows of routers
    assert plan["teacher"]["parameters"] - plan["student"]["parameters"] == gone
    tensor_parallel = ("parallel.pipeline_model_parallel_size=1", "parallel.tensor_model_parallel_size=4")
    assert "parallel.sequence_parallel" in refused("plan", str(path), *tensor_parallel)
    assert "expert_model_parallel_size" in refused("plan", str(path), "parallel.expert_model_parallel_size=2")
