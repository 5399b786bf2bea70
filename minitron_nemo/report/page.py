"""`minitron report`: a run directory as one HTML page."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from minitron_nemo.arch import Plan
from minitron_nemo.checkpoint.files import write_atomic
from minitron_nemo.config import recipe_yaml
from minitron_nemo.pruning.depth import layers_to_drop, wanted
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.target import target_architecture
from minitron_nemo.report import behaviour, candidates, depth, importance, results, training
from minitron_nemo.report.read import Run, read_run

FILE_NAME = "report.html"


def write_report(run_dir: Path, baseline: Path | None = None) -> Path:
    """Write `run_dir`/report.html about what is in `run_dir` by now; the same content gives the same bytes.

    Of a run with stages it links their pages, which are written too. `baseline` is a run whose training is drawn beside
    this one's. Raises UserError for what is no run directory, for damaged files in one, and for a baseline that cannot
    be compared.
    """
    run = read_run(run_dir, baseline)
    for directory in run.stages.values():
        if directory.is_dir():
            write_report(directory)
    return write_page(run)


def write_page(run: Run) -> Path:
    """Write the page of `run` alone: of a run with stages, the one that links those that are there."""
    path = run.directory / FILE_NAME
    write_atomic(path, page(run))
    return path


def page(run: Run) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("minitron_nemo.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["printable"] = printable
    plan, drawn = _plan(run), results.with_loss(run.evaluation)
    return environment.get_template("page.html").render(
        run=run,
        state=_state(run.status),
        stages={name: _link(directory, run.directory) for name, directory in run.stages.items()},
        made_since=results.made_since(run.outdated),
        made_since_tasks=results.made_since(run.outdated_tasks),
        verdict="" if run.outdated else results.verdict(run.evaluation),
        headlines=[] if run.outdated else results.headlines(run.evaluation),
        models=results.table(run.evaluation) if run.evaluation else None,
        model_charts=[results.chart(drawn)] if drawn else [],
        roles=results.ROLES,
        plan=plan,
        cut=run.plan is not None,
        shape=results.shape(plan, run.recipe.data.sequence_length if run.recipe else None) if plan else None,
        cuts=results.cuts(plan) if plan else "",
        **_behaviour(run),
        **_trainings(run),
        **_importance(run, plan),
        candidate_charts=candidates.charts(run.candidates) if run.candidates else [],
        samples=_samples(run.evaluation),
        recipe=recipe_yaml(run.recipe) if run.recipe else "",
        versions=_versions(run.steps),
    )


def printable(text: str) -> str:
    """`text` with visible stand-ins for control characters, which a model may well generate."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter
        for letter in text
    )


def _plan(run: Run) -> Plan | None:
    """The Plan that was carried out, else the one that Scores and recipe will make; None while that is not decided."""
    if run.plan is not None or run.scores is None or run.recipe is None:
        return run.plan
    source, prune = run.scores.architecture, run.recipe.prune
    drop = layers_to_drop(source, target_architecture(source, prune), prune)
    if not drop:
        return make_plan(run.scores, source, prune)
    decisive = {"metric": prune.depth.metric, "precision": prune.calibration.precision}
    if run.depth is None or not decisive.items() <= run.depth.identity.items():
        return None
    if wanted(run.depth, prune.depth_method, drop, prune.depth.normalize):
        return None
    return make_plan(run.scores, source, prune, run.depth)


def _state(status: Mapping[str, Any]) -> str:
    """What the run is doing, in a few words; nothing where it is done, or is just making this page."""
    if not status or status["state"] == "done" or status["step"] == "report":
        return ""
    words = f"{status['state']}, step {status['step']}" if status["step"] else str(status["state"])
    if status["iteration"] is not None:
        words += f", update {status['iteration']:,} of {status['steps']:,}"
    reason = f": {status['reason']}" if status["reason"] else ""
    return f"{words} at {status['time']}{reason}"


def _link(stage: Path, run_dir: Path) -> str:
    """From the run's page to a stage's; "" where it has none yet."""
    path = stage / FILE_NAME
    return path.relative_to(run_dir).as_posix() if path.is_file() else ""


def _behaviour(run: Run) -> dict[str, Any]:
    return {
        "tasks": behaviour.tasks(run.tasks),
        "generation": behaviour.generation(run.evaluation),
        "behaviour_charts": [
            *behaviour.position_charts(run.evaluation),
            *behaviour.task_charts(run.tasks),
            *behaviour.generation_charts(run.evaluation),
        ],
    }


def _trainings(run: Run) -> dict[str, Any]:
    found = run.trainings
    distilled, corrected = (found.get(name) for name in ("distilled", "corrected"))
    weight = run.recipe.distill.logits_weight if run.recipe else 1.0
    levels = {
        name: model["loss"] for name, model in results.with_loss(run.evaluation).items() if name not in run.outdated
    }
    versus = training.versus(distilled, run.baseline) if distilled and run.baseline else None
    return {
        "distillation": training.distillation_charts(distilled, levels, weight) if distilled else [],
        "correction": training.correction_charts(corrected) if corrected else [],
        "facts": training.facts(found),
        "versus": versus[0] if versus else "",
        "versus_charts": [versus[1]] if versus else [],
    }


def _importance(run: Run, plan: Plan | None) -> dict[str, Any]:
    if run.scores is None or plan is None:
        return {"depth": [], "width": []}
    return {
        "depth": depth.charts(run.scores, plan, run.depth, bool(run.recipe and run.recipe.prune.depth.normalize)),
        "width": importance.width_charts(run.scores, plan),
    }


def _samples(evaluation: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By prompt: {"prompt", "continuations": [(model, text), ...]}."""
    names = [name for name in results.models(evaluation) if evaluation[name].get("samples")]
    together: Sequence[Any] = list(zip(*(evaluation[name]["samples"] for name in names), strict=True))
    return [
        {
            "prompt": of_prompt[0]["prompt"],
            "continuations": [(name, each["continuation"]) for name, each in zip(names, of_prompt, strict=True)],
        }
        for of_prompt in together
    ]


def _versions(steps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the steps ran with, each once."""
    found = [f"{name} {version}" for step in steps.values() for name, version in step["versions"].items()]
    return list(dict.fromkeys(found))
