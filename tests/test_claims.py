"""The benchmark of the papers' claims: its judgements on losses whose differences are known, and cells end to end."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.claims.arms import CE, KD, PAPERS, RANDOM, SCRATCH, Arm
from benchmarks.claims.cells import Claims
from benchmarks.claims.claims import LEVEL, LOWER, NO_LOWER, Claim, Comparison, claims
from benchmarks.claims.models import SETTINGS, SMALL
from benchmarks.claims.page import write_page
from benchmarks.claims.small import TEACHER
from benchmarks.claims.tables import AGREES, CONTRADICTS, UNRESOLVED, Difference, details, reached, rows, summary
from minitron_nemo.arch import Architecture
from minitron_nemo.arch.counts import non_embedding_parameters
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.importance.scores import Array
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from tests.pool import run_distributed
from tests.text import write_documents
from tests.tiny import write_tiny_llama

OWN, OTHER = Arm("width 1/2", PAPERS, KD), Arm("width 1/2", PAPERS, CE)


class Synthetic:
    def __init__(self, losses: dict[Arm, dict[int, Array]]) -> None:
        self.losses = losses

    def by_seed(self, arm: Arm, seeds: int) -> dict[int, Array]:
        return {seed: losses for seed, losses in self.losses.get(arm, {}).items() if seed < seeds}


def judged(own: dict[int, Array], other: dict[int, Array], said: str | None) -> tuple[str, Difference]:
    claim = Claim("a claim", "a paper", (Comparison(OWN, OTHER, said),))
    (row,) = rows(1, claim, "a model", Synthetic({OWN: own, OTHER: other}), seeds=3)
    return row.verdict, row.difference


def documents(generator: np.random.Generator, seeds: int = 3) -> dict[int, Array]:
    """Losses that differ between documents by far more than any difference of arms."""
    hardness = generator.normal(5.0, 2.0, 64)
    return {seed: hardness + generator.normal(0.0, 0.05, 64) for seed in range(seeds)}


def shifted(losses: dict[int, Array], *by: float) -> dict[int, Array]:
    noise = np.random.default_rng(9)
    return {seed: losses[seed] + by[seed] + noise.normal(0.0, 0.05, losses[seed].shape) for seed in losses}


def test_a_true_difference_is_resolved_with_its_sign() -> None:
    other = documents(np.random.default_rng(0))
    for shift, verdict in ((-0.1, AGREES), (0.1, CONTRADICTS)):
        found, difference = judged(shifted(other, shift, shift, shift), other, LOWER)
        assert found == verdict
        assert difference.mean == pytest.approx(shift, abs=0.02)
        assert difference.error == pytest.approx(0.05 / np.sqrt(3 * 64), rel=0.4)


def test_an_absent_difference_is_not_resolved_and_is_level() -> None:
    other = documents(np.random.default_rng(1))
    assert judged(shifted(other, 0.0, 0.0, 0.0), other, LOWER)[0] == UNRESOLVED
    assert judged(shifted(other, 0.0, 0.0, 0.0), other, LEVEL)[0] == AGREES
    assert judged(shifted(other, 0.1, 0.1, 0.1), other, LEVEL)[0] == CONTRADICTS
    assert judged(shifted(other, 0.0, 0.0, 0.0), other, None)[0].endswith(UNRESOLVED)


def test_no_gain_is_level_or_worse() -> None:
    other = documents(np.random.default_rng(10))
    for shift, verdict in ((-0.1, CONTRADICTS), (0.0, AGREES), (0.1, AGREES)):
        assert judged(shifted(other, shift, shift, shift), other, NO_LOWER)[0] == verdict


def test_a_difference_that_nobody_would_see_is_not_resolved() -> None:
    other = documents(np.random.default_rng(8))
    for shift, verdict in ((0.001, UNRESOLVED), (0.003, AGREES)):
        found, difference = judged({seed: losses - shift for seed, losses in other.items()}, other, LOWER)
        assert difference.error < 1e-6
        assert found == verdict


def test_seeds_of_different_signs_resolve_nothing() -> None:
    other = documents(np.random.default_rng(2))
    found, difference = judged(shifted(other, -0.2, -0.2, 0.05), other, LOWER)
    assert abs(difference.mean) > 2 * difference.error
    assert found == UNRESOLVED


def test_pairs_are_documents() -> None:
    """The same losses, one arm's in another order of documents, have the same mean and are far from resolved."""
    other = documents(np.random.default_rng(3))
    own = shifted(other, -0.1, -0.1, -0.1)
    mixed = {seed: np.roll(losses, 7) for seed, losses in own.items()}
    assert judged(own, other, LOWER)[0] == AGREES
    found, difference = judged(mixed, other, LOWER)
    assert (found, difference.mean) == (UNRESOLVED, pytest.approx(judged(own, other, LOWER)[1].mean))


