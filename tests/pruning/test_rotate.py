"""Rotated students: nothing changes while no channel goes, and one that has lost some is the formula's, in fp64."""

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
from transformers import AutoModelForCausalLM

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.counts import parameters
from minitron_nemo.arch.matrix import ADD, Matrix
from minitron_nemo.checkpoint import blocks
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import PruneConfig, RepairConfig
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning import repair as step
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.target import target_architecture
from tests.families import DENSE, fused_like, unfused, write_tiny
from tests.importance.hugging_face import activations, load, rms_normed
from tests.importance.measuring import measured
from tests.importance.test_collect import LAYOUTS, batch
from tests.importance.test_second_moments import neurons
from tests.pool import run_distributed
from tests.pruning.slicing import slice_hugging_face
from tests.pruning.test_prune import logits_of, prune_together
from tests.pruning.test_repair import (
    IN_PASSES,
    assert_made_again,
    folded,
    killed_repair,
    passes_of_repair,
    repair_together,
)

LAYERS = 4
EMBEDDING = "embedding.word_embeddings.weight"
RMS_FAMILIES = ("llama", *(family for family in DENSE if family != "nemotron"))


class Rotated(NamedTuple):
    """A teacher in two formats and the directory of its repaired Plan."""

    hugging_face: Path
    teacher: Path
    directory: Path

    @property
    def plan(self) -> Plan:
        return Plan.load(self.directory / "plan.json")

    @property
    def matrices(self) -> dict[str, torch.Tensor]:
        return folded(load_file(self.directory / "plan.safetensors"))


def unrepaired(source: Architecture, hidden_size: int, cut_more: bool) -> Plan:
    """A rotation to `hidden_size` channels, with `cut_more` of three of the layers and of 56 neurons of each."""
    target = replace(source.resized({Axis.HIDDEN: hidden_size}), share_embeddings_and_output_weights=False)
    if not cut_more:
        return Plan(source, target, tuple(range(source.num_layers)), rotated=True)
    kept = tuple(tuple(sorted(np.random.default_rng(n).permutation(96)[:56].tolist())) for n in range(LAYERS - 1))
    target = target.resized({Axis.FFN: 56, Axis.LAYERS: LAYERS - 1})
    return Plan(source, target, (0, 2, 3), rotated=True, kept_ffn=kept)


def rotated(
    directory: Path, family: str = "llama", tied: bool = False, hidden_size: int = 40, cut_more: bool = True
) -> Rotated:
    hugging_face = write_tiny(family, directory / "hf", num_layers=LAYERS, tied=tied)
    convert(hugging_face, directory / "teacher", "megatron", progress=False)
    plan = unrepaired(Architecture.load(directory / "teacher"), hidden_size, cut_more)
    run_distributed(1, repair_together, directory / "teacher", Layout(), plan, RepairConfig(), directory / "plan")
    return Rotated(hugging_face, directory / "teacher", directory / "plan")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Rotated:
    return rotated(tmp_path_factory.mktemp("rotated"))


def hugging_face_logits(directory: Path, tokens: torch.Tensor) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens).logits.numpy()


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("family", "tied"), [*((family, False) for family in RMS_FAMILIES), ("llama", True)])
@pytest.mark.fast_cases(1)
def test_a_rotation_of_all_channels_changes_no_logits(family: str, tied: bool, tmp_path: Path) -> None:
    """In Megatron and after export, though no weight is what it was: gains are folded, a tied output has its own."""
    found = rotated(tmp_path, family, tied, hidden_size=64, cut_more=False)
    rotation = found.matrices[EMBEDDING].double()
    torch.testing.assert_close(rotation.t() @ rotation, torch.eye(64).double(), rtol=0, atol=1e-6)
    assert rotation.abs().max() < 0.9  # it is no permutation
    run_distributed(1, prune_together, found.teacher, found.plan, tmp_path / "student")
    convert(tmp_path / "student", tmp_path / "export", "hf", progress=False)
    tokens, _ = batch()
    expected = hugging_face_logits(found.hugging_face, tokens)
    assert_near(run_distributed(1, logits_of, tmp_path / "student", tokens)[0], expected)
    assert_near(hugging_face_logits(tmp_path / "export", tokens), expected)
    assert not Architecture.load(tmp_path / "student").share_embeddings_and_output_weights
    assert "lm_head.weight" in load_file(tmp_path / "export" / "model.safetensors")


