"""`minitron`: the command line. No logic beyond reading arguments and turning outcomes into exit codes.

Exit codes: 0 done; 2 the input is wrong; 75 stopped early with state saved; 1 anything else, and what `verify` finds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from minitron_nemo.command_line import WITHOUT_MODEL, parse
from minitron_nemo.config import Recipe, load_recipe, recipe_of
from minitron_nemo.errors import Failed, SaidByRankZero, UserError
from minitron_nemo.parallel.console import outlive_a_full_disk, silence_known_warnings
from minitron_nemo.parallel.environment import launched
from minitron_nemo.processes import die_with_parent, launch_locally

EXIT_DIFFERS = EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    options = parse(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        return int(VERBS.get(options.verb, _steps)(options))
    except SaidByRankZero:
        time.sleep(10)  # an exit code of this rank may end the job, and rank 0 has to say it first
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"minitron: error: {error}" if rank == "0" else f"minitron: error: rank {rank}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Failed as error:
        print(f"minitron: failed: {error}", file=sys.stderr)
        return EXIT_FAILED


def _plan(options: argparse.Namespace) -> int:
    silence_known_warnings()
    from minitron_nemo.stages import plans, text, to_dict

    recipe = load_recipe(options.recipe, options.overrides)
    found = plans(recipe)
    if options.shell:
        from minitron_nemo.submit import shell_variables

        print(shell_variables(recipe))
        return 0
    from minitron_nemo.search.plan import plan_search
    from minitron_nemo.search.shapes import has_grid

    search = plan_search(found[0]) if has_grid(recipe.search) else None
    if options.json:
        print(json.dumps({**to_dict(found), **({"search": search.to_dict()} if search else {})}, indent=2))
    else:
        print(text(found, options.layouts), *([search.text()] if search else []), sep="\n")
    return 0


def _submit(options: argparse.Namespace) -> int:
    silence_known_warnings()
    from minitron_nemo.submit import submit

    print(submit(load_recipe(options.recipe, options.overrides), options.recipe, options.overrides, options.dry_run))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from minitron_nemo.checkpoint.inspect import inspect

    print(inspect(options.path, options.tensor))
    return 0


def _report(options: argparse.Namespace) -> int:
    silence_known_warnings()
    from minitron_nemo.report.page import write_report

    of_recipe = options.run.suffix in (".yaml", ".yml")
    if options.overrides and not of_recipe:
        raise UserError(f"report: {options.overrides[0]} changes a recipe, and {options.run} is a run directory")
    run_dir = Path(load_recipe(options.run, options.overrides).run_dir) if of_recipe else options.run
    try:
        print(write_report(run_dir, options.baseline))
    except OSError as error:
        raise UserError(f"{error.filename or run_dir}: {error.strerror}; no report was written") from None
    return 0


def _convert(options: argparse.Namespace) -> int:
    if options.source.endswith((".yaml", ".yml")):
        options.recipe, options.overrides = Path(options.source), options.rest
        options.until = options.stage = None
        return _steps(options)
    if len(options.rest) != 1 or options.to is None:
        raise UserError("convert: give SRC DST --to hf|megatron|nemo|bridge, or a recipe")
    import torch

    from minitron_nemo.checkpoint.transform import convert

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    convert(Path(options.source), Path(options.rest[0]), options.to, dtype=dtype)
    return 0


def _tasks(options: argparse.Namespace) -> int:
    recipes = [name for name in options.models if name.endswith((".yaml", ".yml"))]
    models, overrides = _apart(options.models)
    overrides += [f"evaluate.tasks=[{','.join(options.tasks)}]"] if options.tasks else []
    if recipes:
        if models != recipes[:1]:
            raise UserError("tasks: give one RECIPE, or DIR ...")
        options.recipe, options.overrides = Path(recipes[0]), overrides
        return _steps(options)
    recipe = recipe_of(overrides)

    def work() -> None:
        from minitron_nemo.measuring import measure_tasks

        measure_tasks(list(map(Path, models)), recipe, options.out)

    return _in_job(recipe, options, work)


def _compare(options: argparse.Namespace) -> int:
    models, overrides = _apart(options.models)
    paths = list(map(Path, models))
    if options.data is None:
        if overrides:
            raise UserError(f"compare: {overrides[0]} changes what is measured, and nothing is without --data")
        silence_known_warnings()
        from minitron_nemo.measuring import compare_recorded

        print(compare_recorded(paths, options.against, options.json))
        return 0
    if options.data.suffix in (".yaml", ".yml"):
        recipe = load_recipe(options.data, overrides)
        prepared = Path(recipe.from_run or recipe.run_dir) / "data"
    else:
        recipe, prepared = recipe_of(overrides), options.data

    def work() -> None:
        from minitron_nemo.measuring import compare_measured

        compare_measured(paths, prepared, recipe, options.against, options.json)

    return _in_job(recipe, options, work)


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths, and changes to keys of a recipe."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def _in_job(recipe: Recipe, options: argparse.Namespace, work: Callable[[], None]) -> int:
    """Do `work` in the processes of the job, or in those that cluster.launcher says."""
    silence_known_warnings()
    from minitron_nemo.recipe_checks import check_keys

    check_keys(recipe)
    die_with_parent()
    if recipe.cluster.launcher == "local" and not launched(os.environ):
        return launch_locally(recipe.cluster.processes_per_node, options.arguments, EXIT_STOPPED)
    from minitron_nemo.parallel import launch

    launch.join_job(gpu=recipe.cluster.gpu)
    work()
    launch.shutdown()
    return 0


def _verify(options: argparse.Namespace) -> int:
    if options.source.endswith((".yaml", ".yml")):
        options.recipe, options.overrides = Path(options.source), options.rest
        options.until = options.stage = None
        return _steps(options)
    if len(options.rest) > 1 or (options.plan is not None and not options.rest):
        raise UserError("verify: give DIR, SRC DST [--plan PLAN], or a recipe")
    from minitron_nemo.arch import Plan
    from minitron_nemo.checkpoint.verify import verify, verify_record

    if not options.rest:
        found, right = verify_record(Path(options.source)), "as its fingerprints.json says"
    else:
        plan = None if options.plan is None else Plan.load(options.plan)
        found, right = verify(Path(options.source), Path(options.rest[0]), plan), f"what is made of {options.source}"
    name = options.rest[0] if options.rest else options.source
    print(f"[verify] {name}: every bit is {right}" if found is None else f"[verify] {name}: DIFFERS: {found.text}")
    return 0 if found is None else EXIT_DIFFERS


def _merge_scores(options: argparse.Namespace) -> int:
    from minitron_nemo.importance.scores import Scores

    scores = Scores.merge([Scores.load(path) for path in options.passes], list(map(str, options.passes)))
    scores.save(options.out)
    print(f"[merge-scores] {options.out}: {scores.sequences} sequences, {scores.tokens:,} tokens")
    return 0


def _make_task(options: argparse.Namespace) -> int:
    from minitron_nemo.data.task import make_task

    run, output = options.run, options.out or options.run / "task"
    made = make_task(
        run / "data", run / "teacher" / "tokenizer", output, questions=options.questions, seed=options.seed
    )
    print(f"[make-task] {output}: " + ", ".join(f"{part}.jsonl {count} questions" for part, count in made.items()))
    return 0


def _steps(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    die_with_parent()
    in_job = options.verb != "search" or recipe.search.launcher == "none"
    if recipe.cluster.launcher == "local" and in_job and not launched(os.environ):
        silence_known_warnings()
        from minitron_nemo.stages import check_choice, plans

        check_choice(recipe, None if options.verb in ("run", "search") else options.verb, options.until, options.stage)
        plans(recipe)  # wrong input is said here, once, before any process starts
        return launch_locally(recipe.cluster.processes_per_node, options.arguments, EXIT_STOPPED)
    _stop_outside_steps(Path(recipe.run_dir) if in_job else Path(recipe.run_dir) / "search" / "driver")
    outlive_a_full_disk()
    from minitron_nemo.parallel import launch

    computes = in_job and options.verb not in WITHOUT_MODEL
    # Before what imports Megatron-core, whose warnings it silences.
    launch.join_job(gpu=recipe.cluster.gpu if computes else None)
    from minitron_nemo.run import run_chain
    from minitron_nemo.steps import Stopped
    from minitron_nemo.verification import verify_run

    if options.verb == "verify":
        right = verify_run(recipe)
        launch.shutdown()
        return 0 if right else EXIT_DIFFERS
    try:
        if options.verb == "search":
            from minitron_nemo.search.driver import search

            search(recipe, options.recipe, options.overrides)
        else:
            run_chain(recipe, None if options.verb == "run" else options.verb, options.until, options.stage)
    except Stopped:
        return EXIT_STOPPED
    launch.shutdown()  # not after an error: other ranks may be in the middle of a collective
    return 0


def _stop_outside_steps(run_dir: Path) -> None:
    """Let SIGTERM and SIGUSR1 end this process where no step has handlers of its own: there is nothing to save."""
    from minitron_nemo.distillation.status import write_status

    def stop(number: int, frame: FrameType | None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_status(run_dir, "stopped", reason=f"{signal.Signals(number).name} outside a step")
        os._exit(EXIT_STOPPED)  # whatever the process is in the midst of: joining the others may take for ever

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


# What is no verb of its own here is a step of the chain, all of it, or the search.
VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "submit": _submit,
    "tasks": _tasks,
    "compare": _compare,
    "convert": _convert,
    "verify": _verify,
    "merge-scores": _merge_scores,
    "make-task": _make_task,
    "report": _report,
    "inspect": _inspect,
}


if __name__ == "__main__":
    sys.exit(main())
