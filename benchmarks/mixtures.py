"""What repairs are worth on a mixture of experts, before and after a short distillation.

    python -m benchmarks.mixtures [--place runs/mixtures] [--shapes ...] [--arms ...] [--seeds 1] [--steps 40]

The teacher is a Qwen2-MoE of 5 M parameters with a shared expert, trained here by cross-entropy on the quickstart's
text, as the small teacher of `benchmarks.claims` is and with its tokenizer. Each cell (shape, arm, seed, before or
after distillation) is a JSON file of the losses of all documents in --place; what is there is not measured again, so a
killed run goes on where it was. --measured prints the table of what there is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench import ACTIVATION, UNREPAIRED, Bench, Cell, paired, slug
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
    hidden_size=144,
    ffn_hidden_size=192,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=24,
    vocab_size=4096,
    max_position_embeddings=512,
    share_embeddings_and_output_weights=True,
    num_moe_experts=8,
    moe_ffn_hidden_size=192,
    moe_router_topk=2,
    moe_shared_expert_intermediate_size=192,
    family="qwen2_moe",
    model_type="qwen2_moe",
)
UPDATES = 300
TEACHING = ("distill.logits_weight=0", "distill.ce_weight=1", *SMALL.scratch)
NEURONS = ("prune.moe_ffn_hidden_size=128", "prune.moe_shared_expert_intermediate_size=128")
HIDDEN = ("prune.hidden_size=96",)
SHAPES: dict[str, tuple[str, ...]] = {
    "neurons 2/3": NEURONS,
    "neurons 1/6": ("prune.moe_ffn_hidden_size=32", "prune.moe_shared_expert_intermediate_size=32"),
    "hidden 2/3": HIDDEN,
    "both 2/3": (*NEURONS, *HIDDEN),
}
PLAIN, OURS = "ours, unrepaired", "ours"
ARMS: dict[str, tuple[str, ...]] = {"(l2, mean)": (*ACTIVATION, *UNREPAIRED), PLAIN: UNREPAIRED, OURS: ()}


class Mixtures(Bench):
    def run(self, cell: Cell) -> None:
        if self.losses(cell.file) is not None:
            return
        student = self.student(cell)
        if not student.exists():
            self.cut(cell, student)
        if cell.steps:
            self.measure_trained(cell, student, self.teacher, "distill.intermediate.pairs=[]")
        else:
            self.measure(cell.file, student)

    def student(self, cell: Cell) -> Path:
        return self.place / f"{slug(cell.shape)}.{slug(cell.arm)}.samples_{self.samples}"

    def cut(self, cell: Cell, destination: Path) -> None:
        model, batches = self.calibration
        config = self.recipe("prune.ffn_hidden_size=null", *SHAPES[cell.shape], *ARMS[cell.arm]).prune
        plan = make_plan(self.scores, model.architecture, config)
        if fits(plan.source, plan.target, config.repair):
            repair_plan(model, batches, plan, config.repair, self.place / "plan", destination.name)
            plan = Plan.load(self.place / "plan" / FILE_NAME)
        prune(self.teacher, plan, destination)

    def by_seed(self, shape: str, arm: str, steps: int, seeds: int) -> dict[int, Array]:
        """Losses of the seeds that have been measured; before training there is one."""
        found = {seed: self.losses(Cell(shape, arm, seed, steps).file) for seed in range(seeds if steps else 1)}
        return {seed: losses for seed, losses in found.items() if losses is not None}


def bench_of(place: Path, updates: int = UPDATES) -> Mixtures:
    """The bench at `place`, whose teacher is trained for so many updates of 2048 tokens if it is not there."""
    bench = Mixtures(place / "base", place, samples=SMALL.samples, documents=SMALL.documents, overrides=SMALL.overrides)
    make_teacher(place / "base", bench.recipe(*TEACHING, f"train.steps={updates}"), TEACHER)
    return bench


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What is asked for, in the order in which it is measured."""
    for steps in sorted({0, options.steps}):
        for seed in range(options.seeds if steps else 1):
            for shape in options.shapes:
                yield from (Cell(shape, arm, seed, steps) for arm in options.arms)


def table(bench: Mixtures, options: argparse.Namespace) -> str:
    """Markdown: per shape, arm and training, loss minus the teacher's and minus that of the unrepaired cut."""
    teacher = bench.losses("teacher.json")
    assert teacher is not None, "is measured first"
    lines = [
        f"| shape | arm | parameters | updates | loss minus the teacher's {teacher.mean():.3f} | minus {PLAIN} |",
        "|---|---|---|---|---|---|",
    ]
    for shape in options.shapes:
        for steps in sorted({0, options.steps}):
            plain = bench.by_seed(shape, PLAIN, steps, options.seeds)
            for arm in options.arms:
                own = bench.by_seed(shape, arm, steps, options.seeds)
                if own:
                    size = parameters(Architecture.load(bench.student(Cell(shape, arm, 0, 0))))
                    loss = paired(own, dict.fromkeys(own, teacher))
                    against = paired(own, plain) if arm != PLAIN and own.keys() & plain.keys() else ""
                    lines.append(f"| {shape} | {arm} | {size / 1e6:.2f} M | {steps} | {loss} | {against} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--place", type=Path, default=Path("runs/mixtures"), help="where teacher, students and cells go"
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--teaching", type=int, default=UPDATES, help="updates of the teacher, of 2048 tokens")
    parser.add_argument("--steps", type=int, default=40, help="of distillation, of 2048 tokens; 0: none")
    parser.add_argument("--measured", action="store_true", help="measure nothing more")
    return parser.parse_args()


def main() -> None:
    options = parse()
    launch.join_job()
    launch.initialize(Layout(), 0)
    bench = bench_of(options.place, options.teaching)
    bench.measure("teacher.json", bench.teacher)
    for cell in () if options.measured else cells(options):
        bench.run(cell)
    launch.shutdown()
    print(table(bench, options))


if __name__ == "__main__":
    main()
