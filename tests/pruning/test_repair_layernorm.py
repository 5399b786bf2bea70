"""Repairs behind LayerNorms (Nemotron) against numpy and Hugging Face's model, whose activations are taken in fp64."""

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
from torch.nn import functional
from transformers import AutoModelForCausalLM

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.checkpoint.verify import verify
from minitron_nemo.config import PruneConfig, RepairConfig
from minitron_nemo.errors import UserError
from minitron_nemo.importance.places import Place, norm_read, places
from minitron_nemo.importance.second_moments import Moments, fit
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.planning.disk import matrix_bytes
from minitron_nemo.pruning import repair as step
from minitron_nemo.pruning.norm_maps import StudentNorm, student_norm
from minitron_nemo.pruning.prune import prune
from tests.families import write_tiny
from tests.importance.hugging_face import activations, load
from tests.importance.measuring import dealt_out, loaded
from tests.importance.test_collect import LAYOUTS, batch
from tests.importance.test_second_moments import LAYERS, a_plan, assert_solves, neurons
from tests.importance.test_second_moments import reads as neurons_read
from tests.pool import run_distributed
from tests.pruning.slicing import slice_hugging_face
from tests.pruning.test_norm_maps import regression
from tests.pruning.test_prune import logits_of, prune_together
from tests.pruning.test_repair import (
    IN_PASSES,
    Repaired,
    assert_made_again,
    gain_name,
    killed_repair,
    maps,
    passes_of_repair,
    repair_together,
    repaired,
    whole,
)

RIDGE = 0.01
EPSILON = 1e-5
HIDDEN = 64
FINAL = "decoder.final_layernorm."
READERS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_fc1": ("mlp.up_proj",),
    "output_layer": ("lm_head",),
}


class Read(NamedTuple):
    """What is behind a norm of the teacher: its name there, and its input on the tokens that count [t, h], fp64."""

    hf_norm: str
    states: np.ndarray


class Mapped(NamedTuple):
    """What a Plan's file has for a reader: N [h, k], and the norm's effective gain and its bias [k]."""

    columns: np.ndarray
    gain: np.ndarray
    bias: np.ndarray


def irregular(weights: dict[str, torch.Tensor]) -> None:
    """Gains from small to large, and states that are off 0, as those of trained models are."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in weights.items():
        if "norm.weight" in name:
            tensor += torch.rand(tensor.shape, generator=generator) * 1.5 - 0.9  # stored minus one: 0.1 to 1.6
        if "embed_tokens" in name:
            tensor[:, ::7] += 0.3


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    return repaired(tmp_path_factory.mktemp("case"), "nemotron", change=irregular, ridge=RIDGE)


def normed(states: np.ndarray) -> np.ndarray:
    centred = states - states.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)


def reads(case: Repaired, tokens: torch.Tensor, weights: torch.Tensor) -> dict[str, Read]:
    """Of every tensor of the student behind a norm."""
    residuals, mask = activations(load(case.hugging_face), tokens)["residuals"], weights.numpy() != 0
    found = {"output_layer.weight": Read("model.norm", residuals[-1][mask])}
    for new, old in enumerate(case.plain.kept_layers):
        for place, (module, norm) in enumerate(
            (("self_attention.linear_qkv", "input_layernorm"), ("mlp.linear_fc1", "post_attention_layernorm"))
        ):
            read = Read(f"model.layers.{old}.{norm}", residuals[2 * old + place][mask])
            found[f"decoder.layers.{new}.{module}.weight"] = read
    return found


def parameters(case: Repaired, read: Read) -> tuple[np.ndarray, np.ndarray]:
    """Effective gain and bias of the teacher's norm, fp64."""
    weights = load_file(case.hugging_face / "model.safetensors")
    return (weights[f"{read.hf_norm}.weight"] + 1.0).double().numpy(), weights[f"{read.hf_norm}.bias"].double().numpy()