def normed_residuals(directory: Path, plan: Plan) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """For each reader of a norm in the student: the teacher's states before it that count, its gain, and epsilon."""
    model = load(directory)
    tokens, weights = batch()
    mask = weights.numpy() != 0
    states = activations(model, tokens)["residuals"]
    epsilon = model.config.rms_norm_eps
    found = {"output_layer.weight": (states[-1][mask], model.model.norm.weight.detach().numpy(), epsilon)}
    for new, old in enumerate(plan.kept_layers):
        layer = model.model.layers[old]
        for number, (name, norm) in enumerate(
            (("self_attention.linear_qkv", layer.input_layernorm), ("mlp.linear_fc1", layer.post_attention_layernorm))
        ):
            gain = norm.weight.detach().numpy()
            found[f"decoder.layers.{new}.{name}.weight"] = (states[2 * old + number][mask], gain, epsilon)
    return found


def test_the_rotation_is_the_principal_components_of_hugging_faces_normalised_states(case: Rotated) -> None:
    normed = [rms_normed(x, epsilon) for x, _, epsilon in normed_residuals(case.hugging_face, case.plan).values()]
    covariance = sum(x.T @ x for x in normed)
    values, vectors = np.linalg.eigh(covariance)
    rotation = case.matrices[EMBEDDING].double().numpy()
    best = vectors[:, -40:]
    np.testing.assert_allclose(rotation @ rotation.T, best @ best.T, rtol=0, atol=1e-4)  # the same subspace
    np.testing.assert_allclose(np.diag(rotation.T @ covariance @ rotation), values[:-41:-1], rtol=1e-5)
    assert case.plan.provenance["rotation_keeps"] == pytest.approx(values[-40:].sum() / values.sum(), rel=1e-5)
    raw = sum(x.T @ x for x, _, _ in normed_residuals(case.hugging_face, case.plan).values())
    other = np.linalg.eigh(raw)[1][:, -40:]
    assert np.abs(other @ other.T - best @ best.T).max() > 0.02  # of states that are not normalised, another


@pytest.mark.parametrize("name", ["TP2", "TP2 SP", "DP2", "PP2 VPP2", "TP2 PP2"])
@pytest.mark.fast_cases(1)
def test_rotations_do_not_depend_on_the_layout(name: str, case: Rotated, tmp_path: Path) -> None:
    """The subspace does not, nor do readers on it: eigenvectors have a sign, and equal ones no directions."""
    world_size, layout = LAYOUTS[name]
    plan = unrepaired(case.plan.source, 40, cut_more=True)
    run_distributed(world_size, repair_together, case.teacher, layout, plan, RepairConfig(), tmp_path / "plan")
    other = case._replace(directory=tmp_path / "plan")
    assert other.plan.provenance["rotation_keeps"] == pytest.approx(case.plan.provenance["rotation_keeps"], rel=1e-6)
    first, second = case.matrices, other.matrices
    for tensor, matrix in first.items():
        one, two = matrix, second[tensor]
        if "linear_fc2" not in tensor:  # R P^T of both
            one, two = one @ first[EMBEDDING].t(), two @ second[EMBEDDING].t()
        scale = float(one.abs().max())
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * scale, err_msg=tensor)


def test_a_rotation_that_was_found_before_a_kill_is_not_sought_again(case: Rotated, tmp_path: Path) -> None:
    arguments = case.teacher, Layout(), unrepaired(case.plan.source, 40, cut_more=True), IN_PASSES, tmp_path / "plan"
    run_distributed(1, killed_repair, "_watch", 2, *arguments)  # after it and a first pass of fits
    config = PruneConfig(hidden_method="rotate", repair=IN_PASSES)
    planned = step.planned(case.plan.source, case.plan.target, config, Layout(), 32)[0]
    assert run_distributed(1, passes_of_repair, *arguments) == [planned - 2]
    assert_made_again(tmp_path / "plan", case.directory)


