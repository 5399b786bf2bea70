"""Contexts of NeMo and configurations of Megatron-Bridge that are broken or hostile: one line, and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minitron_nemo.checkpoint.source import open_source
from minitron_nemo.checkpoint.transform import convert
from tests.checkpoint.refusals import Hostile, refused
from tests.checkpoint.weights import same_weights
from tests.tiny import write_tiny_llama


@pytest.fixture
def nemo(tmp_path: Path) -> Path:
    convert(write_tiny_llama(tmp_path / "hf"), tmp_path / "source", "nemo", progress=False)
    return tmp_path / "source"


@pytest.fixture
def bridge(tmp_path: Path) -> Path:
    convert(write_tiny_llama(tmp_path / "hf"), tmp_path / "source", "bridge", progress=False)
    return tmp_path / "source"


def _context(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = checkpoint / "context" / "io.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def _object(data: dict[str, Any], path: str) -> dict[str, Any]:
    return next(stored for stored in data["objects"].values() if stored.get("paths") == [path])


def _argument(part: str, name: str, node: Any) -> Callable[[dict[str, Any]], None]:
    """Give the object at `<root>.part` another argument; None takes it away."""

    def change(data: dict[str, Any]) -> None:
        stored = _object(data, f"<root>.{part}")
        key = f"Attr(name='{name}')"
        stored["items"] = [item for item in stored["items"] if item[0] != key]
        if node is not None:
            stored["items"].append([key, node])

    return change


def _leaf(value: Any) -> dict[str, Any]:
    return {"type": "leaf", "value": value}


def _class(module: str, name: str) -> Callable[[dict[str, Any]], None]:
    """Let the context say that model.config is made by another class or function."""

    def change(data: dict[str, Any]) -> None:
        metadata = data["objects"][_object(data, "<root>.model.config")["metadata"]["key"]]
        metadata["items"][0][1] = {"type": "pyref", "module": module, "name": name}

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_class("os", "system"), "os.system is not supported"),
        (_class("nemo.collections.llm.gpt.model.gemma", "GemmaConfig2B"), "GemmaConfig2B is not supported"),
        (_argument("model.tokenizer", "pretrained_model_name", _leaf("../../hf")), "outside the checkpoint"),
        (_argument("model.tokenizer", "pretrained_model_name", _leaf("/etc")), "outside the checkpoint"),
        (_argument("model.tokenizer", "pretrained_model_name", _leaf("link")), "outside the checkpoint"),
        (
            _argument("model.config.generation_config", "pretrained_model_name_or_path", _leaf("../..")),
            "outside the checkpoint",
        ),
        (_argument("model.config", "num_layers", None), "model.config.num_layers is None"),
        (_argument("model.config", "num_layers", _leaf("4")), "model.config.num_layers is '4'"),
        (_argument("model.config", "seq_length", _leaf(None)), "model.config.seq_length is None"),
        (_argument("model.config", "rotary_base", _leaf([1])), r"model.config.rotary_base is \[1\]"),
        (_argument("model.config", "num_query_groups", _leaf(0)), "num_query_groups is 0"),
        (_argument("model.config", "add_bias_linear", _leaf(True)), "add_bias_linear is True"),
        (_argument("model.config", "num_moe_experts", _leaf(8)), "num_moe_experts is 8"),
        (_argument("model.config", "qk_layernorm", _leaf(True)), "qk_layernorm is True"),
        (
            _argument("model.config", "activation_func", {"type": "pyref", "module": "os", "name": "system"}),
            "activation_func is 'os.system'",
        ),
        (_argument("model.config", "window_size", _leaf([128, 0])), r"window_size is \[128, 0\]; only None"),
        (_argument("model.config", "window_size", _leaf(7)), "window_size is 7"),
        (_argument("model", "config", None), "not a context"),
        (_argument("model", "config", {"type": "ref", "key": "nothing"}), "not a context"),
        (_argument("model", "model_transform", {"type": "ref", "key": "object_1"}), "merge them first"),
        (lambda data: data.update(version="0.0.2"), "'0.0.2'"),
        (lambda data: data.pop("root"), "not a context"),
        (lambda data: data.update(objects=[1]), "not a context"),
        (lambda data: _object(data, "<root>.model").update(items=["config"]), "not a context"),
        (lambda data: data.update(root="<root>"), "not a context"),
    ],
)
def test_broken_and_hostile_contexts(
    tmp_path: Path, nemo: Path, change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    (nemo / "context" / "link").symlink_to(tmp_path / "hf")
    assert open_source(nemo).architecture.num_layers == 4  # as it is, it is read
    _context(nemo, change)
    refused(nemo, named, tmp_path)


def test_pickles_in_a_context_run_nothing(tmp_path: Path, nemo: Path) -> None:
    marker = tmp_path / "marker"
    hostile = pickle.dumps(Hostile(os.system, f"touch {marker}"))
    (nemo / "context" / "0ea1").write_bytes(hostile)

    def pickled(path: str) -> Callable[[dict[str, Any]], None]:
        """What NeMo writes for an object that JSON cannot hold: its class, and the name of a file with a pickle."""

        def change(data: dict[str, Any]) -> None:
            stored = _object(data, path)
            kind = {"type": "pyref", "module": "nemo.collections.llm.gpt.model.llama", "name": "LlamaConfig"}
            stored.update(type=kind, items=[["IdentityElement()", "0ea1"]], metadata=None)

        return change

    _context(nemo, pickled("<root>.model.config.generation_config"))
    _context(nemo, pickled("<root>.model.tokenizer"))
    convert(nemo, tmp_path / "back", "hf", progress=False)  # neither is needed for the model
    assert same_weights(tmp_path / "hf", tmp_path / "back")
    _context(nemo, pickled("<root>.model.config"))
    refused(nemo, "in a pickle, which is not read", tmp_path)
    (nemo / "context" / "io.json").unlink()
    (nemo / "context" / "io.pkl").write_bytes(hostile)
    refused(nemo, "io.json: not found", tmp_path)
    (nemo / "context" / "io.json").write_bytes(hostile)
    refused(nemo, "not valid JSON", tmp_path)
    assert not marker.exists()


def _run_config(checkpoint: Path, text: str) -> None:
    (checkpoint / "iter_0000000" / "run_config.yaml").write_text(text)


def test_broken_and_hostile_run_configs(tmp_path: Path, bridge: Path) -> None:
    marker = tmp_path / "marker"
    good = yaml.safe_load((bridge / "iter_0000000" / "run_config.yaml").read_text())
    for text, named in (
        (f"model: !!python/object/apply:os.system ['touch {marker}']", "not a run_config"),
        (yaml.safe_dump({"model": {**good["model"], "_target_": "os.system"}}), "os.system is not supported"),
        (yaml.safe_dump({"model": {**good["model"], "qk_layernorm": True}}), "qk_layernorm is True"),
        (yaml.safe_dump({"model": {**good["model"], "add_bias_linear": True}}), "add_bias_linear is True"),
        (yaml.safe_dump({"model": {**good["model"], "activation_func": [1]}}), r"activation_func is \[1\]"),
        (yaml.safe_dump({"model": {**good["model"], "hidden_size": None}}), "hidden_size is None"),
        (yaml.safe_dump({"model": {**good["model"], "rope_scaling": True, "rope_scaling_factor": "x"}}), "rotary"),
        (yaml.safe_dump({"model": [1]}), "not a run_config"),
        ("[", "not a run_config"),
        ("{}", "not a run_config"),
    ):
        _run_config(bridge, text)
        refused(bridge, named, tmp_path)
    assert not marker.exists()


def test_trackers_lead_nowhere_else(tmp_path: Path, bridge: Path) -> None:
    marker = tmp_path / "marker"
    tracker = bridge / "latest_checkpointed_iteration.txt"
    for content, named in (("../../hf", "neither an iteration"), ("7", "iter_0000007, which is not there")):
        tracker.write_text(content)
        refused(bridge, named, tmp_path)
    tracker.unlink()
    torch.save({"step": Hostile(os.system, f"touch {marker}")}, bridge / "latest_train_state.pt")
    refused(bridge, "latest_train_state.pt: refused", tmp_path)
    assert not marker.exists()
