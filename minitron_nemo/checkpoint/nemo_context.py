"""The `context` of a NeMo 2 checkpoint: io.json, which NeMo rebuilds its objects from, and model.yaml, for people.

io.json is Fiddle's: a table of objects by key. A `Config` lists the arguments (leaf, pyref or ref to another object)
that a class or function, named in its metadata, is called with. Here it is read and written as data; nothing that it
names is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from minitron_nemo.checkpoint.files import read_json
from minitron_nemo.checkpoint.tokenizer import GENERATION_FILE
from minitron_nemo.errors import UserError

FILE_NAME = "io.json"
VERSION = "0.0.1"  # of Fiddle's JSON
TOKENIZER_DIRECTORY = "nemo_tokenizer"
ARTIFACTS_DIRECTORY = "artifacts"
CONTEXT_CLASS = "nemo.lightning.io.pl.TrainerContext"
TOKENIZER_CLASS = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"


class Call(NamedTuple):
    """A class or function, by its dotted name, and the arguments it is called with."""

    target: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """What a checkpoint's context says; directories and files are None where it keeps none."""

    config: Call  # plain values; classes, functions and data types as their dotted names
    tokenizer: Path | None
    generation: Path | None


def read_context(directory: Path) -> Context:
    """Read `directory`/io.json. Raises UserError for what is malformed, pickled, or points out of the directory."""
    path = directory / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path}: not found; NeMo 2 keeps the model's configuration there (pickles are not read)")
    data = read_json(path)
    if data.get("version") != VERSION:
        raise UserError(f"{path}: version is {data.get('version')!r}; only {VERSION!r} is known, as NeMo 2.7 writes it")
    try:
        objects = _Objects(path, data["objects"])
        model = objects.argument(objects.call(data["root"], "<root>"), "model")
        if model.arguments.get("model_transform", _NONE) != _NONE:
            raise UserError(f"{path}: model.model_transform: adapters are not read; merge them first (merge_lora)")
        config = objects.argument(model, "config")
        values = {name: objects.value(node) for name, node in config.arguments.items()}
        return Context(
            Call(config.target, values), _tokenizer(objects, model, directory), _generation(objects, config, directory)
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a context of NeMo 2: {type(error).__name__}: {error}") from None


_NONE = {"type": "leaf", "value": None}


class _Objects:
    """The table of objects of an io.json."""

    def __init__(self, path: Path, objects: Mapping[str, Any]) -> None:
        self.path = path
        self.objects = objects

    def call(self, node: Mapping[str, Any], where: str) -> Call:
        """The Config that `node` refers to, its arguments as they are. UserError where it is anything else."""
        stored = self.objects[node["key"]]
        if stored["type"]["name"] != "Config":
            raise UserError(
                f"{self.path}: {where} is stored as {stored['type']['name']}, in a pickle, which is not read; "
                "save it with a NeMo that writes it as JSON"
            )
        metadata = dict(self.objects[stored["metadata"]["key"]]["items"])
        return Call(_dotted(metadata["Attr(name='fn_or_cls')"]), {_name(key): value for key, value in stored["items"]})

    def argument(self, call: Call, name: str) -> Call:
        """The Config that is given as argument `name`."""
        return self.call(call.arguments[name], name)

    def value(self, node: Mapping[str, Any]) -> Any:
        """A leaf, a list of leaves, a dotted name; what else there is, in a form that equals none of these."""
        if node["type"] == "leaf":
            return node["value"]
        if node["type"] == "pyref":
            return _dotted(node)
        stored = self.objects[node["key"]]
        if stored["type"]["name"] in ("list", "tuple"):
            return [item.get("value") for _, item in stored["items"]]
        return f"an object of type {stored['type']['name']}"


def _name(key: str) -> str:
    match = re.fullmatch(r"Attr\(name='(\w+)'\)", key)
    return match.group(1) if match else key


def _dotted(pyref: Mapping[str, Any]) -> str:
    return f"{pyref['module']}.{pyref['name']}"


def _tokenizer(objects: _Objects, model: Call, directory: Path) -> Path | None:
    """The directory of a Hugging Face tokenizer that the context keeps."""
    node = model.arguments.get("tokenizer", _NONE)
    if node["type"] != "ref" or objects.objects[node["key"]]["type"]["name"] != "Config":
        return None
    tokenizer = objects.argument(model, "tokenizer")
    found = tokenizer.arguments.get("pretrained_model_name", _NONE)
    if found["type"] != "leaf" or found["value"] is None:  # a name on the Hugging Face hub is no leaf
        return None
    path = _inside(directory, found["value"], f"{objects.path}: model.tokenizer")
    return path if path.is_dir() else None


def _generation(objects: _Objects, config: Call, directory: Path) -> Path | None:
    """The generation_config.json that the context keeps."""
    node = config.arguments.get("generation_config", _NONE)
    if node["type"] != "ref" or objects.objects[node["key"]]["type"]["name"] != "Config":
        return None
    found = objects.argument(config, "generation_config").arguments.get("pretrained_model_name_or_path", _NONE)
    path = _inside(directory, found["value"], f"{objects.path}: model.config.generation_config") / GENERATION_FILE
    return path if path.is_file() else None


def _inside(directory: Path, relative: str, origin: str) -> Path:
    pure = PurePosixPath(relative)
    path = directory / pure
    if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(directory.resolve()):
        raise UserError(f"{origin} is said to be in {relative!r}, outside the checkpoint")
    return path


def write_context(directory: Path, model_class: str, config: Call, *, tokenizer: bool, generation: bool) -> None:
    """Write io.json and model.yaml of a model; `torch.` or `nemo.` at the start of a value makes it a reference.

    `tokenizer` and `generation` say whether there are files in nemo_tokenizer/ and artifacts/.
    """
    arguments = dict(config.arguments)
    if generation:
        auto_class = "transformers.generation.configuration_utils.GenerationConfig"
        where = {"auto_cls": auto_class, "pretrained_model_name_or_path": f"./{ARTIFACTS_DIRECTORY}"}
        arguments["generation_config"] = Call("nemo.lightning.io.artifact.hf_auto.from_pretrained", where)
    parts: dict[str, Any] = {"config": Call(config.target, arguments)}
    if tokenizer:
        parts["tokenizer"] = Call(TOKENIZER_CLASS, {"pretrained_model_name": TOKENIZER_DIRECTORY})
    model = Call(model_class, parts)
    objects: dict[str, Any] = {}
    root = _store(objects, Call(CONTEXT_CLASS, {"model": model, "trainer": None, "extra": {}}), "<root>")
    content = {"root": root, "objects": objects, "version": VERSION}
    (directory / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n")
    (directory / "model.yaml").write_text(yaml.safe_dump(as_targets(model)))


def _store(objects: dict[str, Any], value: Any, path: str) -> dict[str, Any]:
    """The node for a value, whose objects are added to the table."""
    if isinstance(value, Call):
        arguments = [
            [f"Attr(name='{name}')", _store(objects, argument, f"{path}.{name}")]
            for name, argument in value.arguments.items()
        ]
        metadata = {
            "Attr(name='fn_or_cls')": _pyref(value.target),
            "Attr(name='argument_names')": _builtin(objects, "tuple", list(value.arguments), None),
            "Attr(name='argument_tags')": _builtin(objects, "dict", [], _EMPTY_TUPLE),
            "Attr(name='argument_history')": _builtin(objects, "dict", [], _EMPTY_TUPLE),
        }
        kind = _pyref("fiddle._src.config.BuildableTraverserMetadata")
        described = _add(objects, {"type": kind, "items": [list(item) for item in metadata.items()], "metadata": kind})
        config = {"type": _pyref("fiddle._src.config.Config"), "items": arguments, "metadata": described}
        return _add(objects, config | {"paths": [path]})
    if isinstance(value, dict):  # `extra`, which is empty
        return _builtin(objects, "dict", [], _EMPTY_TUPLE)
    if _is_reference(value):
        return _pyref(value) | {"paths": [path]}
    return {"type": "leaf", "value": value, "paths": [path]}


def _builtin(objects: dict[str, Any], kind: str, items: list[str], metadata: Any) -> dict[str, Any]:
    indexed = [[f"Index(index={index})", item] for index, item in enumerate(items)]
    return _add(objects, {"type": _pyref(f"builtins.{kind}"), "items": indexed, "metadata": metadata})


def _add(objects: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    key = f"object_{len(objects) + 1}"
    objects[key] = stored
    return {"type": "ref", "key": key}


def _pyref(dotted: str) -> dict[str, Any]:
    module, _, name = dotted.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}


_EMPTY_TUPLE: dict[str, Any] = {"type": _pyref("builtins.tuple"), "items": [], "metadata": None}


def as_targets(value: Any) -> Any:
    """Values in the form of NeMo's and Megatron-Bridge's YAML: `_target_` names what is called or referred to."""
    if isinstance(value, Call):
        return {"_target_": value.target, **{name: as_targets(argument) for name, argument in value.arguments.items()}}
    return {"_target_": value, "_call_": False} if _is_reference(value) else value


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("torch.", "transformers.", "nemo.", "megatron."))
