"""What the papers say, as comparisons of arms at equal tokens and equal order of the text.

P1 is arXiv 2407.14679, P2 arXiv 2408.11796.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from benchmarks.claims.arms import (
    AGGREGATED,
    CE,
    CONSTANT,
    CORRECTED,
    DYNAMIC,
    JSD,
    KD,
    KD_CE,
    PAPERS,
    RANDOM,
    REVERSE,
    SCRATCH,
    Arm,
)
from benchmarks.claims.models import Setting

LOWER, HIGHER, LEVEL, NO_LOWER = "lower", "higher", "level", "no lower"


@dataclass(frozen=True)
class Comparison:
    """The loss of `own` minus that of `other`; `said` is what the papers say about `own`, None where nothing."""

    own: Arm
    other: Arm
    said: str | None


@dataclass(frozen=True)
class Claim:
    statement: str
    source: str
    comparisons: tuple[Comparison, ...]


def claims(setting: Setting) -> list[Claim]:
    main, deep = setting.main, setting.deep
    kd = Arm(main, PAPERS, KD)
    deep_kd = Arm(deep, PAPERS, KD)
    return [
        Claim(
            "Distillation beats cross-entropy on the pruned model",
            "P1 table 14: MMLU 37.8 against 24.6 at equal compute; P2 figure 6",
            (Comparison(kd, Arm(main, PAPERS, CE), LOWER),),
        ),
        Claim(
            "A pruned start beats random weights, distilled or not",
            "P1 table 1: 0.38 against 2.34 after 1.8 B tokens; table 14",
            (
                Comparison(kd, Arm(main, SCRATCH, KD), LOWER),
                Comparison(kd, Arm(main, SCRATCH, CE), LOWER),
                Comparison(Arm(main, SCRATCH, KD), Arm(main, SCRATCH, CE), None),
            ),
        ),
        Claim(
            "What stays should be ranked by importance, not drawn",
            "P2 figure 6, 9 B tokens",
            (
                Comparison(Arm(main, PAPERS), Arm(main, RANDOM), LOWER),
                Comparison(kd, Arm(main, RANDOM, KD), LOWER),
            ),
        ),
        Claim(
            "(l2, mean) is the aggregation of importance to use; (mean, mean) is level with it",
            "P1 table 11 before training; figure 5 after it, for (l2, l2)",
            tuple(_aggregations(main)),
        ),
        Claim(
            "Right after the cut width is ahead of depth",
            "P1 table 1: 6.33 against 8.35; P2 figure 7; the blog of Llama-3.1-Minitron has it the other way round",
            tuple(Comparison(Arm(width, PAPERS), Arm(depth, PAPERS), LOWER) for width, depth in setting.equal),
        ),
        Claim(
            "After distillation width is ahead of depth",
            "P1 table 13: 2.049 against 2.155 and 2.177",
            tuple(Comparison(Arm(width, PAPERS, KD), Arm(depth, PAPERS, KD), LOWER) for width, depth in setting.equal),
        ),
        Claim(
            "Where depth is cut hard, losses of intermediate states help",
            "P1 table 17: 2.141 against 2.155",
            (Comparison(Arm(deep, PAPERS, DYNAMIC), deep_kd, LOWER),),
        ),
        Claim(
            "A dynamic alpha is better than a constant one",
            "P1 section 3, no figures",
            (Comparison(Arm(deep, PAPERS, DYNAMIC), Arm(deep, PAPERS, CONSTANT), LOWER),),
        ),
        Claim(
            "Where width is cut, they are no gain",
            "P1 table 18: MMLU 58.0 against 58.3",
            (
                Comparison(Arm(main, PAPERS, DYNAMIC), kd, NO_LOWER),
                Comparison(Arm(main, PAPERS, CONSTANT), kd, NO_LOWER),
            ),
        ),
        Claim(
            "KL alone beats KL with cross-entropy, and forward KL beats reverse",
            "P1 table 15: 2.107 against 2.117; table 16: 2.155 against 2.665",
            (
                Comparison(kd, Arm(main, PAPERS, KD_CE), LOWER),
                Comparison(kd, Arm(main, PAPERS, REVERSE), LOWER),
                Comparison(kd, Arm(main, PAPERS, JSD), None),
            ),
        ),
        *([_correction(kd, Arm(main, PAPERS, CORRECTED))] if setting.correction else []),
    ]


def _aggregations(main: str) -> Iterator[Comparison]:
    """Of the eight others before any training; after it what P1 shows, and the one that is level."""
    for cut in AGGREGATED:
        if cut != PAPERS:
            yield Comparison(Arm(main, PAPERS), Arm(main, cut), LEVEL if cut == "(mean, mean)" else LOWER)
    yield Comparison(Arm(main, PAPERS, KD), Arm(main, "(l2, l2)", KD), LOWER)
    yield Comparison(Arm(main, PAPERS, KD), Arm(main, "(mean, mean)", KD), None)


def _correction(kd: Arm, corrected: Arm) -> Claim:
    return Claim(
        "Correcting the teacher on the text of the distillation lowers the student's loss",
        "P2 section 2: by more than 6 %",
        (Comparison(corrected, kd, LOWER),),
    )


def arms(listed: Sequence[Claim]) -> list[Arm]:
    """All arms of these claims, each once: those of every claim's first comparison, then of the second ones."""
    rounds = zip_longest(*(claim.comparisons for claim in listed))
    pairs = [pair for each in rounds for pair in each if pair is not None]
    return list(dict.fromkeys(arm for pair in pairs for arm in (pair.own, pair.other)))