def test_only_seeds_that_both_have_are_compared() -> None:
    other = documents(np.random.default_rng(4))
    own = {2: other[2] - 0.3, 1: other[1] - 0.1}
    del other[2]
    _, difference = judged(own, other, LOWER)
    assert difference.seeds == pytest.approx((-0.1,))


def test_an_arm_without_seeds_is_compared_with_every_seed() -> None:
    plain, drawn = Arm("width 1/2", PAPERS), Arm("width 1/2", RANDOM)
    losses = documents(np.random.default_rng(5))
    claim = Claim("a claim", "a paper", (Comparison(plain, drawn, LOWER),))
    measured = Synthetic({plain: {0: losses[0] - 1.0}, drawn: losses})
    (row,) = rows(1, claim, "a model", measured, seeds=3)
    assert len(row.difference.seeds) == 3
    assert row.verdict == AGREES


def test_tables_have_every_measured_comparison() -> None:
    listed = claims(SMALL)
    compared = [comparison for claim in listed for comparison in claim.comparisons]
    losses = documents(np.random.default_rng(6))
    measured = Synthetic(dict.fromkeys([arm for pair in compared for arm in (pair.own, pair.other)], losses))
    found = [row for number, claim in enumerate(listed, 1) for row in rows(number, claim, "a model", measured, seeds=3)]
    assert len(details(found).splitlines()) == 2 + len(compared)
    assert len(summary(listed, found).splitlines()) == 2 + len(listed)
    verdicts = [line.split(" | ")[-1] for line in summary(listed, found).splitlines()[2:]]
    # Comparisons of untrained models alone have no seeds.
    untrained = [not any(pair.own.seeded or pair.other.seeded for pair in claim.comparisons) for claim in listed]
    assert ["(seeds:" not in verdict for verdict in verdicts] == untrained
    assert "not measured" in summary(listed, [row for row in found if row.number != 1])


def test_tokens_are_read_off_the_line_between_points() -> None:
    curve = [(100.0, 6.0), (200.0, 5.0), (300.0, 5.5), (400.0, 4.0)]
    assert reached(curve, 5.25) == pytest.approx(175)
    assert reached(curve, 6.5) == 100
    assert reached(curve, 3.9) is None


def test_width_and_depth_are_compared_at_equal_parameters() -> None:
    for setting in SETTINGS.values():
        for pair in setting.equal:
            sizes = [setting.shapes[shape] for shape in pair]
            heads = (6, 2, 32, 4096) if setting is SMALL else (9, 3, 64, 49152)
            counts = [non_embedding_parameters(architecture(*size, *heads)) for size in sizes]
            assert counts[0] == pytest.approx(counts[1], rel=0.01)


def architecture(hidden: int, ffn: int, layers: int, heads: int, groups: int, channels: int, rows: int) -> Architecture:
    return Architecture(layers, hidden, ffn, heads, groups, channels, rows, 512)


