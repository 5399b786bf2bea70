"""The papers' claims, tried at a scale that runs on a CPU, with the code that ships.

    minitron convert recipes/quickstart.yaml && minitron prepare recipes/quickstart.yaml
    python -m benchmarks.claims [--models small smollm2] [--seeds 3] [--place runs/claims] [--base runs/quickstart]

Cells (shape, cut, training, seed) are measured one after the other: all of a model's first seed, then of the second.
What is there is not measured again, so a killed run goes on where it was. After each model, or at once with
--tables-only, the page of tables and its pictures are written from the cells. A cell does not say by which rates it was
trained: who changes `models.py` or `arms.py` takes another --place. The small model's teacher is trained first, if it
is not there; SmolLM2's is the quickstart's source, not corrected.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.claims.cells import Claims
from benchmarks.claims.claims import arms, claims
from benchmarks.claims.models import SETTINGS, SMALL, SMOLLM2
from benchmarks.claims.page import write_page
from benchmarks.claims.small import make_teacher
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout

DOCUMENTS = Path(__file__).parents[2] / "docs" / "evidence"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--place", type=Path, default=Path("runs/claims"), help="where cells and students go")
    parser.add_argument(
        "--base", type=Path, default=Path("runs/quickstart"), help="SmolLM2's run with teacher and data"
    )
    parser.add_argument("--documents", type=Path, default=DOCUMENTS, help="where the page and its pictures go")
    parser.add_argument("--tables-only", action="store_true", help="measure nothing")
    return parser.parse_args()


def measure(bench: Claims, seeds: int) -> None:
    if bench.setting is SMALL:
        make_teacher(bench.teacher.parent, bench.scratch_recipe())
    bench.measure("teacher.json", bench.teacher)
    for seed in range(seeds):
        for arm in arms(claims(bench.setting)):
            bench.run(arm, seed)
    bench.learn_from_scratch()


def main() -> None:
    options = parse()
    if SMOLLM2.name in options.models and not (options.base / "teacher").exists() and not options.tables_only:
        raise SystemExit(
            f"{options.base}/teacher: not there; convert and prepare recipes/quickstart.yaml, or name --base"
        )
    bases = {SMALL.name: options.place / "small" / "base", SMOLLM2.name: options.base}
    benches = {name: Claims(setting, bases[name], options.place / name) for name, setting in SETTINGS.items()}
    if not options.tables_only:
        launch.join_job()
        launch.initialize(Layout(), 0)
        for name in options.models:
            measure(benches[name], options.seeds)
            write_page(list(benches.values()), options.seeds, options.documents)
        launch.shutdown()
    else:
        write_page(list(benches.values()), options.seeds, options.documents)


if __name__ == "__main__":
    main()