@pytest.mark.parametrize(("family", "tied"), [*((family, False) for family in RMS_FAMILIES), ("llama", True)])
@pytest.mark.fast_cases(1)
def test_a_rotated_student_has_the_logits_of_hugging_faces_model_by_the_formula(
    family: str, tied: bool, tmp_path: Path
) -> None:
    found = rotated(tmp_path, family, tied)
    run_distributed(2, prune_together, found.teacher, found.plan, tmp_path / "student")
    tokens, _ = batch()
    expected = hugging_face_logits(formula_student(found, tmp_path / "formula"), tokens)
    assert_near(run_distributed(1, logits_of, tmp_path / "student", tokens)[0], expected)
    assert Plan.load(tmp_path / "student" / "plan.json") == found.plan


def formula_student(found: Rotated, destination: Path) -> Path:
    """Hugging Face's model with weights computed in fp64: least squares on its own activations, and P from the file."""
    plan, teacher = found.plan, load_file(found.hugging_face / "model.safetensors")
    slice_hugging_face(found.hugging_face, replace(plan, norm_scales={}), destination)
    source = plan.source
    before = unfused({name: w.double() for name, w in teacher.items()}, source.num_attention_heads, 4)
    before.setdefault("lm_head.weight", before["model.embed_tokens.weight"])
    rotation = found.matrices[EMBEDDING].double()
    readers = readers_of(found, rotation.numpy())
    after = {
        "model.embed_tokens.weight": before["model.embed_tokens.weight"] @ rotation,
        "model.norm.weight": torch.ones(40),
        "lm_head.weight": before["lm_head.weight"] @ readers["output_layer.weight"],
    }
    for new, old in enumerate(plan.kept_layers):
        kept = torch.tensor(neurons(plan, new))
        ours, theirs = f"decoder.layers.{new}.", f"model.layers.{old}."
        for name, weight in before.items():
            if not name.startswith(theirs):
                continue
            module = name.removeprefix(theirs).removesuffix(".weight")
            if module.endswith("layernorm"):
                weight = torch.ones(40)
            elif module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                weight = weight @ readers[f"{ours}self_attention.linear_qkv.weight"]
            elif module in ("mlp.gate_proj", "mlp.up_proj"):
                weight = weight[kept] @ readers[f"{ours}mlp.linear_fc1.weight"]
            elif module == "self_attn.o_proj":
                weight = rotation.t() @ weight
            elif module == "mlp.down_proj":
                fitted = torch.zeros(96, 56).double()
                fitted[kept, range(56)] = 1
                rest = [neuron for neuron in range(96) if neuron not in kept.tolist()]
                fitted[rest] = found.matrices[f"{ours}mlp.linear_fc2.weight"].double()
                weight = rotation.t() @ weight @ fitted
            after[name.replace(theirs, f"model.layers.{new}.")] = weight
    final = {name: weight.float().contiguous() for name, weight in fused_like(teacher, after).items()}
    save_file(final, destination / "model.safetensors", {"format": "pt"})
    config = json.loads((destination / "config.json").read_text())
    config |= {"hidden_size": 40, "tie_word_embeddings": False}
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def readers_of(found: Rotated, rotation: np.ndarray) -> dict[str, torch.Tensor]:
    """diag(g) M of every norm: M minimises |x - y M^T|^2 + lam |M - c P|^2, solved as one system with lam's rows."""
    maps = {}
    for name, (states, gain, epsilon) in normed_residuals(found.hugging_face, found.plan).items():
        x, y = rms_normed(states, epsilon), rms_normed(states @ rotation, epsilon)
        plain = ((x @ rotation) * y).sum() / (y**2).sum() * rotation
        lam = 0.01 * (y**2).sum() / 40
        rows = np.concatenate([y, np.sqrt(lam) * np.eye(40)])
        solution = np.linalg.lstsq(rows, np.concatenate([x, np.sqrt(lam) * plain.T]), rcond=None)[0].T
        maps[name] = torch.from_numpy(gain[:, None] * solution)
    return maps