def test_a_page_is_made_of_cells_alone(tmp_path: Path) -> None:
    """Distilled students 0.1 below those of cross-entropy, and nothing else measured, on one of the models."""
    bench = Claims(SMALL, tmp_path / "base", tmp_path / "place")
    bench.teacher.mkdir(parents=True)
    TEACHER.save(bench.teacher)
    other = np.random.default_rng(7).normal(5.0, 1.0, SMALL.documents)
    points = [[1000.0, 7.0], [2000.0, other.mean() - 0.2]]
    for file in (tmp_path / "base" / "curve.json", tmp_path / "place" / "curve.json"):
        file.write_text(json.dumps(points))
    cells = {"teacher.json": other - 0.5, OWN.cell(SMALL, 0).file: other - 0.1, OTHER.cell(SMALL, 0).file: other}
    for name, losses in cells.items():
        content = {"settings": bench.settings(), "losses": losses.tolist()}
        (tmp_path / "place" / name).write_text(json.dumps(content))
    write_page([bench, Claims(SETTINGS["smollm2"], tmp_path / "none", tmp_path / "other")], 3, tmp_path)
    page = (tmp_path / "claims_tables.md").read_text()
    assert (
        "| 1a | small, 3.1 M | width 1/2: (l2, mean), KD | (l2, mean), CE | lower | -0.100 ± 0.000 | -0.100 | agrees |"
        in page
    )
    assert page.count("not measured") == len(claims(SMALL)) - 1
    pictures = re.findall(r"\((\w+\.svg)\)", page)
    assert len(pictures) == 2
    for picture in pictures:
        drawing = ElementTree.fromstring((tmp_path / picture).read_text())
        used = set(re.findall(r"var\((--[\w-]+)\)", (tmp_path / picture).read_text()))
        style = drawing.find("{http://www.w3.org/2000/svg}style").text
        assert used <= set(re.findall(r"(--[\w-]+):", style))


@pytest.mark.slow
def test_cells_are_measured_once_by_the_code_that_ships(tmp_path: Path) -> None:
    """Two updates of a tiny model; a cell that is there is read, not measured."""
    write_documents(tmp_path / "text", 30)
    sources = f"data.train=[{{path: {tmp_path / 'text'}}}]", "data.heldout=[]", "data.heldout_fraction=0.3"
    setting = replace(
        SMALL,
        shapes={"width 1/2": (32, 48, 4)},
        overrides=(*SMALL.overrides, *sources, "train.global_batch_size=2", "train.micro_batch_size=2"),
        steps=2,
        samples=4,
        documents=6,
    )
    base = tmp_path / "base"
    convert(write_tiny_llama(tmp_path / "hf", tied=True), base / "teacher", "megatron", progress=False)
    bench = Claims(setting, base, tmp_path / "place")
    prepare_data(bench.recipe().data, base / "teacher" / "tokenizer", base / "data", progress=False)
    cells = [Arm("width 1/2", PAPERS), Arm("width 1/2", PAPERS, KD), Arm("width 1/2", SCRATCH, CE)]
    written = run_distributed(1, measure_twice, bench, cells, timeout=240.0)[0]
    losses = [bench.by_seed(arm, 1)[0] for arm in cells]
    assert [each.shape for each in losses] == [(6,)] * 3
    assert (losses[1] != losses[0]).all()
    assert losses[2].mean() == pytest.approx(np.log(259), abs=0.5)  # random weights know nothing
    assert written == [len(cells), 0]


def measure_twice(bench: Claims, cells: list[Arm]) -> list[int]:
    """How many cells each time wrote."""
    launch.initialize(Layout(), 0)
    written = []
    for _ in range(2):
        before = stamps(bench.place)
        for arm in cells:
            bench.run(arm, 0)
        written.append(len(stamps(bench.place) - before))
    return written


def stamps(place: Path) -> set[tuple[str, int]]:
    return {(file.name, file.stat().st_mtime_ns) for file in place.glob("*.json")}
