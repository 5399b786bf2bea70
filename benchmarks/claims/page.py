"""The page of tables and its pictures, from the cells alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims import pictures
from benchmarks.claims.arms import AGGREGATED, KD, PAPERS, Arm
from benchmarks.claims.cells import Claims
from benchmarks.claims.claims import arms, claims
from benchmarks.claims.tables import Row, details, reached, rows, summary
from minitron_nemo.arch.counts import non_embedding_parameters, parameters
from minitron_nemo.checkpoint.files import write_atomic

NAME = "claims_tables"
# 2407.14679 table 11: losses before training on the 8T blend and on WikiText2, of (over sequences, over tokens).
TABLE_11 = {
    "(l2, l2)": (8.73, 8.37),
    "(l2, mean)": (7.18, 7.23),
    "(l2, var)": (8.18, 8.61),
    "(mean, l2)": (8.41, 7.84),
    "(mean, mean)": (7.21, 6.89),
    "(mean, var)": (7.94, 8.29),
    "(var, l2)": (9.01, 9.30),
    "(var, mean)": (8.34, 8.72),
    "(var, var)": (10.55, 11.14),
}
HEAD = """# The claims' tables

Written by `python -m benchmarks.claims` from its cells. [What they mean, and by which rule](claims.md). P1 is
2407.14679, P2 2408.11796; losses in nats per token, differences paired over documents, ± one standard error.
"""


def write_page(benches: Sequence[Claims], seeds: int, directory: Path) -> None:
    """`claims_tables.md` and its pictures, of the models of which something has been measured."""
    found = {bench.setting.name: _rows(bench, seeds) for bench in benches}
    benches = [bench for bench in benches if found[bench.setting.name]]
    if not benches:
        raise SystemExit("nothing has been measured yet; leave out --tables-only, or give another --place")
    listed = max((claims(bench.setting) for bench in benches), key=len)
    everything = [row for each in found.values() for row in each]
    parts = [HEAD, "## Verdicts\n", summary(listed, everything), ""]
    for bench in benches:
        name = f"{NAME}_{bench.setting.name}"
        title = f"Differences: {bench.setting.title}"
        pictures.save(pictures.forest(title, found[bench.setting.name]), directory / f"{name}.svg")
        says = "two standard errors over documents on either side; open is what is not resolved"
        parts += [f"![{title}; {says}]({name}.svg)", ""]
    parts += ["## Comparison by comparison\n", details(everything), ""]
    for bench in benches:
        parts += _tokens(bench, seeds, directory)
    parts += _aggregations(benches)
    for bench in benches:
        parts += _losses(bench, seeds)
    write_atomic(directory / f"{NAME}.md", "\n".join(parts))


def _rows(bench: Claims, seeds: int) -> list[Row]:
    listed = enumerate(claims(bench.setting), start=1)
    return [row for number, claim in listed for row in rows(number, claim, bench.setting.title, bench, seeds)]


def _tokens(bench: Claims, seeds: int, directory: Path) -> list[str]:
    """Tokens that random weights take to the loss that distillation reaches."""
    scratch = {
        "the student's shape": bench.curve(bench.place),
        "the teacher's shape": bench.curve(bench.teacher.parent),
    }
    scratch = {label: points for label, points in scratch.items() if points}
    if not scratch:
        return []
    setting = bench.setting
    distilled = bench.by_seed(Arm(setting.main, PAPERS, KD), seeds)
    loss = sum(float(losses.mean()) for losses in distilled.values()) / len(distilled)
    spent = setting.steps * setting.tokens
    lines = [
        f"## Tokens to the same loss: {setting.title}\n",
        f"{setting.main}, {PAPERS}, distilled on {spent:,} tokens: {loss:.3f}, the mean of {len(distilled)} seeds.\n",
        "| from random weights | tokens in all | loss at their end | tokens to that loss | times as many |",
        "|---|---|---|---|---|",
    ]
    for label, points in scratch.items():
        (total, last), tokens = points[-1], reached(points, loss)
        taken = f"{tokens:,.0f} | {tokens / spent:.1f}" if tokens else f"not reached | more than {total / spent:.1f}"
        lines.append(f"| {label} | {total:,.0f} | {last:.3f} | {taken} |")
    name = f"{NAME}_tokens_{setting.name}.svg"
    picture = pictures.learning(scratch, {f"distilled on {spent / 1000:.0f} k": loss})
    pictures.save(picture, directory / name)
    return [*lines, "", f"![{picture.title}, and what distillation reaches]({name})", ""]


def _aggregations(benches: Sequence[Claims]) -> list[str]:
    columns = " | ".join(f"{bench.setting.title}, {bench.setting.main}" for bench in benches)
    lines = [
        "## Aggregations before any training\n",
        f"| over sequences, over tokens | P1 table 11, 8T | WikiText2 | {columns} |",
        "|---|---|---|" + "---|" * len(benches),
    ]
    for cut in AGGREGATED:
        losses = [bench.by_seed(Arm(bench.setting.main, cut), 1) for bench in benches]
        ours = " | ".join(f"{found[0].mean():.3f}" if found else "" for found in losses)
        lines.append(f"| {cut} | {TABLE_11[cut][0]:.2f} | {TABLE_11[cut][1]:.2f} | {ours} |")
    return [*lines, ""]


def _losses(bench: Claims, seeds: int) -> list[str]:
    setting, teacher = bench.setting, bench.losses("teacher.json")
    assert teacher is not None, "a model's teacher is measured first"
    lines = [
        f"## Losses: {setting.title}\n",
        f"Teacher {teacher.mean():.3f}; {setting.documents} documents; {setting.steps} updates of {setting.tokens} "
        "tokens.\n",
        "| shape | hidden, FFN, layers | parameters | without embeddings | arm | loss, seed by seed |",
        "|---|---|---|---|---|---|",
    ]
    for arm in sorted(arms(claims(setting)), key=lambda arm: (list(setting.shapes).index(arm.shape), arm.name)):
        losses = bench.by_seed(arm, seeds)
        if losses:
            size = bench.target(arm)
            counts = f"{parameters(size) / 1e6:.2f} M | {non_embedding_parameters(size) / 1e6:.2f} M"
            shape = ", ".join(map(str, setting.shapes[arm.shape]))
            values = ", ".join(f"{losses[seed].mean():.3f}" for seed in sorted(losses))
            lines.append(f"| {arm.shape} | {shape} | {counts} | {arm.shown} | {values} |")
    return [*lines, ""]
