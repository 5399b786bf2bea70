"""What a recipe's stages amount to, one after the other: each cuts the student of the one before.

    source --stage 1--> student --stage 2--> smaller student ...

Their teacher is the source throughout, or each one's the student of the one before (`teacher.model`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_nemo.config import WHOLE, CorrectionConfig, Recipe, said
from minitron_nemo.errors import UserError
from minitron_nemo.plan_text import text as text_of_one
from minitron_nemo.preflight import Preflight, preflight

STAGES = "stages"  # directory below the run's, with one for each stage
SHARED = ("convert", "prepare", "correct")  # steps that all stages have in common


def plans(recipe: Recipe, world_size: int | None = None, distils: bool = True) -> list[Preflight]:
    """`preflight` of every stage in order, or of a recipe without any. Raises UserError naming stage and key."""
    if not recipe.stages:
        return [preflight(recipe, world_size, distils)]
    if recipe.from_run is not None:
        raise UserError("from_run: a recipe with stages makes its Scores itself; leave it out")
    found: list[Preflight] = []
    for name, own in stage_recipes(recipe).items():
        try:
            found.append(preflight(own, world_size, distils, name, found))
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from None
    return found


def stage_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe for each stage, by name and in order: the whole one with what the stage says in its place.

    Empty without stages. The correction is the first stage's, whose student the others have in the end. Raises
    UserError naming the key.
    """
    whole = OmegaConf.structured(replace(recipe, stages={}))
    found: dict[str, Recipe] = {}
    for name, stage in recipe.stages.items():
        key = f"stages.{name}"
        _check_stage(key, name, stage, first=not found)
        try:
            own: Any = OmegaConf.to_object(OmegaConf.merge(whole, stage))
        except OmegaConfBaseException as error:
            raise UserError(f"{key}.{said(error)}") from None
        if found:
            own.teacher.correction = CorrectionConfig()
            if own.teacher.model == "previous" and own.teacher.cache.path is None:
                own.teacher.cache.path = str(stage_directory(own, name) / "teacher_cache")  # of another teacher
        found[name] = own
    return found


def stage_directory(recipe: Recipe, name: str | None) -> Path:
    """Where a stage's files are; those of a recipe without stages, for None."""
    run_dir = Path(recipe.run_dir)
    return run_dir if name is None else run_dir / STAGES / name


def _check_stage(key: str, name: str, stage: Any, first: bool) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{key}: {name!r} becomes a directory; use letters, digits, '-', '_' and '.'")
    if not isinstance(stage, dict):
        raise UserError(f"{key}: {stage!r} is no part of a recipe; give it sections, e.g. {key}.prune.hidden_size")
    if misplaced := [section for section in WHOLE if section in stage]:
        raise UserError(f"{key}.{misplaced[0]}: belongs to the whole recipe; move it out of the stage")
    teacher = stage.get("teacher")
    if not first and isinstance(teacher, dict) and "correction" in teacher:
        raise UserError(f"{key}.teacher.correction: only the source is corrected, before the first stage; leave it out")


def check_choice(recipe: Recipe, only: str | None, until: str | None, stage: str | None) -> None:
    """Raise UserError unless a part of the chain is named that this recipe has."""
    names = ", ".join(recipe.stages)
    if stage is not None and stage not in recipe.stages:
        raise UserError(f"--stage: {stage} is no stage of the recipe; {f'it has {names}' if names else 'it has none'}")
    if not recipe.stages:
        return
    if until is not None:
        raise UserError(f"--until {until}: the recipe has stages ({names}), each with a pruning; run it whole")
    if stage is None and only is not None and only not in SHARED:
        raise UserError(f"{only}: the recipe has stages ({names}); say which by --stage NAME")
    if stage is not None and only in SHARED:
        raise UserError(f"--stage: {only} is not of one stage alone; leave it out")


def to_dict(found: list[Preflight]) -> dict[str, Any]:
    """`Preflight.to_dict` of a recipe, with one of each stage where there are any."""
    if found[0].stage is None:
        return found[0].to_dict()
    stages = {str(plan.stage): plan.to_dict() for plan in found}
    total = {kind: _total(found, kind) for kind in ("tokens", "flops")}
    return {"name": found[0].recipe.name, "stages": stages, **total}


def text(found: list[Preflight], layouts: bool = False) -> str:
    """The plans as a person reads them, with tables of other layouts if asked for."""
    if found[0].stage is None:
        return text_of_one(found[0], layouts)
    parts = [
        f"{f'stage {number} of {len(found)}':<26}{plan.stage}\n{text_of_one(plan, layouts)}"
        for number, plan in enumerate(found, start=1)
    ]
    rows = [
        *((f"tokens, {name}", f"{count:,}") for name, count in _total(found, "tokens").items()),
        *((f"FLOPs, {name}", f"{count:.3e} (arithmetic)") for name, count in _total(found, "flops").items()),
    ]
    if (seconds := _seconds(found)) is not None:
        hours = seconds / 3600 * found[0].world_size
        lacking = ", without what is not known" if any(plan.estimate.untimed for plan in found) else ""
        rows.append(("time", f"{seconds / 86400:.3g} days, {hours:,.1f} device-hours (arithmetic){lacking}"))
    kept = sum(each.total for plan in found for each in plan.estimate.disk)
    rows.append(("disk", f"{kept / 1e9:.3g} GB (arithmetic)"))
    parts.append("\n".join([f"{'all stages':<26}{len(found)}", *(f"{name:<26}{value}" for name, value in rows)]))
    return "\n\n".join(parts)


def _total(found: list[Preflight], kind: str) -> dict[str, int]:
    """Tokens or FLOPs by step, over all stages."""
    total = Counter[str]()
    for plan in found:
        total.update(getattr(plan, kind))
    return dict(total)


def _seconds(found: list[Preflight]) -> float | None:
    """Of all steps that run a model, over all stages; None where it is not known of one."""
    known = [plan.estimate.seconds for plan in found]
    return sum(sum(seconds.values()) for seconds in known if seconds is not None) if None not in known else None
