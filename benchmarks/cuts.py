"""Ways to cut the same model to the same size, before and after a short distillation, on the same documents.

    minitron convert recipes/quickstart.yaml && minitron prepare recipes/quickstart.yaml
    python benchmarks/cuts.py --base runs/quickstart [--shapes ...] [--arms ...] [--seeds 3] [--steps 20]

The teacher is the quickstart's source, not corrected; every arm is its recipe with another `prune` section. Each cell
(shape, arm, seed, before or after distillation) is a JSON file of the losses of all documents in --place, written when
it is measured; what is there with the same settings is not measured again, so a killed run goes on where it was. The
tables are made of the files alone; --measured prints them of what there is. A seed is the order of the training text
and, of `random`, the draw of what stays.

Differences are paired over documents, seeds averaged before; with one standard error over documents. One calibration
sample and one model, so they say nothing about others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from bench import ACTIVATION, DISTILLATION, SHAPES, UNREPAIRED, Bench, Cell, paired, slug
from rankings import drawn, magnitudes, ranked

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import non_embedding_parameters, parameters
from minitron_nemo.arch.plan import FILE_NAME, Plan
from minitron_nemo.importance.scores import Array, Scores
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.repair import fits, repair_plan

REPAIRED = ("prune.repair.norm_scale=true", "prune.repair.ffn=true", "prune.repair.hidden=true")
OURS, PAPERS = "ours", "(l2, mean)"
ARMS: dict[str, tuple[str, ...]] = {
    "random": (*ACTIVATION, *UNREPAIRED),
    "magnitude": (*ACTIVATION, *UNREPAIRED),
    PAPERS: (*ACTIVATION, *UNREPAIRED),
    OURS: ("prune.ffn_score=output", *REPAIRED),
    "ours, unrepaired": ("prune.ffn_score=output", *UNREPAIRED),
    "ours, norm scale": ("prune.ffn_score=output", *UNREPAIRED, "prune.repair.norm_scale=true"),
    "ours, untied": ("prune.ffn_score=output", *REPAIRED, "prune.untie=true"),
    "merged heads": (*UNREPAIRED, "prune.repair.merge_heads=true"),
    "rotation, untied": ("prune.ffn_score=output", *REPAIRED, "prune.untie=true", "prune.hidden_method=rotate"),
}
# Cuts of attention alone, beside those of bench.SHAPES: of 9 heads in 3 query groups.
ATTENTION: dict[str, tuple[str, ...]] = {
    "heads 6": ("prune.num_attention_heads=6",),
    "groups 2": ("prune.num_query_groups=2",),
}


class Cuts(Bench):
    def student(self, cell: Cell) -> Path:
        """The student before distillation, which only `random` has one of for every seed."""
        seed = cell.seed if cell.arm == "random" else 0
        return self.place / f"{slug(cell.shape)}.{slug(cell.arm)}.{seed}.samples_{self.samples}"

    def run(self, cell: Cell) -> None:
        if self.losses(cell.file) is not None:
            return
        student = self.student(cell)
        if not student.exists():
            self.cut(cell, student)
        if cell.steps:
            self.measure_trained(cell, student, self.teacher)
        else:
            self.measure(cell.file, student)

    def cut(self, cell: Cell, destination: Path) -> None:
        model, batches = self.calibration
        config = self.recipe(*sizes(cell.shape), *ARMS[cell.arm]).prune
        plan = make_plan(self.ranking(cell), model.architecture, config)
        if fits(plan.source, plan.target, config.repair):
            repair_plan(model, batches, plan, config.repair, self.place / "plan", destination.name)
            plan = Plan.load(self.place / "plan" / FILE_NAME)
        prune(self.teacher, plan, destination)

    def ranking(self, cell: Cell) -> Scores:
        if cell.arm == "random":
            return ranked(self.scores, *drawn(self.scores.architecture, cell.seed))
        return ranked(self.scores, *magnitudes(self.teacher)) if cell.arm == "magnitude" else self.scores


def sizes(shape: str) -> tuple[str, ...]:
    """What a shape sets in the recipe, whose own cut is of the FFN."""
    if shape in ATTENTION:
        return ("prune.ffn_hidden_size=null", *ATTENTION[shape])
    hidden, ffn, layers = SHAPES[shape]
    return f"prune.hidden_size={hidden}", f"prune.ffn_hidden_size={ffn}", f"prune.num_layers={layers}"


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What is asked for, in the order in which it is measured."""
    for steps in sorted({0, options.steps}):
        for seed in range(options.seeds):
            for shape in options.shapes:
                for arm in options.arms:
                    if steps or arm == "random" or seed == 0:
                        yield Cell(shape, arm, seed, steps)