def bias_name(reader: str) -> str:
    return norm_name(reader).removesuffix("weight") + "bias"


def norm_name(reader: str) -> str:
    return FINAL + "weight" if reader == "output_layer.weight" else gain_name(reader)


def mapped(case: Repaired, reader: str) -> Mapped:
    file = load_file(case.directory / "plan.safetensors")
    found = file[reader], file[norm_name(reader)][0] + 1.0, file[bias_name(reader)][0]
    return Mapped(*(tensor.double().numpy() for tensor in found))


def test_what_readers_see_is_the_least_squares_solution_on_hugging_faces_activations(case: Repaired) -> None:
    """N (diag(g') y + beta') is diag(g) (M y + b) + beta, with M and b by numpy."""
    kept = np.array(case.plain.kept_hidden)
    behind_norms = reads(case, *batch())
    assert {name for name in case.plan.matrices if "linear_fc2" not in name} == {
        name for reader in behind_norms for name in (reader, norm_name(reader), bias_name(reader))
    }
    for name, read in behind_norms.items():
        x, y = normed(read.states), normed(read.states[:, kept])
        gain, bias = parameters(case, read)
        slopes, constant = regression(x, y, kept, RIDGE)
        expected = (y @ slopes.T + constant) * gain + bias
        found = mapped(case, name)
        actual = (y * found.gain + found.bias) @ found.columns.T
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)
        # The map alone, without the direction in which no y has a part:
        across = np.eye(len(kept)) - 1 / len(kept)
        np.testing.assert_allclose(
            (found.columns * found.gain) @ across,
            (gain[:, None] * slopes) @ across,
            rtol=0,
            atol=1e-4 * np.abs(gain[:, None] * slopes).max(),
            err_msg=name,
        )


def test_neurons_are_fitted_beside_the_norms(case: Repaired) -> None:
    found = neurons_read(case.hugging_face, case.plain, *batch())
    assert sorted(found) == maps(case.plain, "linear_fc2")
    for layer, (name, (x, y)) in enumerate(found.items()):
        assert_solves(x, y, np.array(neurons(case.plain, layer)), RIDGE, whole(name, case))


def test_matrices_take_the_bytes_that_are_planned(case: Repaired) -> None:
    values = load_file(case.directory / "plan.safetensors").values()
    planned = matrix_bytes(case.plain.source, case.plain.target, PruneConfig())
    assert sum(tensor.nbytes for tensor in values) == planned


def test_columns_have_length_one_and_biases_the_size_of_the_constants(case: Repaired) -> None:
    kept = np.array(case.plain.kept_hidden)
    for name, read in reads(case, *batch()).items():
        found = mapped(case, name)
        # A gain is rounded to what bfloat16 has below 1, or next to 0; its column makes up for that.
        np.testing.assert_allclose(np.linalg.norm(found.columns, axis=0) * found.gain, found.gain, rtol=0, atol=2**-8)
        stored = torch.from_numpy(found.gain - 1.0)
        assert torch.equal(stored.bfloat16().double(), stored)
        gain, bias = parameters(case, read)
        x, y = normed(read.states), normed(read.states[:, kept])
        constant = gain * regression(x, y, kept, RIDGE)[1] + bias
        assert 0.7 < np.linalg.norm(found.bias) / np.linalg.norm(constant) < 1.5


