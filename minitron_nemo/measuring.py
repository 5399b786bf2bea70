"""`minitron tasks DIR ...` and `minitron compare`: checkpoints wherever they are, without a chain that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minitron_nemo.checkpoint.files import to_json
from minitron_nemo.config import Recipe
from minitron_nemo.errors import UserError, on_every_rank
from minitron_nemo.evaluation import compare, tasks
from minitron_nemo.evaluation.checkpoints import buildable
from minitron_nemo.evaluation.report import read_evaluation
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.report.record import read_record

MODELS = ("pruned", "distilled")  # of a run directory, beside its teacher


def measure_tasks(checkpoints: Sequence[Path], recipe: Recipe, out: Path) -> None:
    """Measure checkpoints of any format on `evaluate.tasks`, write `out` and print the table. Collective.

    Raises UserError for what is no checkpoint, no task, or does not fit the layout.
    """
    if not recipe.evaluate.tasks:
        raise UserError("tasks: no task is given; name files by --tasks FILE")
    on_every_rank(lambda: _check_out(out), launch.rank(), launch.gather)
    with buildable(checkpoints, out.resolve().parent) as models:
        content = tasks.measure_tasks(
            models,
            recipe.evaluate.tasks,
            Layout.from_config(recipe.parallel),
            out,
            precision=recipe.train.precision,
            micro_batch_size=recipe.evaluate.micro_batch_size,
        )
    if launch.rank() == 0:
        print(tasks.table(content), flush=True)


def _check_out(out: Path) -> None:
    """Raise UserError, before anything is measured, for a file that could not be written."""
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: {'a directory' if out.is_dir() else 'no such directory'}; give another file")


def compare_recorded(paths: Sequence[Path], against: str | None, as_json: bool) -> str:
    """Models of run directories, out of what was measured.

    Raises UserError for what cannot be paired, and for figures of models that have been made anew since.
    """
    evaluation = compare.recorded(paths)
    for path in paths:
        _check_current(path if path.is_file() else path / compare.EVALUATION)
    return _shown(compare.compared(evaluation, _one_of(list(evaluation), against)), as_json)


def _check_current(evaluation: Path) -> None:
    """Raise UserError where a model of this file, or of the tasks beside it, has been made anew since."""
    record, on_tasks = read_record(evaluation.parent), evaluation.parent / tasks.FILE_NAME
    for file, verb, outdated in (
        (evaluation, "evaluate", record.outdated_evaluation(read_evaluation(evaluation))),
        (on_tasks, "tasks", record.outdated_tasks(tasks.read_tasks(on_tasks))),
    ):
        for name, step in outdated.items():
            raise UserError(
                f"{file}: {name} was measured before the last {step}; run `minitron {verb}` again when that is done"
            )


def compare_measured(paths: Sequence[Path], prepared: Path, recipe: Recipe, against: str | None, as_json: bool) -> None:
    """Measure checkpoints, and the models of run directories, on the same documents, and print it. Collective.

    Raises UserError for what is no checkpoint or does not fit the documents or the layout.
    """
    checkpoints = [checkpoint for path in paths for checkpoint in _models(path)]
    reference = _one_of([str(path) for path in checkpoints], against)
    with buildable(checkpoints, Path.cwd()) as models:
        evaluation = compare.measured(models, prepared, recipe, Layout.from_config(recipe.parallel), reference)
    if launch.rank() == 0:
        print(_shown(compare.compared(evaluation, reference), as_json), flush=True)


def _models(path: Path) -> list[Path]:
    """The models of a run directory that are there; anything else is one itself."""
    teacher = next((path / name for name in ("corrected", "teacher") if (path / name).is_dir()), None)
    if teacher is None or not (path / "manifest.json").is_file():
        return [path]
    return [teacher, *(path / name for name in MODELS if (path / name).is_dir())]


def _one_of(names: Sequence[str], against: str | None) -> str:
    if against is None:
        return names[0]
    if against.rstrip("/") not in names:
        raise UserError(f"--against: {against} is not one of {', '.join(names)}")
    return against.rstrip("/")


def _shown(comparison: dict[str, object], as_json: bool) -> str:
    return to_json(comparison) if as_json else compare.table(comparison)
