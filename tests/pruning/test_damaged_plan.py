"""A Plan with repairs whose files were damaged: refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.arch import Plan
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.prune import prune
from tests.pruning.test_repair import Repaired, repaired


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    return repaired(tmp_path_factory.mktemp("untied"))


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = json.loads((directory / "plan.json").read_text())
        change(data)
        (directory / "plan.json").write_text(json.dumps(data))

    return damage


def _values(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        values = load_file(directory / "plan.safetensors")
        change(values)
        save_file(values, directory / "plan.safetensors")

    return damage


FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FINAL = "decoder.final_layernorm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no matrices": (lambda d: (d / "plan.safetensors").unlink(), "plan.safetensors is not beside it"),
    "cut off": (lambda d: (d / "plan.safetensors").write_bytes(b"\1" * 20), "truncated"),
    "one changed": (_values(lambda v: v[FC2].add_(1)), "is not what the plan was made with"),
    "not finite": (_values(lambda v: v[FC2][0].fill_(np.nan)), "not finite everywhere"),
    "another shape": (_values(lambda v: v.update({FC2: v[FC2][1:].clone()})), "not the fp32 matrix"),
    "another type": (_values(lambda v: v.update({FC2: v[FC2].double()})), "not the fp32 matrix"),
    "one too many": (_values(lambda v: v.update(more=torch.zeros(1, 1))), "more is not in the plan"),
    "old schema": (_edit(lambda p: p.update(schema_version=2)), "schema_version 2 is not 5"),
    "unknown tensor": (_edit(lambda p: p["norm_scales"].update(nothing=1.0)), "the target has no tensor nothing"),
    "no factor": (_edit(lambda p: p["norm_scales"].update({FINAL: -1.0})), "is no factor"),
    "a gain and a factor": (_edit(lambda p: p["norm_scales"].update({FINAL: 1.1})), "or scaled as well"),
    "not a norm": (_edit(lambda p: p["matrices"][FC2].update(kind="gain")), "not the gain of a norm"),
    "a gain too short": (_edit(lambda p: p["matrices"][FINAL].update(shape=[1, 39])), "or of another size"),
    "another gain": (_values(lambda v: v[FINAL].mul_(2)), "is not what the plan was made with"),
    "wrong kind": (_edit(lambda p: p["matrices"][FC2].update(kind="replace")), "does not fit its columns"),
    "columns that stay": (
        _edit(lambda p: p["matrices"].update({QKV.replace("qkv", "proj"): p["matrices"][QKV]})),
        "does not fit its columns",
    ),
    "no mapping": (_edit(lambda p: p.update(matrices=[1])), "not a plan"),
    "another vocabulary": (_edit(lambda p: p["target"].update(vocab_size=200)), "the target's vocab_size is 200"),
    "another rotary base": (_edit(lambda p: p["target"].update(rotary_base=5.0)), "the target's rotary_base is 5.0"),
    "another epsilon": (
        _edit(lambda p: p["target"].update(layernorm_epsilon=0.1)),
        "the target's layernorm_epsilon is 0.1, and no plan changes the source's, 1e-0",
    ),
    "another head size": (_edit(lambda p: p["target"].update(kv_channels=4)), "the target's kv_channels is 4"),
    "outside": (_edit(lambda p: p["kept_hidden"].__setitem__(-1, 64)), "within the source's hidden_size"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_refused_in_one_line_and_leaves_nothing_behind(
    damage: str, untied: Repaired, tmp_path: Path
) -> None:
    directory = tmp_path / "plan"
    shutil.copytree(untied.directory, directory)
    change, message = DAMAGE[damage]
    change(directory)
    with pytest.raises(UserError, match=message) as error:
        prune(untied.teacher, Plan.load(directory / "plan.json"), tmp_path / "student")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan"]