def formula_student(case: Repaired, destination: Path) -> Path:
    """Hugging Face's student, sliced, with the maps in another form than the Plan's: gains of 1, biases beta'/g'.

    Its readers' weights are W N diag(g'), in fp64 before they are rounded.
    """
    slice_hugging_face(case.hugging_face, case.plan, destination)
    before, file = load_file(case.hugging_face / "model.safetensors"), destination / "model.safetensors"
    after, kept = load_file(file), torch.tensor(case.plain.kept_hidden)
    for name, read in reads(case, *batch()).items():
        found = mapped(case, name)
        layer = None if name == "output_layer.weight" else int(name.split(".")[2])
        old = "" if layer is None else f"model.layers.{case.plain.kept_layers[layer]}."
        new = "" if layer is None else f"model.layers.{layer}."
        norm = new + read.hf_norm.removeprefix(old)
        after[f"{norm}.weight"] = torch.zeros(len(kept))  # stored minus one
        after[f"{norm}.bias"] = torch.from_numpy(found.bias / found.gain).float()
        for reader in READERS[name.split(".")[-2]]:
            weight = before[f"{old}{reader}.weight"].double()
            if layer is not None and "mlp" in reader:
                weight = weight[neurons(case.plain, layer)]
            after[f"{new}{reader}.weight"] = (weight @ torch.from_numpy(found.columns * found.gain)).float()
    fitted = load_file(case.directory / "plan.safetensors")
    for new_layer, old_layer in enumerate(case.plain.kept_layers):
        down = before[f"model.layers.{old_layer}.mlp.down_proj.weight"][kept].double()
        stay = neurons(case.plain, new_layer)
        others = [neuron for neuron in range(down.shape[1]) if neuron not in stay]
        more = down[:, others] @ fitted[f"decoder.layers.{new_layer}.mlp.linear_fc2.weight"].double()
        after[f"model.layers.{new_layer}.mlp.down_proj.weight"] = (down[:, stay] + more).float()
    save_file({name: tensor.contiguous() for name, tensor in after.items()}, file, {"format": "pt"})
    return destination


def hugging_face_logits(directory: Path, tokens: torch.Tensor) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens).logits.numpy()


