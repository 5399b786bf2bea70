"""Repaired mixtures of experts: maps and students against fp64 on Hugging Face's activations, at every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.arch.matrix import REPLACE, Matrix
from minitron_nemo.checkpoint.dense import DenseMaps
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.checkpoint.verify import verify
from minitron_nemo.config import PruneConfig, RepairConfig
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.disk import matrix_bytes
from minitron_nemo.pruning import repair as step
from minitron_nemo.pruning.repair import repair_warnings
from minitron_nemo.report.results import cuts
from tests.families import MIXTURES, fused_like, unfused, write_tiny
from tests.importance.hugging_face import activations, load, mixtures_of, rms_normed
from tests.importance.mixture import starve
from tests.importance.test_collect import LAYOUTS, batch
from tests.importance.test_second_moments import assert_solves
from tests.pool import run_distributed
from tests.pruning.slicing import slice_hugging_face
from tests.pruning.test_prune import logits_of, prune_together
from tests.pruning.test_repair import Text, folded, passes_of_repair, random_text, repair_together
from tests.pruning.test_rotate import assert_near, hugging_face_logits

LAYERS = 3
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
LAYER = "decoder.layers.{}."
ROUTER, QKV = LAYER + "mlp.router.weight", LAYER + "self_attention.linear_qkv.weight"
SHARED, EXPERT = LAYER + "mlp.shared_experts.linear_fc2.weight", LAYER + "mlp.experts.experts.{}.linear_fc2.weight"
SOME = [pytest.param(family, marks=[pytest.mark.soak] * (family == "qwen3_moe")) for family in MIXTURES]


class Repaired(NamedTuple):
    """A teacher in two formats and the directory of its repaired Plan."""

    hugging_face: Path
    teacher: Path
    directory: Path

    @property
    def plan(self) -> Plan:
        return Plan.load(self.directory / "plan.json")

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """By name the maps [n, k] from what tensors of the student read to what the teacher's do, gains included."""
        file = load_file(self.directory / "plan.safetensors")
        found = {name: matrix.double().numpy() for name, matrix in folded(file).items()}
        for name in (name for name in found if "linear_fc2" in name):
            kept, added = kept_neurons(self.plan, name), found[name]
            found[name] = np.zeros((len(added) + len(kept), len(kept)))
            found[name][kept, range(len(kept))] = 1
            found[name][np.setdiff1d(np.arange(len(found[name])), kept)] = added
        return found


def kept_neurons(plan: Plan, name: str) -> list[int]:
    """Of the linear_fc2 of a student's expert or shared expert."""
    words = name.split(".")
    layer = int(words[2])
    if "shared_experts" in words:
        assert plan.kept_shared_ffn is not None
        return list(plan.kept_shared_ffn[layer])
    assert plan.kept_moe_ffn is not None
    return list(plan.kept_moe_ffn[layer][int(words[6])])


def experts_of(plan: Plan, layer: int) -> list[int]:
    """The teacher's experts that stay in a layer of the student."""
    return list(range(plan.source.size(Axis.EXPERTS)) if plan.kept_experts is None else plan.kept_experts[layer])


def a_plan(source: Architecture, hidden_size: int = 40, rotated: bool = False, cut_more: bool = True) -> Plan:
    """Hidden channels go; with `cut_more` also a layer, an expert, and neurons of every expert, irregularly."""
    generator = np.random.default_rng(3)

    def choose(count: int, total: int) -> tuple[int, ...]:
        return tuple(sorted(generator.permutation(total)[:count].tolist()))

    sizes = {Axis.HIDDEN: hidden_size}
    kept: dict[str, Any] = {"kept_layers": tuple(range(LAYERS))}
    if cut_more:
        experts, shared = source.size(Axis.EXPERTS) - 1, source.has(Axis.SHARED_FFN)
        sizes |= {Axis.LAYERS: LAYERS - 1, Axis.EXPERTS: experts, Axis.MOE_FFN: 56}
        kept = {
            "kept_layers": (0, 2),
            "kept_experts": tuple(choose(experts, experts + 1) for _ in range(2)),
            "kept_moe_ffn": tuple(tuple(choose(56, 96) for _ in range(experts)) for _ in range(2)),
        }
        if shared:
            sizes[Axis.SHARED_FFN] = 48
            kept["kept_shared_ffn"] = (choose(48, 80), choose(48, 80))
    channels = None if rotated else choose(hidden_size, 64)
    return Plan(source, source.resized(sizes), kept_hidden=channels, rotated=rotated, **kept)


