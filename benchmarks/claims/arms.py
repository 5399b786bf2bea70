"""What can be done to a teacher: a shape, a cut to it, a training after it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.bench import ACTIVATION, UNREPAIRED, Cell
from benchmarks.claims.models import Setting
from minitron_nemo.importance.scores import AGGREGATIONS

RANDOM, SCRATCH = "random cut", "random init"
PAPERS = "(l2, mean)"
# Over sequences, then over tokens, in the papers' order.
AGGREGATED = {
    f"({batch}, {sequence})": (
        f"prune.calibration.batch_aggregation={batch}",
        f"prune.calibration.sequence_aggregation={sequence}",
    )
    for batch in AGGREGATIONS
    for sequence in AGGREGATIONS
}
PLAIN = (*ACTIVATION, *UNREPAIRED)  # the papers': by activation, sliced, and no more
CUTS = {**AGGREGATED, RANDOM: (), SCRATCH: ()}

KD, CE, KD_CE, REVERSE, JSD = "KD", "CE", "KD + CE", "reverse KL", "JSD"
DYNAMIC, CONSTANT = "KD + hidden, dynamic alpha", "KD + hidden, alpha 1"
CORRECTED = "KD, corrected teacher"
TRAININGS: dict[str, tuple[str, ...]] = {
    KD: (),
    CE: ("distill.logits_weight=0", "distill.ce_weight=1"),
    KD_CE: ("distill.ce_weight=1",),
    REVERSE: ("distill.divergence=reverse_kl",),
    JSD: ("distill.divergence=jsd",),
    DYNAMIC: ("distill.intermediate.alpha=dynamic",),
    CONSTANT: ("distill.intermediate.alpha=1",),
    CORRECTED: (),
}


@dataclass(frozen=True)
class Arm:
    """`training` is None before any."""

    shape: str
    cut: str
    training: str | None = None

    @property
    def name(self) -> str:
        return self.cut if self.training is None else f"{self.cut}, {self.training}"

    @property
    def shown(self) -> str:
        return self.name if self.training else f"{self.cut}, untrained"

    @property
    def drawn(self) -> bool:
        """Whether there is another student for every seed."""
        return self.cut in (RANDOM, SCRATCH)

    @property
    def seeded(self) -> bool:
        """Whether seeds have a bearing on it."""
        return self.drawn or self.training is not None

    def cell(self, setting: Setting, seed: int) -> Cell:
        return Cell(self.shape, self.name, seed if self.seeded else 0, setting.steps if self.training else 0)

    def training_overrides(self, setting: Setting, layers: int) -> tuple[str, ...]:
        """Of a teacher with so many layers. Pairs are the papers' best: embeddings and the third last layers."""
        assert self.training is not None, f"{self.name}: is not trained"
        hidden = self.training in (DYNAMIC, CONSTANT)
        last = setting.shapes[self.shape][2]
        pairs = f"[[-1,-1],[{layers - 3},{last - 3}]]" if hidden else "[]"
        scratch = setting.scratch if self.cut == SCRATCH else ()
        return (*scratch, *TRAININGS[self.training], f"distill.intermediate.pairs={pairs}")
