"""`minitron`: the command line. No logic beyond reading arguments and turning outcomes into exit codes.

Exit codes: 0 done; 2 the input is wrong; 75 stopped early with state saved; 1 anything else, and what `verify` finds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from minitron_nemo.config import Recipe, load_recipe
from minitron_nemo.errors import SaidByRankZero, UserError

EXIT_DIFFERS = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
LOCAL = "MINITRON_LOCAL"  # set in the processes that cluster.launcher=local and search.launcher=local start

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
    options = command_line().parse_args(arguments)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        return int(options.function(options))
    except SaidByRankZero:
        time.sleep(10)  # an exit code of this rank may end the job, and rank 0 has to say it first
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"minitron: error: {error}" if rank == "0" else f"minitron: error: rank {rank}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line, with one below it for every verb."""
    parser = argparse.ArgumentParser(
        prog="minitron",
        description="Prune a large language model by structure and distil the original into what is left.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    plan = _recipe_verb(verbs, "plan", "check every key of a recipe and print parameters, tokens, steps and FLOPs")
    forms = plan.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print JSON instead of a table")
    forms.add_argument("--shell", action="store_true", help="print the variables that launch/common.sh needs")
    plan.set_defaults(function=_plan)
    for name, description in STEPS.items():
        step = _recipe_verb(verbs, name, description)
        step.add_argument("--stage", metavar="NAME", help="of a recipe with stages: only what belongs to this one")
        step.set_defaults(function=_steps, until=None)
    verbs.choices["run"].add_argument("--until", choices=("prune",), help="end after this step")
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

VERIFY = """Read weights again, slice by slice, in bounded memory. DIR: compare with the hashes that were taken when it
was written (fingerprints.json). SRC DST: compare, bit for bit, with what the Plan makes of SRC, or with SRC itself.
RECIPE: the same for what its run directory has of converted teacher, pruned student and exports. Exit code 0: all is
as it should be; 1: it is not, and a line names the first tensor and row; 2: something cannot be read."""

MERGE = """Add passes of calibration up: the Scores of one pass over all their samples. The passes are of one model, in
one precision, at one sequence length, and have no sample in common (prune.calibration.first_sample)."""

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
        print(text(found), *([search.text()] if search else []), sep="\n")
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


def _steps(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    if LOCAL in os.environ:
        _die_with_parent()
    in_job = options.verb != "search" or recipe.search.launcher == "none"
    launched = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    if recipe.cluster.launcher == "local" and in_job and not launched:
        return _launch_locally(recipe, options)
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


def _launch_locally(recipe: Recipe, options: argparse.Namespace) -> int:
    """Start this same command in `cluster.processes_per_node` processes of this machine, as torchrun would.

    Signals are passed on. Returns the exit code of the first process that fails; the others are killed then, since
    they would wait for it. 75 is no failure: every process saves and stops by itself.
    """
    from minitron_nemo.parallel import launch

    launch.silence_known_warnings()
    from minitron_nemo.stages import check_choice, plans

    check_choice(recipe, None if options.verb == "run" else options.verb, options.until, options.stage)
    plans(recipe)  # wrong input is said here, once, before any process starts
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(recipe.cluster.processes_per_node)
    common = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LOCAL: "1",
    }
    common = {"OMP_NUM_THREADS": "1", **os.environ, **common}
    command = [sys.executable, "-m", "minitron_nemo.cli", options.verb, str(options.recipe), *options.overrides]
    for flag in ("until", "stage"):
        if (value := getattr(options, flag)) is not None:
            command += [f"--{flag}", value]
    workers = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(recipe.cluster.processes_per_node)
    ]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, frame: _pass_on(received, workers))
    codes = [worker.poll() for worker in workers]
    while None in codes and not set(codes) - {None, 0, EXIT_STOPPED}:
        time.sleep(0.05)
        codes = [worker.poll() for worker in workers]
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()
    failed = [code for code in codes if code]
    return 0 if not failed else max(failed[0], 1)  # killed by a signal: negative


def _pass_on(received: int, workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.send_signal(received)


def _die_with_parent() -> None:
    """Ask Linux for SIGKILL when the launcher is gone, so that no worker is left to write beside a rerun."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of Linux


if __name__ == "__main__":
    sys.exit(main())