def repaired(
    directory: Path,
    family: str,
    change: Callable[[dict[str, torch.Tensor]], None] = lambda weights: None,
    text: Text | None = None,
    config: RepairConfig | None = None,
    **cut: Any,
) -> Repaired:
    """A tiny model with its weights changed by `change`, its Plan repaired on `text` in one process."""
    hugging_face = write_tiny(family, directory / "hf", num_layers=LAYERS)
    weights = load_file(hugging_face / "model.safetensors")
    change(weights)
    save_file(weights, hugging_face / "model.safetensors", {"format": "pt"})
    convert(hugging_face, directory / "teacher", "megatron", progress=False)
    plan = a_plan(Architecture.load(directory / "teacher"), **cut)
    arguments = directory / "teacher", Layout(), plan, config or RepairConfig(), directory / "plan", text
    run_distributed(1, repair_together, *arguments)
    return Repaired(hugging_face, directory / "teacher", directory / "plan")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Repaired]:
    made: dict[str, Repaired] = {}

    def case(family: str) -> Repaired:
        if family not in made:
            made[family] = repaired(tmp_path_factory.mktemp(family), family)
        return made[family]

    return case


def reads(found: Repaired, tokens: torch.Tensor, weights: torch.Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By the name of the matrix, what its readers read in the teacher, x [t, n], and will read, y [t, k]; fp64.

    What experts read is times the router's weight of a token, or the gate's. Norms are without their gains.
    """
    plan, model, counts = found.plan, load(found.hugging_face), weights.numpy() != 0
    seen = activations(model, tokens)
    mixtures = mixtures_of(found.hugging_face, model, seen)
    result = {}
    residuals = {OUTPUT: seen["residuals"][-1]}
    for new, old in enumerate(plan.kept_layers):
        residuals |= {QKV.format(new): seen["residuals"][2 * old], ROUTER.format(new): seen["residuals"][2 * old + 1]}
        for place, expert in enumerate(experts_of(plan, new)):
            each = mixtures[old][expert]
            result[EXPERT.format(new, place)] = each.neurons[counts & (each.weights != 0)]
        if plan.kept_shared_ffn is not None:
            states = seen["norms"][2 * old + 1]
            row = load_file(found.hugging_face / "model.safetensors")[
                f"model.layers.{old}.mlp.shared_expert_gate.weight"
            ]
            gates = 1 / (1 + np.exp(-states @ row[0].double().numpy()))
            result[SHARED.format(new)] = (gates[..., None] * seen["shared"][old])[counts]
    result = {name: (x, x[:, kept_neurons(plan, name)]) for name, x in result.items()}
    epsilon = model.config.rms_norm_eps
    for name, states in residuals.items():
        x = states[counts]
        result[name] = rms_normed(x, epsilon), rms_normed(x[:, list(plan.kept_hidden)], epsilon)
    return result


def gains(found: Repaired) -> dict[str, np.ndarray]:
    """The teacher's, of the norms, by the name of what reads them."""
    weights, result = load_file(found.hugging_face / "model.safetensors"), {}
    for new, old in enumerate(found.plan.kept_layers):
        result[QKV.format(new)] = weights[f"model.layers.{old}.input_layernorm.weight"].numpy()
        result[ROUTER.format(new)] = weights[f"model.layers.{old}.post_attention_layernorm.weight"].numpy()
    return result | {OUTPUT: weights["model.norm.weight"].numpy()}


@pytest.mark.parametrize("family", SOME)
def test_maps_are_the_least_squares_solutions_on_hugging_faces_activations(
    family: str, cases: Callable[[str], Repaired]
) -> None:
    found = cases(family)
    maps, plan, before = found.maps, found.plan, gains(found)
    expected = reads(found, *batch())
    experts = plan.target.size(Axis.EXPERTS)
    assert maps.keys() == expected.keys() and len(maps) == 2 * (2 + experts + (family == "qwen2_moe")) + 1
    for name, (x, y) in expected.items():
        if name in before:
            assert_solves(x, y, np.array(plan.kept_hidden), 0.01, maps[name] / before[name][:, None])
        else:
            few = max(1.0, 56 / len(x)) if ".experts." in name else 1.0
            assert_solves(x, y, np.array(kept_neurons(plan, name)), 0.01 * few**3, maps[name])


LAYOUTS_OF = {  # the first of each are those that `make test` runs
    "mixtral": ["PP2", "TP2 SP", "DP2"],
    "qwen2_moe": ["TP2 SP DP2", "TP2 SP", "DP2", "PP2"],
}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=pytest.mark.soak if number else pytest.mark.slow)
        for family, layouts in LAYOUTS_OF.items()
        for number, layout in enumerate(layouts)
    ],
)
def test_maps_do_not_depend_on_the_layout(family: str, layout: str, tmp_path: Path) -> None:
    """To 1e-5 of the largest entry, where several tokens a column come to each expert; to 1.2e-5 where one does."""
    text = batch(sequences=24)
    found = repaired(tmp_path, family, text=text)
    processes, on = LAYOUTS[layout]
    arguments = found.teacher, on, a_plan(found.plan.source), RepairConfig(), tmp_path / "spread", text
    run_distributed(processes, repair_together, *arguments)
    other = found._replace(directory=tmp_path / "spread")
    assert replace(other.plan, matrices={}) == replace(found.plan, matrices={})
    maps = other.maps
    for name, matrix in found.maps.items():
        np.testing.assert_allclose(maps[name], matrix, rtol=0, atol=1e-5 * np.abs(matrix).max(), err_msg=name)


