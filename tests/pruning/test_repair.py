"""Repaired students against Hugging Face's model with weights from the formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.counts import forward_flops_per_token
from minitron_nemo.checkpoint import dense
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import PruneConfig, RepairConfig
from minitron_nemo.importance.places import places
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning import repair as step
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.repair import repair_plan, repair_warnings
from tests.families import DENSE, fused_like, norm_name, unfused, write_tiny
from tests.importance.measuring import dealt_out, loaded
from tests.importance.test_collect import LAYOUTS, batch
from tests.importance.test_second_moments import LAYERS, a_plan, assert_solves, neurons, reads
from tests.pool import run_distributed
from tests.pruning.slicing import slice_hugging_face
from tests.pruning.test_prune import logits_of, prune_together

# Behind a LayerNorm there are biases as well: test_repair_layernorm.
RMS_NORMS = tuple(family for family in DENSE if family != "nemotron")
Text = tuple[torch.Tensor, torch.Tensor]  # tokens and weights, both [n, s]


class Repaired(NamedTuple):
    """A teacher, its plain Plan, and the directory of the repaired one."""

    hugging_face: Path
    teacher: Path
    plain: Plan
    directory: Path

    @property
    def plan(self) -> Plan:
        return Plan.load(self.directory / "plan.json")

    @property
    def matrices(self) -> dict[str, torch.Tensor]:
        return folded(load_file(self.directory / "plan.safetensors"))


def folded(file: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices of a Plan's file, each with the gain of the norm that is read with it in the student."""
    found = {}
    for name in (name for name in file if "norm" not in name):
        norm = "decoder.final_layernorm.weight" if name == "output_layer.weight" else gain_name(name)
        found[name] = file[name] * file.get(norm, torch.ones(1))
    return found


def gain_name(reader: str) -> str:
    if reader.endswith("mlp.router.weight"):
        return reader.replace("mlp.router", "pre_mlp_layernorm")
    return reader.removesuffix("weight") + "layer_norm_weight"


def repair_together(
    teacher: Path, layout: Layout, plan: Plan, config: RepairConfig, directory: Path, text: Text | None = None
) -> None:
    repair_plan(loaded(teacher, layout), dealt_out(*(text or batch())), plan, config, directory, "key")