def test_a_repaired_student_and_its_export_have_the_logits_of_hugging_faces_model_by_the_formula(
    case: Repaired, tmp_path: Path
) -> None:
    run_distributed(2, prune_together, case.teacher, case.plan, tmp_path / "student")
    convert(tmp_path / "student", tmp_path / "export", "hf", progress=False)
    tokens, _ = batch()
    expected = hugging_face_logits(formula_student(case, tmp_path / "formula"), tokens)
    for actual in (
        run_distributed(1, logits_of, tmp_path / "student", tokens)[0],
        hugging_face_logits(tmp_path / "export", tokens),
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_verify_passes_on_a_repaired_student_and_finds_a_bias_that_is_another(case: Repaired, tmp_path: Path) -> None:
    convert(case.teacher, tmp_path / "student", "hf", plan=case.plan, progress=False)
    assert verify(case.teacher, tmp_path / "student", case.plan, progress=False) is None
    (file,) = (tmp_path / "student").glob("model*.safetensors")
    weights = load_file(file)
    weights["model.layers.1.post_attention_layernorm.bias"][3] += 0.01
    save_file(weights, file, {"format": "pt"})
    found = verify(case.teacher, tmp_path / "student", case.plan, progress=False)
    assert found is not None
    assert found.text.startswith("decoder.layers.1.mlp.linear_fc1.layer_norm_bias: row 3 holds")


def maps_of(teacher: Path, layout: Layout, wanted: list[Place], fused: bool) -> dict[str, StudentNorm]:
    """What the package makes of the norms of `wanted`, of those that this rank gets."""
    model, batches = loaded(teacher, layout, fused_norms=fused), dealt_out(*batch())
    watched = Moments(
        model.chunks,
        model.architecture,
        batches,
        wanted,
        sequence_parallel=layout.sequence_parallel,
        on_microbatch=lambda: None,
    )
    with watched:
        forward_only(model, batches, len(batches), 32, 1, lambda output, batch: None)
    found = {}
    for place, totals in watched.totals():
        fitted = fit(place, totals, RIDGE)
        norm = norm_read(place, model.chunks, model.architecture)
        found[place.name] = student_norm(fitted, norm, zero_centered_gamma=True)
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_maps_of_all_channels_leave_the_teachers_logits(fused: bool, case: Repaired, tmp_path: Path) -> None:
    """M is the identity, but for what no y has a part in: what readers see is what they saw."""
    plan = replace(
        case.plain,
        target=case.plain.source.resized({Axis.FFN: 56}),
        kept_layers=tuple(range(LAYERS)),
        kept_hidden=tuple(range(HIDDEN)),
        kept_ffn=((*range(56),),) * LAYERS,
    )
    wanted = places(plan, ffn=False, hidden=True)
    [found] = run_distributed(1, maps_of, case.teacher, Layout(), wanted, fused)
    assert len(found) == 2 * LAYERS + 1
    weights = load_file(case.hugging_face / "model.safetensors")
    for name, (columns, gain, bias) in found.items():
        layer = "" if name == "output_layer.weight" else f"model.layers.{name.split('.')[2]}."
        norm = {"linear_qkv": "input_layernorm", "linear_fc1": "post_attention_layernorm", "output_layer": "model.norm"}
        prefix = layer + norm[name.split(".")[-2]]
        weights[f"{prefix}.weight"], weights[f"{prefix}.bias"] = gain[0].float(), bias[0].float()
        for reader in READERS[name.split(".")[-2]]:
            weights[f"{layer}{reader}.weight"] = (weights[f"{layer}{reader}.weight"].double() @ columns).float()
    (tmp_path / "student").mkdir()
    save_file(weights, tmp_path / "student" / "model.safetensors", {"format": "pt"})
    (tmp_path / "student" / "config.json").write_bytes((case.hugging_face / "config.json").read_bytes())
    tokens, _ = batch()
    expected = hugging_face_logits(case.hugging_face, tokens)
    actual = hugging_face_logits(tmp_path / "student", tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def functions(directory: Path) -> dict[str, torch.Tensor]:
    """What a Plan makes readers behind norms see, whatever gains are rounded to: [N diag(g'), N beta'] of each."""
    file, found = load_file(directory / "plan.safetensors"), {}
    for name in (name for name in file if "norm" not in name and "linear_fc2" not in name):
        columns, gain, bias = (file[each].double() for each in (name, norm_name(name), bias_name(name)))
        found[name] = torch.cat([columns * (gain + 1), columns @ bias.t()], dim=1)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "PP2 VPP2",
        pytest.param("TP2 SP DP2", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.soak) for name in LAYOUTS if name not in ("PP2 VPP2", "TP2 SP DP2")),
    ],
)
def test_maps_do_not_depend_on_the_layout(name: str, case: Repaired, tmp_path: Path) -> None:
    world_size, layout = LAYOUTS[name]
    arguments = case.teacher, layout, case.plain, RepairConfig(), tmp_path / "plan"
    run_distributed(world_size, repair_together, *arguments)
    expected, found = functions(case.directory), functions(tmp_path / "plan")
    assert found.keys() == expected.keys() and len(found) == 2 * 3 + 1
    for tensor, values in expected.items():
        largest = float(values.abs().max())
        np.testing.assert_allclose(found[tensor], values, rtol=0, atol=1e-5 * largest, err_msg=tensor)


@pytest.mark.slow
def test_a_killed_repair_goes_on_with_gains_and_biases_and_ends_with_the_same_bits(
    case: Repaired, tmp_path: Path
) -> None:
    arguments = case.teacher, Layout(), case.plain, IN_PASSES
    [passes] = run_distributed(1, passes_of_repair, *arguments, tmp_path / "undisturbed")
    source, target = case.plain.source, case.plain.target
    assert passes == step.planned(source, target, PruneConfig(repair=IN_PASSES), Layout(), 32)[0] > 3
    directory = tmp_path / "killed" / "plan"
    run_distributed(1, killed_repair, "_watch", 2, *arguments, directory)
    assert run_distributed(1, passes_of_repair, *arguments, directory) == [passes - 2]
    assert_made_again(directory, tmp_path / "undisturbed")