@pytest.mark.slow
def test_one_plan_gives_the_same_bits_from_any_number_of_processes_threads_and_windows(
    case: Rotated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for processes in (1, 2, 4):
        run_distributed(processes, prune_together, case.teacher, case.plan, tmp_path / str(processes))
    torch.set_num_threads(2)
    try:
        prune(case.teacher, case.plan, tmp_path / "threads")
    finally:
        torch.set_num_threads(1)
    assert len({fingerprint(tmp_path / name) for name in ("1", "2", "4", "threads")}) == 1
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)  # rows in many blocks, sums in parts: nearly the same
    prune(case.teacher, case.plan, tmp_path / "parts")
    tokens, _ = batch()
    whole, parts = (run_distributed(1, logits_of, tmp_path / name, tokens)[0] for name in ("1", "parts"))
    assert_near(parts, whole)


def test_an_output_is_untied_without_a_change_of_logits(tmp_path: Path) -> None:
    hugging_face = write_tiny("llama", tmp_path / "hf", num_layers=2, tied=True)
    convert(hugging_face, tmp_path / "teacher", "megatron", progress=False)
    scores = run_distributed(1, measured, tmp_path / "teacher", Layout(), *batch())[0]
    plan = make_plan(scores, scores.architecture, PruneConfig(untie=True))
    prune(tmp_path / "teacher", plan, tmp_path / "student")
    student = Architecture.load(tmp_path / "student")
    assert parameters(student) == parameters(scores.architecture) + 259 * 64
    tokens, _ = batch()
    first, second = (run_distributed(1, logits_of, tmp_path / name, tokens)[0] for name in ("teacher", "student"))
    np.testing.assert_array_equal(second, first)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nemotron": (
        {"family": "nemotron", "model_type": "nemotron"},
        {},
        "prune.hidden_method: rotate needs RMSNorm with gains stored as they are, which nemotron has not; use select",
    ),
    "tied": (
        {"share_embeddings_and_output_weights": True},
        {},
        "prune.hidden_method: rotate needs an output weight of its own, .* set prune.untie to true, at 10,360 param",
    ),
    "no fits": (
        {},
        {"repair": RepairConfig(hidden=False)},
        "prune.repair.hidden: false is not for hidden_method rotate",
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_rotation_that_the_model_cannot_have_is_refused(wrong: str) -> None:
    source, config, message = REFUSED[wrong]
    architecture = Architecture(4, 64, 96, 8, 4, 8, 259, 512, **source)
    with pytest.raises(UserError, match=message):
        target_architecture(architecture, PruneConfig(hidden_size=40, hidden_method="rotate", **config))


CHANGES: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "no matrix": (
        lambda p: replace(p, matrices={n: m for n, m in p.matrices.items() if n != EMBEDDING}),
        f"rotated, but {EMBEDDING} has no matrix in place of its columns",
    ),
    "another kind": (
        lambda p: replace(p, matrices={**p.matrices, "output_layer.weight": Matrix(ADD, (24, 40), "")}),
        "rotated, but output_layer.weight has no matrix in place of its columns",
    ),
    "a gain": (
        lambda p: replace(p, matrices={n: m for n, m in p.matrices.items() if n != "decoder.final_layernorm.weight"}),
        "rotated, but decoder.final_layernorm.weight keeps the source's gain",
    ),
    "kept": (lambda p: replace(p, kept_hidden=tuple(range(40))), "keeps hidden channels as they are, or a tied output"),
    "tied": (
        lambda p: replace(
            p,
            source=replace(p.source, share_embeddings_and_output_weights=True),
            target=replace(p.target, share_embeddings_and_output_weights=True),
            matrices={n: m for n, m in p.matrices.items() if n != "output_layer.weight"},
        ),
        "keeps hidden channels as they are, or a tied output",
    ),
    "tied alone": (
        lambda p: replace(
            p,
            target=replace(p.target, share_embeddings_and_output_weights=True),
            matrices={n: m for n, m in p.matrices.items() if n != "output_layer.weight"},
        ),
        "the target's output is its embedding, but the source's has a weight of its own",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_that_rotates_only_in_part_is_refused(change: str, case: Rotated) -> None:
    changed, message = CHANGES[change]
    with pytest.raises(UserError, match=message):
        changed(case.plan)


def test_a_rotated_plan_is_not_carried_out_before_it_has_its_matrices(case: Rotated, tmp_path: Path) -> None:
    plan = unrepaired(case.plan.source, 40, cut_more=True)
    with pytest.raises(UserError, match="is to rotate hidden channels and has no matrices yet; repair first"):
        prune(case.teacher, plan, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []
