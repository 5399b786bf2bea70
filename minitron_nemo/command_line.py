"""The grammar of the command line: every verb of `minitron` with its arguments and what `--help` says of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minitron_nemo import __version__

STEPS = {
    "run": "the whole chain; unchanged steps are not run again, interrupted ones resume",
    "prepare": "tokenise the text and split off held-out documents",
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
}
# Those that build no model: they run on any machine, whatever cluster.gpu says.
WITHOUT_MODEL = ("convert", "prepare", "prune", "export", "verify")
# What each reads and writes. RUN is `run_dir`; the teacher is RUN/corrected where it is corrected, else RUN/teacher.
FILES = {
    "run": "Reads the recipe, writes all of RUN. Walks the steps convert to export, then tasks and the report.",
    "prepare": "Reads data.train and RUN/teacher/tokenizer, writes RUN/data; comes after convert.",
    "correct": "Reads RUN/teacher and RUN/data, writes RUN/corrected; comes after prepare, with "
    "teacher.correction.steps.",
    "calibrate": "Reads the teacher and RUN/data, writes RUN/scores.npz; comes after prepare, or correct.",
    "score-depth": "Reads the teacher and RUN/data, writes RUN/depth.npz; comes after calibrate, where "
    "prune.depth_method measures.",
    "repair": "Reads the teacher, RUN/data and RUN/scores.npz, writes RUN/plan; comes after calibrate, or score-depth, "
    "where prune.repair fits.",
    "prune": "Reads the teacher and RUN/scores.npz, or RUN/plan, writes RUN/pruned; comes after calibrate, or repair.",
    "cache-teacher": "Reads the teacher and RUN/data, writes teacher.cache.path and RUN/teacher_cache.json; comes "
    "after prepare, or correct, with teacher.placement=cached.",
    "distill": "Reads RUN/pruned, the teacher or its cache, and RUN/data, writes RUN/distilled, with checkpoints in "
    "RUN/training; comes after prune, or cache-teacher.",
    "evaluate": "Reads RUN/teacher, corrected, pruned, distilled and data, writes RUN/evaluation.json; comes after "
    "distill.",
    "export": "Reads RUN/distilled, writes RUN/export; comes after distill.",
    "search": "Reads the teacher, RUN/data and RUN/scores.npz, which it makes where they are missing, writes "
    "RUN/search. Alone, or before the run of the shape that it ranks first.",
}
EPILOG = """start:
  plan, run, report, submit
steps of `run`, in their order:
  convert, prepare, correct, calibrate, score-depth, repair, prune, cache-teacher, distill, evaluate, export, tasks
checkpoints:
  inspect, convert, verify
compare and choose:
  compare, search, merge-scores, make-task

examples:
  minitron plan recipes/quickstart.yaml                 check a recipe, see what it costs
  minitron run recipes/quickstart.yaml train.steps=20   the whole chain, one key changed
  minitron report runs/quickstart                       what came out, or came out so far, as one HTML page
  minitron inspect runs/quickstart/distilled            what is in a checkpoint
  minitron convert SRC DST --to hf                      any checkpoint, other format
"""

STAGE = "run this stage alone (recipes with `stages:`)"
MODELS = "a recipe, or checkpoint directories; key=value changes a recipe key"

CONVERT = """Convert SRC DST --to FORMAT: one read and one write, slice by slice, in bounded memory. Reads Hugging Face
safetensors, Megatron torch_dist, NeMo 2, Megatron-Bridge, legacy Megatron-LM and GGUF; writes Hugging Face (hf),
Megatron torch_dist (megatron), NeMo 2 (nemo) and Megatron-Bridge (bridge)."""

TASKS = """Measure models on tasks. RECIPE: its teacher, pruned and distilled student on evaluate.tasks, into
RUN/tasks.json. DIR ...: checkpoints of any format, on the tasks given here, into --out; other formats are
converted to a temporary Megatron checkpoint. What was measured already is not measured again.

A task is a .jsonl file with context, choices and answer on each line, a .yaml task file of lm-evaluation-harness, or
the name of one of its own tasks; these two need pip install '.[eval]' in the clone.

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
cuts, candidates, sample generations, provenance. One file that needs no network. Of a recipe with stages: one
of each stage, and RUN/report.html links them. `minitron run` ends with it."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
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
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    plan = _recipe_verb(verbs, "plan", "check every key of a recipe and print what it takes: memory, time, disk")
    forms = plan.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print JSON instead of a table")
    forms.add_argument("--shell", action="store_true", help=argparse.SUPPRESS)  # variables for launch/common.sh
    forms.add_argument("--layouts", action="store_true", help="add a table of other layouts, the fastest first")
    for name, description in STEPS.items():
        step = _recipe_verb(verbs, name, description, f"{FILES[name]} RUN is the recipe's run_dir.")
        step.set_defaults(until=None, stage=None)
        if name != "search":
            step.add_argument("--stage", metavar="NAME", help=STAGE)
    verbs.choices["run"].add_argument("--until", choices=("prune",), help="stop after pruning, before the distillation")
    on_tasks = verbs.add_parser(
        "tasks",
        help="measure models on benchmark tasks",
        description=TASKS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on_tasks.add_argument("models", nargs="+", metavar="RECIPE | DIR | key=value", help=MODELS)
    on_tasks.add_argument("--tasks", action="append", metavar="FILE", help="a task; may be repeated")
    on_tasks.add_argument("--out", type=Path, default=Path("tasks.json"), help="of DIRs: file to write [tasks.json]")
    on_tasks.add_argument("--stage", metavar="NAME", help=STAGE)
    on_tasks.set_defaults(until=None)
    compare = verbs.add_parser(
        "compare",
        help="models side by side, differences paired by document",
        description=COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("models", nargs="+", metavar="RUN | DIR | key=value", help=MODELS)
    compare.add_argument("--data", type=Path, metavar="RECIPE | DIR", help="documents to measure on")
    compare.add_argument("--against", metavar="MODEL", help="what others are compared with; default: the first")
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")
    submit = _recipe_verb(verbs, "submit", "check a recipe and submit it to Slurm by its `cluster` section")
    submit.add_argument("--dry-run", action="store_true", help="print the command lines of sbatch instead")
    convert = verbs.add_parser("convert", help="write a checkpoint in another format", description=CONVERT)
    convert.add_argument(
        "source", help="checkpoint directory or .gguf file, or a recipe: then its model.source is converted"
    )
    convert.add_argument("rest", nargs="*", metavar="DST | key=value", help="where to write; overrides after a recipe")
    convert.add_argument("--to", choices=("hf", "megatron", "nemo", "bridge"), help="format to write")
    convert.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="data type to write; default: as stored"
    )
    verify = verbs.add_parser("verify", help="read a checkpoint again: is it what it was made?", description=VERIFY)
    verify.add_argument(
        "source", metavar="DIR | SRC | RECIPE", help="what to verify; what DST was made of; or a recipe"
    )
    verify.add_argument("rest", nargs="*", metavar="DST | key=value", help="what to verify; overrides after a recipe")
    verify.add_argument("--plan", type=Path, help="plan.json that made DST of SRC; default: the one in DST, if any")
    merge = verbs.add_parser("merge-scores", help="add passes of calibration up", description=MERGE)
    merge.add_argument("passes", type=Path, nargs="+", metavar="SCORES", help="scores.npz of a pass")
    merge.add_argument("--out", type=Path, required=True, help="file to write; prune.scores of a recipe takes it")
    task = verbs.add_parser("make-task", help="multiple-choice questions out of held-out text", description=TASK)
    task.add_argument("run", type=Path, help="run directory, whose data is prepared and teacher converted")
    task.add_argument("--out", type=Path, help="directory to write; default: task in the run directory")
    task.add_argument("--questions", type=int, default=400, help="of each part, at most; default: %(default)s")
    task.add_argument(
        "--seed", type=int, default=1234, help="decides which passages are taken and where the right answer stands"
    )
    report = verbs.add_parser("report", help="one HTML page about a run, at any time", description=REPORT)
    report.add_argument("run", type=Path, help="run directory, or the recipe of one")
    report.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. run_dir=DIR")
    report.add_argument("--baseline", type=Path, metavar="RUN", help="a run whose training is drawn beside this one's")
    inspect = verbs.add_parser(
        "inspect", help="what a checkpoint is: family, shape, parameters, format, layout, tensors"
    )
    inspect.add_argument("path", type=Path, help="checkpoint directory or .gguf file")
    inspect.add_argument("--tensor", help="canonical name of one tensor: its shape, data type and statistics")
    return parser


def _recipe_verb(
    verbs: argparse._SubParsersAction, name: str, description: str, files: str = ""
) -> argparse.ArgumentParser:
    said = f"{description[0].upper()}{description[1:]}. {files}".strip()
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=description, description=said)
    parser.add_argument("recipe", type=Path, help="recipe file (YAML); docs/recipe.md explains every key")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. train.lr=1e-4")
    return parser