def tables(bench: Cuts, options: argparse.Namespace) -> str:
    """Markdown: per shape and arm, loss minus the teacher's and minus that of the papers' cut, as far as measured."""
    teacher = bench.losses("teacher.json")
    if teacher is None:
        raise SystemExit(f"{bench.place}: the teacher's loss is not there; measure it first")
    lines = []
    for steps in sorted({0, options.steps}):
        columns = ("shape", "arm", "parameters", "without embeddings", f"loss minus the teacher's {teacher.mean():.3f}")
        lines += [f"After {steps} steps:", "", f"| {' | '.join(columns)} | minus {PAPERS} | seed by seed |"]
        lines.append("|---|---|---|---|---|---|---|")
        for shape in options.shapes:
            papers = by_seed(bench, options, shape, PAPERS, steps)
            for arm in options.arms:
                own = by_seed(bench, options, shape, arm, steps)
                if not own:
                    continue
                size = Architecture.load(bench.student(Cell(shape, arm, 0, 0)))
                sizes = f"{parameters(size) / 1e6:.1f} M | {non_embedding_parameters(size) / 1e6:.1f} M"
                loss = paired(own, dict.fromkeys(own, teacher))
                against = f"{paired(own, papers)} | {seeds(own, papers)}" if arm != PAPERS and papers else "|"
                lines.append(f"| {shape} | {arm} | {sizes} | {loss} | {against} |")
        lines.append("")
    return "\n".join(lines)


def by_seed(bench: Cuts, options: argparse.Namespace, shape: str, arm: str, steps: int) -> dict[int, Array]:
    """Losses of the seeds that have been measured; where no seed has a bearing on them, the one counts for all."""
    fixed = steps == 0 and arm != "random"
    found = {seed: bench.losses(Cell(shape, arm, 0 if fixed else seed, steps).file) for seed in range(options.seeds)}
    return {seed: losses for seed, losses in found.items() if losses is not None}


def seeds(own: dict[int, Array], others: dict[int, Array]) -> str:
    """The mean difference of each seed, where seeds differ."""
    found = [f"{(own[seed] - others[seed]).mean():+.3f}" for seed in sorted(own.keys() & others.keys())]
    return ", ".join(found) if len(set(found)) > 1 else ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="a run with teacher and data")
    parser.add_argument("--place", type=Path, help="where students and measurements go; default: BASE_cuts")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES)[:8], choices=[*SHAPES, *ATTENTION])
    parser.add_argument("--arms", nargs="*", default=list(ARMS)[:4], choices=list(ARMS))
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences of 256 tokens")
    parser.add_argument("--documents", type=int, default=32, help="held-out documents of 256 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of distillation, of 512 tokens; 0: none")
    parser.add_argument("--measured", action="store_true", help="measure nothing more")
    return parser.parse_args()


def main() -> None:
    options = parse()
    place = options.place or options.base.with_name(options.base.name + "_cuts")
    bench = Cuts(options.base, place, samples=options.samples, documents=options.documents, overrides=DISTILLATION)
    if not options.measured:
        launch.join_job()
        launch.initialize(Layout(), 0)
        bench.measure("teacher.json", bench.teacher)
        for cell in cells(options):
            bench.run(cell)
        launch.shutdown()
    print(tables(bench, options))


if __name__ == "__main__":
    main()