def formula_student(found: Repaired, destination: Path) -> Path:
    """Hugging Face's model with weights by the formula in fp64: P^T W M, P the selection or the rotation."""
    plan, teacher = found.plan, load_file(found.hugging_face / "model.safetensors")
    slice_hugging_face(found.hugging_face, plan, destination)
    before = unfused({name: w.double() for name, w in teacher.items()}, 0, 0)
    maps = {name: torch.from_numpy(matrix) for name, matrix in found.maps.items()}
    channels = torch.eye(64).double()[:, list(plan.kept_hidden or ())]
    maps.setdefault(EMBEDDING, channels)
    after = {
        "model.embed_tokens.weight": before["model.embed_tokens.weight"] @ maps[EMBEDDING],
        "model.norm.weight": torch.ones(plan.target.hidden_size),
        "lm_head.weight": before["lm_head.weight"] @ maps[OUTPUT],
    }
    for new, old in enumerate(plan.kept_layers):
        for name, weight in before.items():
            if name.startswith(f"model.layers.{old}."):
                module = name.removeprefix(f"model.layers.{old}.")
                made = of_layer(plan, maps, new, module, weight)
                after |= {f"model.layers.{new}.{theirs}": tensor for theirs, tensor in made.items()}
    final = {name: weight.float().contiguous() for name, weight in fused_like(teacher, after).items()}
    save_file(final, destination / "model.safetensors", {"format": "pt"})
    config = json.loads((destination / "config.json").read_text()) | {"hidden_size": plan.target.hidden_size}
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def of_layer(
    plan: Plan, maps: dict[str, torch.Tensor], layer: int, name: str, weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A tensor of the teacher's layer in the student, under Qwen3-MoE's name; nothing of an expert that goes."""
    experts = experts_of(plan, layer)
    neurons: Any = None
    down = ""
    if name.startswith("mlp.experts."):
        number = int(name.split(".")[2])
        if number not in experts:
            return {}
        place = experts.index(number)
        name = name.replace(f"experts.{number}.", f"experts.{place}.")
        neurons, down = plan.kept_moe_ffn and plan.kept_moe_ffn[layer][place], EXPERT.format(layer, place)
    elif "shared_expert." in name:
        neurons, down = plan.kept_shared_ffn and plan.kept_shared_ffn[layer], SHARED.format(layer)
    if name.endswith("layernorm.weight"):
        weight = torch.ones(plan.target.hidden_size)
    elif name in [f"self_attn.{letter}_proj.weight" for letter in "qkv"]:
        weight = weight @ maps[QKV.format(layer)]
    elif name == "self_attn.o_proj.weight":
        weight = maps[EMBEDDING].t() @ weight
    elif name == "mlp.gate.weight":
        weight = weight[experts] @ maps[ROUTER.format(layer)]
    elif name.endswith("down_proj.weight"):
        weight = maps[EMBEDDING].t() @ weight
        weight = weight @ maps[down] if down in maps else weight
    elif name.startswith("mlp."):  # gates and ways up of experts, and the gate of a shared one
        rows = weight if neurons is None or name.endswith("expert_gate.weight") else weight[list(neurons)]
        weight = rows @ maps[ROUTER.format(layer)]
    return {name: weight}


@pytest.mark.parametrize("rotated", [False, True], ids=["selected", "rotated"])
@pytest.mark.parametrize("family", SOME)
@pytest.mark.fast_cases(1)
def test_a_repaired_student_has_the_logits_of_hugging_faces_model_by_the_formula(
    family: str, rotated: bool, cases: Callable[[str], Repaired], tmp_path: Path
) -> None:
    """In Megatron and after export, and `verify` says that every bit is the Plan's."""
    found = repaired(tmp_path, family, rotated=True) if rotated else cases(family)
    run_distributed(2, prune_together, found.teacher, found.plan, tmp_path / "student")
    convert(tmp_path / "student", tmp_path / "export", "hf", progress=False)
    assert verify(found.teacher, tmp_path / "student", progress=False) is None
    tokens, _ = batch()
    expected = hugging_face_logits(formula_student(found, tmp_path / "formula"), tokens)
    assert_near(run_distributed(1, logits_of, tmp_path / "student", tokens)[0], expected)
    assert_near(hugging_face_logits(tmp_path / "export", tokens), expected)
    assert np.abs(expected - hugging_face_logits(found.hugging_face, tokens)).max() > 0.1


@pytest.mark.parametrize("family", SOME)
@pytest.mark.fast_cases(1)
def test_a_rotation_of_all_channels_changes_no_logits(family: str, tmp_path: Path) -> None:
    """Router, experts, shared expert and its gate all read the rotated stream, and experts write it."""
    found = repaired(tmp_path, family, hidden_size=64, rotated=True, cut_more=False)
    run_distributed(1, prune_together, found.teacher, found.plan, tmp_path / "student")
    tokens, _ = batch()
    expected = hugging_face_logits(found.hugging_face, tokens)
    assert_near(run_distributed(1, logits_of, tmp_path / "student", tokens)[0], expected)


def test_one_matrix_serves_all_that_read_a_norm_and_its_file_is_of_the_planned_size(
    cases: Callable[[str], Repaired],
) -> None:
    found = cases("qwen2_moe")
    plan, file = found.plan, found.directory / "plan.safetensors"
    width = [name for name, matrix in plan.matrices.items() if matrix.kind == REPLACE]
    assert sorted(width) == sorted([OUTPUT, *(name.format(layer) for layer in range(2) for name in (QKV, ROUTER))])
    planned = matrix_bytes(plan.source, plan.target, PruneConfig())
    assert 0 < file.stat().st_size - planned < 8192  # the header
    # Of a layer: queries, the router, four experts' two matrices, the shared one's two and its gate; and the output.
    assert f"{2 * (1 + 1 + 2 * 4 + 3) + 1} weight matrices fitted by least squares" in cuts(plan)


def test_an_expert_that_no_token_comes_to_has_the_plain_cut(tmp_path: Path) -> None:
    found = repaired(tmp_path, "mixtral", lambda weights: starve(weights, expert=2))
    plan, maps = found.plan, found.maps
    kept = [experts_of(plan, layer) for layer in range(2)]
    starved = [EXPERT.format(layer, experts.index(2)) for layer, experts in enumerate(kept) if 2 in experts]
    assert starved
    for name in (name for name in maps if "linear_fc2" in name):
        added = np.delete(maps[name], kept_neurons(plan, name), axis=0)
        assert np.isfinite(added).all() and (np.abs(added).max() == 0) == (name in starved), name


def test_tokens_that_do_not_count_do_not_count_for_experts(cases: Callable[[str], Repaired], tmp_path: Path) -> None:
    """Where one token counts, two experts of a layer read one row each, and the others none."""
    found = cases("mixtral")
    tokens, weights = batch()
    weights = torch.zeros_like(weights)
    weights[0, 7] = 1.0
    plan = a_plan(found.plan.source)
    arguments = found.teacher, Layout(), plan, RepairConfig(hidden=False), tmp_path / "plan", (tokens, weights)
    run_distributed(1, repair_together, *arguments)
    one = found._replace(directory=tmp_path / "plan")
    expected = {name: both for name, both in reads(found, tokens, weights).items() if "linear_fc2" in name}
    assert one.maps.keys() == expected.keys()
    assert {len(x) for x, _ in expected.values()} == {0, 1}
    for name, matrix in one.maps.items():
        x, y = expected[name]
        added = np.delete(matrix, kept_neurons(plan, name), axis=0)
        if len(x):
            gone = np.delete(x[0], kept_neurons(plan, name))
            own = np.outer(gone, y[0]) / (y @ y.T + 0.01 * 56**3 * (y**2).mean())
            np.testing.assert_allclose(added, own, rtol=0, atol=1e-4 * np.abs(own).max())
        else:
            assert not added.any()


@pytest.mark.slow
def test_repairs_lower_the_error_of_experts_on_tokens_that_they_have_not_seen(tmp_path: Path) -> None:
    """In a model where every neuron has one that is much like it, as neurons of trained models do."""

    def pair_up(weights: dict[str, torch.Tensor]) -> None:
        for name, rows in weights.items():
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                half = len(rows) // 2
                rows[half:] = 0.9 * rows[:half] + 0.1 * rows[half:]

    found = repaired(tmp_path, "qwen2_moe", pair_up, random_text(1, 48))
    for name, (x, y) in reads(found, *random_text(2, 16)).items():
        if "linear_fc2" not in name:
            continue
        plain = np.zeros_like(x)
        plain[:, kept_neurons(found.plan, name)] = y
        fitted = y @ found.maps[name].T
        assert ((fitted - x) ** 2).sum() < 0.8 * ((plain - x) ** 2).sum(), name


def test_a_small_byte_budget_takes_a_pass_for_a_few_experts_and_gives_the_same_bits(
    cases: Callable[[str], Repaired], tmp_path: Path
) -> None:
    found = cases("qwen2_moe")
    config = RepairConfig(statistics_bytes=100_000)
    plan = a_plan(found.plan.source)
    [passes] = run_distributed(1, passes_of_repair, found.teacher, Layout(), plan, config, tmp_path / "plan")
    assert (tmp_path / "plan" / "plan.safetensors").read_bytes() == (found.directory / "plan.safetensors").read_bytes()
    planned, *flops = step.planned(plan.source, plan.target, PruneConfig(repair=config), Layout(), 32)
    assert passes == planned > 4
    # Of a token in two layers: two norms, two of its experts at most, the shared one; and the output's norm.
    products = 2 * (2 * (64 + 40) * 40 + 2 * 96 * 56 + 80 * 48) + (64 + 40) * 40
    assert flops == [passes * (forward_flops_per_token(plan.source, 32) - 2 * 259 * 64), 2 * products]


def swapped(columns: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The first expert's matrix in the place of the second's."""

    def wrong(maps: DenseMaps, name: str, block: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
        return columns(maps, EXPERT.format(1, 0) if name == EXPERT.format(1, 1) else name, block, kept)

    return wrong


@pytest.mark.parametrize("again", [False, True], ids=["by its bits", "by sums in fp64"])
def test_verify_finds_an_expert_with_the_matrix_of_another(
    again: bool, cases: Callable[[str], Repaired], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `verify` itself would multiply by it."""
    found = cases("mixtral")
    with monkeypatch.context() as writing:
        writing.setattr(DenseMaps, "columns", swapped(DenseMaps.columns))
        convert(found.teacher, tmp_path / "student", "megatron", plan=found.plan, progress=False)
        if again:
            difference = verify(found.teacher, tmp_path / "student", progress=False)
    if not again:
        difference = verify(found.teacher, tmp_path / "student", progress=False)
    assert difference is not None and difference.text.startswith(f"{EXPERT.format(1, 1)}: row ")


def test_a_plan_is_refused_that_gives_experts_a_matrix_of_their_own(cases: Callable[[str], Repaired]) -> None:
    plan = cases("mixtral").plan
    name = LAYER.format(0) + "mlp.experts.experts.1.linear_fc1.weight"
    with pytest.raises(UserError, match=f"plan: matrices: {name}: what reads this norm is multiplied by the first"):
        replace(plan, matrices={**plan.matrices, name: Matrix(REPLACE, (64, 40), "")})


def test_too_few_tokens_for_an_expert_get_a_warning_with_the_number_that_is_enough() -> None:
    """Of 8 experts, 2 of which see a token."""
    source = Architecture(
        *(4, 64, 96, 8, 4, 8, 259, 512),
        num_moe_experts=8,
        moe_ffn_hidden_size=96,
        moe_router_topk=2,
        family="mixtral",
        model_type="mixtral",
    )
    target = source.resized({Axis.HIDDEN: 48, Axis.MOE_FFN: 80})
    assert repair_warnings(source, target, RepairConfig(samples=160), 32) == []  # 16 tokens for each of 80 columns
    [warning] = repair_warnings(source, target, RepairConfig(samples=159), 32)
    assert warning == (
        "prune.repair.samples: 5,088 tokens, 1,272 an expert on average, are few to fit 80 columns to; use 160 samples"
    )
    target = source.resized({Axis.HIDDEN: 48})
    assert repair_warnings(source, target, RepairConfig(samples=24), 32) == []