def test_a_tied_model_keeps_its_final_norm(tmp_path: Path) -> None:
    tied = repaired(tmp_path, "nemotron", tied=True)
    assert not any(name.startswith((FINAL, "output")) for name in tied.plan.matrices)
    assert len(tied.plan.matrices) == 3 * (2 * 3 + 1)


def trained(directory: Path, steps: int) -> Path:
    """A tiny model that has learnt, for so many updates, which tokens follow each other in texts of `chained`."""
    hugging_face = write_tiny("nemotron", directory, num_layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(hugging_face, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for seed in range(steps):
        tokens = chained(seed, 16)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(hugging_face)
    return hugging_face


def chained(seed: int, sequences: int) -> torch.Tensor:
    """[sequences, 32]: each of 250 tokens is followed by one of three, of one more often than of the others."""
    successors = torch.randint(0, 250, (250, 4), generator=torch.Generator().manual_seed(0))
    successors[:, 3] = successors[:, 0]
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = [torch.randint(0, 250, (sequences,), generator=generator)]
    while len(tokens) < 32:
        tokens.append(successors[tokens[-1], torch.randint(0, 4, (sequences,), generator=generator)])
    return torch.stack(tokens, dim=1)


def loss_of(student: Path, tokens: torch.Tensor) -> float:
    logits = torch.from_numpy(run_distributed(1, logits_of, student, tokens)[0])
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.slow
def test_a_repaired_cut_of_a_trained_model_loses_less_on_text_that_nothing_has_seen(tmp_path: Path) -> None:
    convert(trained(tmp_path / "hf", 150), tmp_path / "teacher", "megatron", progress=False)
    source = Architecture.load(tmp_path / "teacher")
    plain = Plan(
        source, source.resized({Axis.HIDDEN: 40}), tuple(range(LAYERS)), kept_hidden=a_plan(source).kept_hidden
    )
    text = chained(-1, 64), torch.ones(64, 32)
    run_distributed(1, repair_together, tmp_path / "teacher", Layout(), plain, RepairConfig(), tmp_path / "plan", text)
    losses = {"teacher": loss_of(tmp_path / "teacher", chained(-2, 64))}
    for name, plan in (("plain", plain), ("repaired", Plan.load(tmp_path / "plan" / "plan.json"))):
        prune(tmp_path / "teacher", plan, tmp_path / name)
        losses[name] = loss_of(tmp_path / name, chained(-2, 64))
    assert losses["teacher"] < 2  # ln 3 for who knows the chain, ln 250 for who knows nothing
    assert losses["teacher"] < losses["repaired"] < losses["plain"] - 0.5


QKV_BIAS = "decoder.layers.0.self_attention.linear_qkv.layer_norm_bias"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no bias": (lambda p: p["matrices"].pop(QKV_BIAS), f"{QKV_BIAS}: a LayerNorm gets a gain and a bias"),
    "no gain": (lambda p: p["matrices"].pop(FINAL + "weight"), f"{FINAL}bias: a LayerNorm gets a gain and a bias"),
    "a bias as gain": (lambda p: p["matrices"][QKV_BIAS].update(kind="gain"), "not the gain of a norm"),
    "a gain as bias": (lambda p: p["matrices"][FINAL + "weight"].update(kind="bias"), "not the bias of a norm"),
    "too long": (lambda p: p["matrices"][QKV_BIAS].update(shape=[1, 41]), "or of another size"),
    "a factor": (lambda p: p["norm_scales"].update({FINAL + "weight": 1.1}), "norm_scales are not for the norms of"),
    "rotated": (lambda p: p.update(rotated=True, kept_hidden=None), "rotated, but the norms of nemotron are not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_refused_in_one_line(damage: str, case: Repaired, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    path = tmp_path / "plan.json"
    path.write_bytes((case.directory / "plan.json").read_bytes())
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as error:
        Plan.load(path)
    assert "\n" not in str(error.value)
