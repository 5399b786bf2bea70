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

from minitron_nemo.config import Recipe, load_recipe, recipe_of
from minitron_nemo.errors import SaidByRankZero, UserError
from minitron_nemo.processes import die_with_parent, launch_locally, launched

EXIT_DIFFERS = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75

STEPS = {
    "correct": "fine-tune the teacher with cross-entropy on the distillation data",
    "calibrate": "score every axis in one forward-only pass over the training text",
    "score-depth": "measure the teacher without some of its layers, to choose the ones that go",
    "repair": "fit, to activations of the teacher, weights that make up for what is cut",
    "prune": "cut the teacher to the target shape, checkpoint to checkpoint",
    "cache-teacher": "keep the teacher's likeliest tokens for every sample the training will visit",
    "distill": "train the pruned student against the teacher",
    "evaluate": "measure teacher, pruned and distilled side by side on held-out text",
    "export": "write the distilled student in the formats of export.formats",
    "search": "cut and briefly distil the shapes within a budget, and rank them",
    "prepare": "tokenise the text and split off held-out documents",
    "run": "the whole chain; unchanged steps are not run again, interrupted ones resume",
}
EXAMPLE = """examples:
  minitron plan recipes/quickstart.yaml                 check a recipe, see what it costs
  minitron run recipes/quickstart.yaml train.steps=20   the whole chain, one key changed
  minitron report runs/quickstart                       what came out, or came out so far, as one HTML page
  minitron inspect runs/quickstart/distilled            what is in a checkpoint
  minitron convert SRC DST --to hf                      any checkpoint, other format
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    options = _parse(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        return int(options.function(options))
    except SaidByRankZero:
        time.sleep(10)  # an exit code of this rank may end the job, and rank 0 has to say it first
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"minitron: error: {error}" if rank == "0" else f"minitron: error: rank {rank}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As argparse does, but for `key=value` behind an option, where it expects no positional arguments any more."""
    parser = command_line()
    options, more = parser.parse_known_args(arguments)
    taking = next((name for name in ("overrides", "models", "rest") if hasattr(options, name)), None)
    if more and (taking is None or any(each.startswith("-") or "=" not in each for each in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if taking is not None:
        getattr(options, taking).extend(more)
    return options


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line, with one below it for every verb."""
    parser = argparse.ArgumentParser(
        prog="minitron",
        description="Prune a large language model by structure and distil the original into what is left.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    plan = _recipe_verb(verbs, "plan", "check every key of a recipe and print what it takes: memory, time, disk")
    forms = plan.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print JSON instead of a table")
    forms.add_argument("--shell", action="store_true", help="print the variables that launch/common.sh needs")
    forms.add_argument("--layouts", action="store_true", help="add a table of other layouts, the fastest first")
    plan.set_defaults(function=_plan)
    for name, description in STEPS.items():
        step = _recipe_verb(verbs, name, description)
        step.add_argument("--stage", metavar="NAME", help="of a recipe with stages: only what belongs to this one")
        step.set_defaults(function=_steps, until=None)
    verbs.choices["run"].add_argument("--until", choices=("prune",), help="end after this step")
    on_tasks = verbs.add_parser(
        "tasks",
        help="measure models on benchmark tasks",
        description=TASKS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on_tasks.add_argument("models", nargs="+", metavar="RECIPE | DIR | key=value", help="what to measure; keys' values")
    on_tasks.add_argument("--tasks", action="append", metavar="FILE", help="a task; may be repeated")
    on_tasks.add_argument("--out", type=Path, default=Path("tasks.json"), help="of DIRs: file to write [tasks.json]")
    on_tasks.add_argument("--stage", metavar="NAME", help="of a recipe with stages: only what belongs to this one")
    on_tasks.set_defaults(function=_tasks, until=None)
    compare = verbs.add_parser(
        "compare",
        help="models side by side, differences paired by document",
        description=COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("models", nargs="+", metavar="RUN | DIR | key=value", help="what to compare; keys' values")
    compare.add_argument("--data", type=Path, metavar="RECIPE | DIR", help="documents to measure on")
    compare.add_argument("--against", metavar="MODEL", help="what others are compared with; default: the first")
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")
    compare.set_defaults(function=_compare)
    submit = _recipe_verb(verbs, "submit", "check a recipe and submit it to Slurm by its `cluster` section")
    submit.add_argument("--dry-run", action="store_true", help="print the command lines of sbatch instead")
    submit.set_defaults(function=_submit)
    convert = verbs.add_parser("convert", help="write a checkpoint in another format", description=CONVERT)
    convert.add_argument(
        "source", help="checkpoint directory or .gguf file, or a recipe: then its model.source is converted"
    )
    convert.add_argument("rest", nargs="*", metavar="DST | key=value", help="where to write; overrides after a recipe")
    convert.add_argument("--to", choices=("hf", "megatron", "nemo", "bridge"), help="format to write")
    convert.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="data type to write; default: as stored"
    )
    convert.set_defaults(function=_convert)
    verify = verbs.add_parser("verify", help="read a checkpoint again: is it what it was made?", description=VERIFY)
    verify.add_argument(
        "source", metavar="DIR | SRC | RECIPE", help="what to verify; what DST was made of; or a recipe"
    )
    verify.add_argument("rest", nargs="*", metavar="DST | key=value", help="what to verify; overrides after a recipe")
    verify.add_argument("--plan", type=Path, help="plan.json that made DST of SRC; default: the one in DST, if any")
    verify.set_defaults(function=_verify)
    merge = verbs.add_parser("merge-scores", help="add passes of calibration up", description=MERGE)
    merge.add_argument("passes", type=Path, nargs="+", metavar="SCORES", help="scores.npz of a pass")
    merge.add_argument("--out", type=Path, required=True, help="file to write; prune.scores of a recipe takes it")
    merge.set_defaults(function=_merge_scores)
    task = verbs.add_parser("make-task", help="multiple-choice questions out of held-out text", description=TASK)
    task.add_argument("run", type=Path, help="run directory, whose data is prepared and teacher converted")
    task.add_argument("--out", type=Path, help="directory to write; default: task in the run directory")
    task.add_argument("--questions", type=int, default=400, help="of each part, at most; default: %(default)s")
    task.add_argument("--seed", type=int, default=1234, help="of what is taken and of the answers' places")
    task.set_defaults(function=_make_task)
    report = verbs.add_parser("report", help="one HTML page about a run, at any time", description=REPORT)
    report.add_argument("run", type=Path, help="run directory, or the recipe of one")
    report.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. run_dir=DIR")
    report.add_argument("--baseline", type=Path, metavar="RUN", help="a run whose training is drawn beside this one's")
    report.set_defaults(function=_report)
    inspect = verbs.add_parser(
        "inspect", help="what a checkpoint is: family, shape, parameters, format, layout, tensors"
    )
    inspect.add_argument("path", type=Path, help="checkpoint directory or .gguf file")
    inspect.add_argument("--tensor", help="canonical name of one tensor: its shape, data type and statistics")
    inspect.set_defaults(function=_inspect)
    return parser


CONVERT = """Convert SRC DST --to FORMAT: one read and one write, slice by slice, in bounded memory. Reads Hugging Face
safetensors, Megatron torch_dist, NeMo 2, Megatron-Bridge, legacy Megatron-LM and GGUF; writes Hugging Face (hf),
Megatron torch_dist (megatron), NeMo 2 (nemo) and Megatron-Bridge (bridge)."""

TASKS = """Measure models on tasks. RECIPE: its teacher, pruned and distilled student on evaluate.tasks, into
RUN/tasks.json. DIR ...: checkpoints of any format, on the tasks given here, into --out; what is no Megatron
checkpoint is converted for the time being. What was measured already is not measured again.

A task is a .jsonl file with context, choices and answer on each line, a .yaml task file of lm-evaluation-harness, or
the name of one of its own tasks; these two need pip install 'minitron_nemo[eval]'.

  minitron tasks recipes/quickstart.yaml --tasks recipes/tasks/opposites.yaml
  minitron tasks runs/quickstart/distilled train.precision=fp32 --tasks recipes/tasks/opposites.jsonl
  torchrun --nproc-per-node 2 -m minitron_nemo.cli tasks DIR parallel.tensor_model_parallel_size=2 --tasks FILE"""

COMPARE = """Models side by side: parameters, loss, KL and agreement, tasks; differences with standard errors over the
documents that all were measured on. Run directories are read (evaluation.json, tasks.json). With --data, checkpoints of
any format are measured, and those of run directories again: on the held-out documents of a recipe, which are prepared
already, or of a directory of prepared data (then evaluate.sequence_length=N says how much of each).

  minitron compare runs/a runs/b
  minitron compare runs/a/distilled runs/b/export/hf --data recipes/quickstart.yaml --against runs/a/distilled"""

VERIFY = """Read weights again, slice by slice, in bounded memory. DIR: compare with the hashes that were taken when it
was written (fingerprints.json). SRC DST: compare, bit for bit, with what the Plan makes of SRC, or with SRC itself.
RECIPE: the same for what its run directory has of converted teacher, pruned student and exports. Exit code 0: all is
as it should be; 1: it is not, and a line names the first tensor and row; 2: something cannot be read."""

MERGE = """Add passes of calibration up: the Scores of one pass over all their samples. The passes are of one model, in
one precision, at one sequence length, and have no sample in common (prune.calibration.first_sample)."""

TASK = """Write choose.jsonl, for prune.depth.task, and judge.jsonl, of other documents, to judge by what was chosen:
which of four continuations belongs to the beginning of a held-out passage? The same data gives the same questions."""

REPORT = """Write RUN/report.html about what the run directory holds by now: results, training curves, importance and
cuts, candidates, sample generations, provenance. One file that needs no network. `minitron run` ends with it."""


def _recipe_verb(verbs: argparse._SubParsersAction, name: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=description, description=description.capitalize() + "."
    )
    parser.add_argument("recipe", type=Path, help="recipe file (YAML); docs/recipe.md explains every key")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. train.lr=1e-4")
    return parser


def _plan(options: argparse.Namespace) -> int:
    from minitron_nemo.parallel import launch

    launch.silence_known_warnings()
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
    from minitron_nemo.parallel import launch

    launch.silence_known_warnings()
    from minitron_nemo.submit import submit

    print(submit(load_recipe(options.recipe, options.overrides), options.recipe, options.overrides, options.dry_run))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from minitron_nemo.checkpoint.inspect import inspect

    print(inspect(options.path, options.tensor))
    return 0


def _report(options: argparse.Namespace) -> int:
    from minitron_nemo.parallel import launch

    launch.silence_known_warnings()
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
        from minitron_nemo.parallel import launch

        launch.silence_known_warnings()
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
    die_with_parent()
    if recipe.cluster.launcher == "local" and not launched():
        return launch_locally(recipe.cluster.processes_per_node, options.arguments, EXIT_STOPPED)
    from minitron_nemo.parallel import launch

    launch.join_job()
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
    if recipe.cluster.launcher == "local" and in_job and not launched():
        from minitron_nemo.parallel import launch

        launch.silence_known_warnings()
        from minitron_nemo.stages import check_choice, plans

        check_choice(recipe, None if options.verb == "run" else options.verb, options.until, options.stage)
        plans(recipe)  # wrong input is said here, once, before any process starts
        return launch_locally(recipe.cluster.processes_per_node, options.arguments, EXIT_STOPPED)
    _stop_outside_steps(Path(recipe.run_dir) if in_job else Path(recipe.run_dir) / "search" / "driver")
    from minitron_nemo.parallel import launch

    launch.outlive_a_full_disk()
    launch.join_job()  # before what imports Megatron-core, whose warnings it silences
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


if __name__ == "__main__":
    sys.exit(main())
