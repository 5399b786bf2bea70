"""docs/recipe.md against config.py: the tables of a section have all of its keys, no others, and its defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING as NONE_GIVEN
from dataclasses import Field, fields, is_dataclass
from typing import Any

import pytest
import yaml
from omegaconf import MISSING

from minitron_nemo.config import PhaseConfig, Recipe, TextSource
from tests.documents import ROOT

PAGE = (ROOT / "docs" / "recipe.md").read_text()
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##? |^### |\Z)", PAGE, re.MULTILINE | re.DOTALL))
TOP = re.search(r"^## Keys\n(.*?)^### ", PAGE, re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| (`[a-z][\w.]*`(?:, `[a-z][\w.]*`)*) \| ?(.*?) ?\| ", re.MULTILINE)
TABLE = re.compile(r"^\| key \| default \| meaning \|\n(?:\|.*\n)+", re.MULTILINE)
ASKED_FOR_LATER = {"train"}  # a list that may not be empty
UNITS = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def told(text: str) -> dict[str, str]:
    """Keys of a section's tables, with what is said of their defaults."""
    found = {}
    for names, cell in ROW.findall("".join(TABLE.findall(text))):
        keys = re.findall(r"`([\w.]+)`", names)
        defaults = cell.split(", ") if len(keys) > 1 and cell.count(", ") == len(keys) - 1 else [cell] * len(keys)
        found.update(zip(keys, defaults, strict=True))
    return found


def value(cell: str) -> Any:
    """A default as it is written: a number, with a unit or without, true, false, a list, or a word in backticks."""
    if unit := re.fullmatch(r"(\d+) (\wiB)", cell):
        return int(unit[1]) * UNITS[unit[2]]
    if number := re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", cell):
        return float(number[0])
    return yaml.safe_load(cell.strip("`"))


def keys(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a dataclass and of those within, with its default; an empty list is as good as none."""
    for field in fields(section):
        if is_dataclass(field.default_factory):
            yield from keys(field.default_factory, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, default_of(field)


def default_of(field: Field) -> Any:
    if field.default_factory is not NONE_GIVEN:
        return field.default_factory() or None
    return field.default


def compare(text: str, there: dict[str, Any]) -> None:
    table = told(text)
    assert set(table) == set(there)
    for key, default in there.items():
        if default == MISSING or key in ASKED_FOR_LATER:
            assert table[key] == "required", key
        elif default is None:  # in words: what holds instead
            assert not re.fullmatch(r"[\d.e-]+|true|false|required", table[key]), key
        else:
            assert value(table[key]) == default, key


NAMES = [field.name for field in fields(Recipe) if is_dataclass(field.default_factory)]


@pytest.mark.parametrize("name", NAMES)
def test_a_section_has_the_keys_and_defaults_of_the_code(name: str) -> None:
    (section,) = (field.default_factory for field in fields(Recipe) if field.name == name)
    compare(SECTIONS[name], dict(keys(section)))


def test_so_has_the_top_of_a_recipe() -> None:
    assert TOP is not None
    compare(TOP[1], {name: default for name, default in keys(Recipe) if "." not in name})


@pytest.mark.parametrize(("name", "kind"), [("data", TextSource), ("train", PhaseConfig)])
def test_what_lists_are_made_of_is_named(name: str, kind: type) -> None:
    assert [field.name for field in fields(kind) if f"`{field.name}`" not in SECTIONS[name]] == []
