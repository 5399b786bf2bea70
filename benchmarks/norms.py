"""A cut of hidden channels behind LayerNorm: plain, with constants, and with readers fitted by least squares.

    python -m benchmarks.norms [--place runs/norms] [--seeds 3]

The teacher is a Nemotron of random weights, trained here by cross-entropy on the quickstart's text, as the small one of
`benchmarks.claims` is. Cells (arm, seed, before or after distillation) are files in --place; what is there is not
measured again, so a killed run goes on where it was. A seed is the order of the text. --measured prints the table of
what there is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.bench import UNREPAIRED, Bench, Cell, paired, slug
from benchmarks.claims.models import SMALL
from benchmarks.claims.small import make_teacher
from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import parameters
from minitron_nemo.arch.plan import FILE_NAME, Plan
from minitron_nemo.importance.scores import Array
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.plan import make_plan
from minitron_nemo.pruning.prune import prune
from minitron_nemo.pruning.repair import fits, repair_plan

TEACHER = Architecture(
    num_layers=6,
    hidden_size=192,
    ffn_hidden_size=768,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=4096,
    max_position_embeddings=512,
    rotary_percent=0.5,
    family="nemotron",
    model_type="nemotron",
)
SHAPE, HIDDEN = "hidden 2/3", 128
PLAIN = "plain"
ARMS: dict[str, tuple[str, ...]] = {
    PLAIN: UNREPAIRED,
    # So large a ridge leaves of the fit what it is pulled to: the plain cut times a constant for each norm.
    "constants": ("prune.repair.hidden=true", "prune.repair.ridge=1e9"),
    "readers": ("prune.repair.hidden=true",),
}


class Norms(Bench):
    def learn(self, steps: int) -> None:
        """Make the teacher, unless it is there."""
        alone = ("distill.logits_weight=0", "distill.ce_weight=1", "distill.intermediate.pairs=[]")
        recipe = self.recipe(*SMALL.scratch, *alone, f"train.steps={steps}")
        make_teacher(self.teacher.parent, recipe, TEACHER)

    def student(self, arm: str) -> Path:
        return self.place / f"{slug(arm)}.samples_{self.samples}"

    def run(self, cell: Cell) -> None:
        if self.losses(cell.file) is not None:
            return
        student = self.student(cell.arm)
        if not student.exists():
            self.cut(cell.arm, student)
        if cell.steps:
            self.measure_trained(cell, student, self.teacher, "distill.intermediate.pairs=[]")
        else:
            self.measure(cell.file, student)

    def cut(self, arm: str, destination: Path) -> None:
        model, batches = self.calibration
        shape = (f"prune.hidden_size={HIDDEN}", f"prune.ffn_hidden_size={TEACHER.ffn_hidden_size}")
        config = self.recipe(*shape, *ARMS[arm]).prune
        plan = make_plan(self.scores, model.architecture, config)
        if fits(plan.source, plan.target, config.repair):
            repair_plan(model, batches, plan, config.repair, self.place / "plan", destination.name)
            plan = Plan.load(self.place / "plan" / FILE_NAME)
        prune(self.teacher, plan, destination)


def table(bench: Norms, options: argparse.Namespace) -> str:
    """Markdown: per arm and steps, loss minus the teacher's and minus the plain cut's."""
    teacher = bench.losses("teacher.json")
    if teacher is None:
        raise SystemExit(f"{bench.place}: the teacher's loss is not there; measure it first")
    columns = ("arm", "parameters", "updates", f"loss minus the teacher's {teacher.mean():.3f}", f"minus {PLAIN}")
    lines = [f"| {' | '.join(columns)} | seed by seed |", "|---|---|---|---|---|---|"]
    for steps in (0, options.steps):
        plain = by_seed(bench, PLAIN, steps, options.seeds)
        for arm in ARMS:
            own = by_seed(bench, arm, steps, options.seeds)
            if not own:
                continue
            size = f"{parameters(Architecture.load(bench.student(arm))) / 1e6:.2f} M"
            loss = paired(own, dict.fromkeys(own, teacher))
            against = "" if arm == PLAIN else paired(own, plain)
            lines.append(f"| {arm} | {size} | {steps} | {loss} | {against} | {each(own, plain)} |")
    return "\n".join(lines)


def by_seed(bench: Norms, arm: str, steps: int, seeds: int) -> dict[int, Array]:
    """Losses of the seeds that have been measured; before training there is one."""
    found = {seed: bench.losses(Cell(SHAPE, arm, seed, steps).file) for seed in range(seeds if steps else 1)}
    return {seed: losses for seed, losses in found.items() if losses is not None}


def each(own: dict[int, Array], others: dict[int, Array]) -> str:
    """The mean difference of each seed, where seeds differ."""
    found = [f"{(own[seed] - others[seed]).mean():+.3f}" for seed in sorted(own.keys() & others.keys())]
    return ", ".join(found) if len(set(found)) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("runs/norms"), help="where teacher, students and cells go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SMALL.steps, help="of distillation, of 2048 tokens")
    parser.add_argument("--teacher-steps", type=int, default=400, help="of the teacher's training")
    parser.add_argument("--measured", action="store_true", help="measure nothing more")
    options = parser.parse_args()
    base = options.place / "base"
    bench = Norms(base, options.place, samples=SMALL.samples, documents=SMALL.documents, overrides=SMALL.overrides)
    if not options.measured:
        launch.join_job()
        launch.initialize(Layout(), 0)
        bench.learn(options.teacher_steps)
        bench.measure("teacher.json", bench.teacher)
        for steps, seeds in ((0, 1), (options.steps, options.seeds)):
            for seed in range(seeds):
                for arm in ARMS:
                    bench.run(Cell(SHAPE, arm, seed, steps))
        launch.shutdown()
    print(table(bench, options))


if __name__ == "__main__":
    main()