def random_text(seed: int, sequences: int) -> Text:
    tokens = torch.randint(0, 259, (sequences, 32), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.ones(sequences, 32)


def repaired(
    directory: Path,
    family: str = "llama",
    tied: bool = False,
    change: Callable[[dict[str, torch.Tensor]], None] = lambda weights: None,
    text: Text | None = None,
    **config: Any,
) -> Repaired:
    """A tiny model with its weights changed by `change`, its Plan, repaired on `text` in one process."""
    hugging_face = write_tiny(family, directory / "hf", num_layers=LAYERS, tied=tied)
    weights = load_file(hugging_face / "model.safetensors")
    change(weights)
    save_file(weights, hugging_face / "model.safetensors", {"format": "pt"})
    convert(hugging_face, directory / "teacher", "megatron", progress=False)
    plain = a_plan(Architecture.load(directory / "teacher"))
    # Irregular factors, as a calibration pass would measure them: only a norm without a matrix keeps its own.
    norms = [gain_name(name) for name in maps(plain, "linear_qkv", "linear_fc1")]
    scales = {name: 1 + 0.01 * number for number, name in enumerate((*norms, "decoder.final_layernorm.weight"))}
    plain = replace(plain, norm_scales={} if family == "nemotron" else scales)
    arguments = directory / "teacher", Layout(), plain, RepairConfig(**config), directory / "plan", text
    run_distributed(1, repair_together, *arguments)
    return Repaired(hugging_face, directory / "teacher", plain, directory / "plan")


def maps(plan: Plan, *modules: str) -> list[str]:
    parts = {"linear_qkv": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}
    return [f"decoder.layers.{n}.{parts[m]}.{m}.weight" for n in range(len(plan.kept_layers)) for m in modules]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    return repaired(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    return repaired(tmp_path_factory.mktemp("tied"), tied=True)


def gains(case: Repaired) -> dict[str, np.ndarray]:
    """Gain of the norm that a tensor of the student reads, in the teacher."""
    weights = load_file(case.hugging_face / "model.safetensors")
    found = {"output_layer.weight": weights["model.norm.weight"]}
    for new, old in enumerate(case.plain.kept_layers):
        prefix = f"decoder.layers.{new}."
        found[prefix + "self_attention.linear_qkv.weight"] = weights[f"model.layers.{old}.input_layernorm.weight"]
        found[prefix + "mlp.linear_fc1.weight"] = weights[f"model.layers.{old}.post_attention_layernorm.weight"]
    return {name: gain.numpy() for name, gain in found.items()}


def whole(name: str, case: Repaired) -> np.ndarray:
    """A matrix of the file as the map [n, k] from what the student's tensor reads to what the teacher's does."""
    matrix = case.matrices[name].double().numpy()
    if "linear_fc2" not in name:
        return matrix
    kept = neurons(case.plain, int(name.split(".")[2]))
    full = np.zeros((96, 56))
    full[kept, range(56)] = 1
    full[[neuron for neuron in range(96) if neuron not in kept]] = matrix
    return full


@pytest.mark.parametrize(
    ("family", "ridge"), [("llama", 1e-3), ("llama", 1e-2), *((family, 1e-2) for family in RMS_NORMS)]
)
@pytest.mark.fast_cases(3)
def test_maps_are_the_least_squares_solutions_on_hugging_faces_activations(
    family: str, ridge: float, tmp_path: Path
) -> None:
    case = repaired(tmp_path, family, ridge=ridge)
    hidden = np.array(case.plain.kept_hidden)
    before = gains(case)
    found = reads(case.hugging_face, case.plain, *batch())
    assert sorted(case.matrices) == sorted(found)
    for name, (x, y) in found.items():
        kept = np.array(neurons(case.plain, int(name.split(".")[2]))) if "linear_fc2" in name else hidden
        fitted = whole(name, case)
        assert_solves(x, y, kept, ridge, fitted / before[name][:, None] if name in before else fitted)


def test_readers_are_cut_columns_of_length_one_and_their_norms_gains_the_rest(untied: Repaired, tmp_path: Path) -> None:
    """So a ridge without end leaves the plain cut as it is: its entries, and its gains times the norms' constants."""
    file = load_file(untied.directory / "plan.safetensors")
    readers = [*maps(untied.plain, "linear_qkv", "linear_fc1"), "output_layer.weight"]
    assert len(file) == 2 * len(readers) + len(maps(untied.plain, "linear_fc2"))
    for name in readers:
        torch.testing.assert_close(file[name].norm(dim=0), torch.ones(40), rtol=1e-6, atol=0)
    arguments = untied.teacher, Layout(), untied.plain, RepairConfig(ridge=1e12), tmp_path / "plan"
    run_distributed(1, repair_together, *arguments)
    file, before, kept = load_file(tmp_path / "plan" / "plan.safetensors"), gains(untied), untied.plain.kept_hidden
    states = reads(untied.hugging_face, untied.plain, *batch())
    for name in readers[:-1]:
        x, y = states[name]
        constant = (x[:, list(kept or ())] * y).sum() / (y**2).sum()
        gain = constant * before[name][list(kept or ())]
        np.testing.assert_allclose(file[gain_name(name)][0], np.abs(gain), rtol=1e-4)
        selection = np.zeros((64, 40))
        selection[list(kept or ()), range(40)] = np.sign(gain)
        np.testing.assert_allclose(file[name], selection, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["TP2", "TP2 SP", "DP2", "PP2 VPP2", "TP2 PP2"])
@pytest.mark.fast_cases(1)
def test_maps_do_not_depend_on_the_layout(name: str, untied: Repaired, tmp_path: Path) -> None:
    world_size, layout = LAYOUTS[name]
    arguments = untied.teacher, layout, untied.plain, RepairConfig(), tmp_path / "plan"
    run_distributed(world_size, repair_together, *arguments)
    other = untied._replace(directory=tmp_path / "plan")
    assert replace(other.plan, matrices={}) == replace(untied.plan, matrices={})
    for tensor, matrix in untied.matrices.items():
        np.testing.assert_allclose(
            other.matrices[tensor], matrix, rtol=0, atol=1e-5 * float(matrix.abs().max()), err_msg=tensor
        )


def passes_of_repair(*arguments: Any) -> int:
    with patch.object(step, "forward_only", wraps=forward_only) as forward:
        repair_together(*arguments)
    return forward.call_count


def test_a_small_byte_budget_takes_more_passes_and_gives_the_same_bits(untied: Repaired, tmp_path: Path) -> None:
    config = RepairConfig(statistics_bytes=100_000)
    arguments = untied.teacher, Layout(), untied.plain, config, tmp_path / "plan"
    [passes] = run_distributed(1, passes_of_repair, *arguments)
    assert (tmp_path / "plan" / "plan.safetensors").read_bytes() == (untied.directory / "plan.safetensors").read_bytes()
    prune = PruneConfig(repair=config)
    assert passes == step.planned(untied.plain.source, untied.plain.target, prune, Layout(), 32)[0] > 3


class Killed(Exception):
    """Raised on every rank, where a job would be killed."""


def killed_repair(function: str, calls: int, *arguments: Any) -> None:
    """A repair that ends after so many calls of a function of the step, at the next one."""
    whole, left = getattr(step, function), calls

    def killed(*given: Any) -> Any:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return whole(*given)

    with patch.object(step, function, killed), pytest.raises(Killed):
        repair_together(*arguments)


def assert_made_again(directory: Path, undisturbed: Path) -> None:
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == {
        file.name: file.read_bytes() for file in undisturbed.iterdir()
    }
    assert not list(directory.parent.glob("*.partial"))


IN_PASSES = RepairConfig(statistics_bytes=100_000)  # of two places


@pytest.mark.parametrize(("world_size", "layout"), [(1, Layout()), LAYOUTS["TP2 PP2"]], ids=str)
@pytest.mark.slow
def test_a_killed_repair_makes_the_passes_that_are_missing_and_ends_with_the_same_bits(
    world_size: int, layout: Layout, untied: Repaired, tmp_path: Path
) -> None:
    arguments = untied.teacher, layout, untied.plain, IN_PASSES
    passes = run_distributed(world_size, passes_of_repair, *arguments, tmp_path / "undisturbed")[0]
    # Between two passes; and, where one process writes all, when the second pass has written one of its maps.
    kills = [("_watch", 2, 2), *[("_write", 3, 1)] * (world_size == 1)]
    for number, (function, calls, done) in enumerate(kills):
        directory = tmp_path / str(number) / "plan"
        run_distributed(world_size, killed_repair, function, calls, *arguments, directory)
        assert not directory.exists()
        again = run_distributed(world_size, passes_of_repair, *arguments, directory)
        assert again == [passes - done] * world_size
        assert_made_again(directory, tmp_path / "undisturbed")


@pytest.mark.parametrize("left", ["of another plan", "damaged"])
@pytest.mark.fast_cases(1)
def test_what_a_killed_repair_left_that_is_not_of_this_one_is_made_anew(
    left: str, untied: Repaired, tmp_path: Path
) -> None:
    arguments = untied.teacher, Layout(), untied.plain, IN_PASSES, tmp_path / "plan"
    before = list(arguments)
    if left == "of another plan":
        before[2] = replace(untied.plain, kept_layers=(0, 1, 3))
    run_distributed(1, killed_repair, "_watch", 2, *before)
    if left == "damaged":
        name = "decoder.layers.0.mlp.linear_fc1.weight"
        file = tmp_path / "plan.partial" / "plan.safetensors"
        content, whole = bytearray(file.read_bytes()), load_file(untied.directory / "plan.safetensors")[name]
        content[content.find(whole.numpy().tobytes())] ^= 1
        file.write_bytes(content)
    prune = PruneConfig(repair=IN_PASSES)
    planned = step.planned(untied.plain.source, untied.plain.target, prune, Layout(), 32)[0]
    assert run_distributed(1, passes_of_repair, *arguments) == [planned]
    assert_made_again(tmp_path / "plan", untied.directory)


def test_the_planned_passes_are_the_most_that_a_choice_of_layers_can_take(untied: Repaired) -> None:
    """On two pipeline stages, where a stage that keeps both of its layers takes most; the FLOPs are those of places."""
    plain, budget, found = untied.plain, 100_000, []
    config = PruneConfig(hidden_method="rotate", repair=RepairConfig(statistics_bytes=budget))
    for kept in combinations(range(LAYERS), 3):
        everywhere = places(replace(plain, kept_layers=kept), ffn=True, hidden=True)
        for stage in (range(2), range(2, LAYERS + 1)):
            filled: list[list[int]] = [[]]
            for place in (place for place in everywhere if place.layer in stage):
                size = 8 * place.rows(plain.source, 1) * place.columns
                filled += [[]] if sum(filled[-1]) + size > budget else []
                filled[-1].append(size)
            found.append(len(filled))
    layout = Layout(pipeline_model_parallel_size=2)
    passes, through_layers, in_sums = step.planned(plain.source, plain.target, config, layout, 32)
    assert passes == max(found) + 1  # one for the rotation
    through = forward_flops_per_token(plain.source, 32) - 2 * 259 * 64
    products = sum(place.rows(plain.source, 1) * place.columns for place in everywhere) + 7 * 64 * 64
    assert (through_layers, in_sums) == (passes * through, 2 * products)
    assert step.planned(plain.source, plain.source, config, layout, 32) == (0, 0, 0)


def formula_student(case: Repaired, destination: Path) -> Path:
    """Hugging Face's model with weights by the formula: sliced by the Plan, then W M on the columns that have a map."""
    slice_hugging_face(case.hugging_face, case.plan, destination)
    original, file = load_file(case.hugging_face / "model.safetensors"), destination / "model.safetensors"
    source, target = case.plain.source, case.plain.target
    before = unfused(original, source.num_attention_heads, source.num_query_groups)
    after = unfused(load_file(file), target.num_attention_heads, target.num_query_groups)
    hidden = torch.tensor(case.plain.kept_hidden)
    for name in case.matrices:
        matrix = torch.from_numpy(whole(name, case))
        if name == "output_layer.weight":
            after["lm_head.weight"] = (before["lm_head.weight"].double() @ matrix).float()
            after["model.norm.weight"] = torch.ones(len(hidden))
            continue
        new = int(name.split(".")[2])
        old = case.plain.kept_layers[new]
        if "linear_fc2" in name:
            down = before[f"model.layers.{old}.mlp.down_proj.weight"][hidden]
            after[f"model.layers.{new}.mlp.down_proj.weight"] = (down.double() @ matrix).float()
            continue
        readers, norm = {
            "linear_qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
            "linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        }[name.split(".")[-2]]
        after[f"model.layers.{new}.{norm}.weight"] = torch.ones(len(hidden))
        for reader in readers:
            weight = before[f"model.layers.{old}.{reader}.weight"]
            if "mlp" in reader:
                weight = weight[neurons(case.plain, new)]
            after[f"model.layers.{new}.{reader}.weight"] = (weight.double() @ matrix).float()
    fused = fused_like(original, after)
    save_file({name: tensor.contiguous() for name, tensor in fused.items()}, file, {"format": "pt"})
    return destination


@pytest.mark.parametrize("output", ["untied", "tied"])
def test_a_repaired_student_has_the_logits_of_hugging_faces_model_by_the_formula(
    output: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert_student_is_the_formulas(request.getfixturevalue(output), tmp_path)


@pytest.mark.parametrize("family", RMS_NORMS)
@pytest.mark.fast_cases(1)
def test_repaired_students_of_every_family_have_the_logits_of_hugging_faces_model_by_the_formula(
    family: str, tmp_path: Path
) -> None:
    case = repaired(tmp_path, family)
    readers = ["output_layer.weight", *maps(case.plain, "linear_qkv", "linear_fc1", "linear_fc2")]
    assert sorted(case.matrices) == sorted(readers)
    assert_student_is_the_formulas(case, tmp_path)


def assert_student_is_the_formulas(case: Repaired, tmp_path: Path) -> None:
    run_distributed(2, prune_together, case.teacher, case.plan, tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(
        formula_student(case, tmp_path / "formula"), dtype=torch.float32, attn_implementation="eager"
    )
    tokens, _ = batch()
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    actual = run_distributed(1, logits_of, tmp_path / "student", tokens)[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert Plan.load(tmp_path / "student" / "plan.json") == case.plan


def test_a_tied_output_keeps_its_embedding_and_only_the_final_gain_is_scaled(tied: Repaired) -> None:
    assert "output_layer.weight" not in tied.matrices
    assert list(tied.plan.norm_scales) == ["decoder.final_layernorm.weight"]
    assert sorted(norm_name(name) for name in tied.plan.matrices if "norm" in name) == sorted(
        f"model.layers.{layer}.{norm}.weight"
        for layer in range(LAYERS - 1)
        for norm in ("input_layernorm", "post_attention_layernorm")
    )


def test_a_plan_with_matrices_gives_the_same_bits_from_any_number_of_processes_and_threads(
    untied: Repaired, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = [tmp_path / name for name in ("one", "two", "threads")]
    run_distributed(1, prune_together, untied.teacher, untied.plan, students[0])
    run_distributed(2, prune_together, untied.teacher, untied.plan, students[1])
    torch.set_num_threads(2)
    try:
        prune(untied.teacher, untied.plan, students[2])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert len({fingerprint(student) for student in students}) == 1
    monkeypatch.setattr(dense, "BLOCK_BYTES", 1000)  # sums in parts: nearly the same, not the same
    prune(untied.teacher, untied.plan, tmp_path / "parts")
    tokens, _ = batch()
    whole, parts = (run_distributed(1, logits_of, tmp_path / name, tokens)[0] for name in ("one", "parts"))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_repairs_lower_the_error_on_tokens_that_they_have_not_seen(tmp_path: Path) -> None:
    """In a model where every neuron has one that is much like it, as neurons of trained models do."""

    def pair_up(weights: dict[str, torch.Tensor]) -> None:
        for name, rows in weights.items():
            if "gate_proj" in name or "up_proj" in name:
                rows[48:] = 0.9 * rows[:48] + 0.1 * rows[48:]

    case = repaired(tmp_path, change=pair_up, text=random_text(1, 32))
    weights = load_file(case.hugging_face / "model.safetensors")
    unseen = reads(case.hugging_face, case.plain, *random_text(2, 16))
    for layer, name in enumerate(maps(case.plain, "linear_fc2")):
        x, y = unseen[name]
        down = weights[f"model.layers.{case.plain.kept_layers[layer]}.mlp.down_proj.weight"].double().numpy()
        target = x @ down.T
        plain = y @ down[:, neurons(case.plain, layer)].T
        fitted = y @ (down @ whole(name, case)).T
        assert ((fitted - target) ** 2).sum() < 0.7 * ((plain - target) ** 2).sum(), name


def test_what_is_switched_off_is_left_as_the_plan_has_it(untied: Repaired, tmp_path: Path) -> None:
    config = RepairConfig(hidden=False)
    run_distributed(1, repair_together, untied.teacher, Layout(), untied.plain, config, tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan" / "plan.json")
    assert sorted(plan.matrices) == maps(plan, "linear_fc2")
    assert plan.norm_scales == untied.plain.norm_scales


def test_too_few_tokens_to_fit_get_a_warning_with_the_number_that_is_enough() -> None:
    source = Architecture(4, 64, 96, 8, 4, 8, 259, 512)
    target = source.resized({Axis.HIDDEN: 48, Axis.FFN: 80})
    assert repair_warnings(source, target, RepairConfig(samples=40), 32) == []  # 16 tokens for each of 80 columns
    [warning] = repair_warnings(source, target, RepairConfig(samples=39), 32)
    assert warning.startswith("prune.repair.samples: 1,248 tokens are few") and "use 40 samples" in warning
    assert repair_warnings(source, target, RepairConfig(samples=1, ffn=False, hidden=False), 32) == []
    assert repair_warnings(source, source, RepairConfig(samples=1), 32) == []
