"""The page in a real browser: laid out without faults at every width, in light and dark and on paper."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser

from minitron_nemo.report.page import write_report
from tests.report.browser import WIDTHS, chromium, faults, opened
from tests.report.runs import write_baseline, write_run, write_status

pytestmark = pytest.mark.slow

# Centres of the marks that say something, in px of the window.
MARKS = """chart => {
    const svg = document.querySelector(`#training svg[aria-label="${chart}"]`);
    return [...svg.querySelectorAll("path > title")].map(title => {
        const box = title.parentElement.getBoundingClientRect();
        return [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
    });
}"""
COLOURS = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
    getComputedStyle(document.querySelector("svg text")).fill]"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("browser")
    return write_report(write_run(place / "run"), write_baseline(place / "baseline"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps_or_is_cut_off_and_the_console_is_silent(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    with opened(browser, report, width, color_scheme=scheme) as (page, said):
        assert faults(page) == []
        # Result 1, behaviour 3, distillation 6, baseline 1, correction 4, depth 4, width 5, candidates 2.
        assert page.locator("figure svg").count() == 26
        assert said == []
        assert page.title() == "synthetic: minitron report"  # and not what a model wrote


def test_the_faults_that_are_looked_for_are_found(browser: Browser, report: Path) -> None:
    with opened(browser, report, 800) as (page, _):
        page.evaluate("document.querySelector('h2').style.marginTop = '-30px'")
        assert any("overlaps 'Result'" in fault or "'Result' overlaps" in fault for fault in faults(page))
        page.reload()
        page.evaluate("document.querySelector('svg text').setAttribute('transform', 'translate(-300, 20)')")
        assert any("is cut off in Held-out loss" in fault for fault in faults(page))
        page.evaluate("document.querySelector('h1').style.width = '900px'")
        assert "px wide in a window of 800" in faults(page)[-1]


def test_a_page_of_a_run_that_has_just_begun_is_laid_out_too(browser: Browser, tmp_path: Path) -> None:
    write_status(tmp_path, "running", "convert")
    with opened(browser, write_report(tmp_path), 360) as (page, said):
        assert faults(page) == [] and said == []
        assert page.locator("svg").count() == 0


def test_text_can_be_read_in_light_and_dark_and_on_paper(browser: Browser, report: Path) -> None:
    backgrounds = {}
    for scheme, media in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
        with opened(browser, report, 800, color_scheme=scheme) as (page, _):
            page.emulate_media(media=media)
            background, *inks = page.evaluate(COLOURS)
            assert min(contrast(ink, background) for ink in inks) > 4.5, (scheme, media)  # WCAG 2.2, level AA
            backgrounds[scheme, media] = background
            if media == "print":
                assert faults(page) == []
    assert backgrounds["light", "screen"] == backgrounds["dark", "print"] == "rgb(255, 255, 255)"
    assert backgrounds["dark", "screen"] != "rgb(255, 255, 255)"


def test_marks_lie_where_their_figures_say(browser: Browser, report: Path) -> None:
    """Positions against metrics.jsonl: linear in tokens and in loss, to half a pixel."""
    [metrics] = report.parent.glob("training/distilled-*/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    reports = [each for each in records if "train/loss" in each]
    for chart, tag in (("Throughput", "speed/tokens_per_second"), ("Learning rate", "train/lr")):
        with opened(browser, report, 800) as (page, _):
            marks = page.evaluate(MARKS, chart)
        assert len(marks) == len(reports)
        for position, key in ((0, "data/tokens"), (1, tag)):
            values, places = np.array([[each[key] for each in reports], [mark[position] for mark in marks]])
            slope, offset = np.polyfit(values, places, 1)
            assert np.abs(slope * values + offset - places).max() < 0.5
            assert (slope > 0) == (position == 0)  # up is less in a window


def contrast(one: str, other: str) -> float:
    """Of two colours, rgb(r, g, b), as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        channels = [int(channel) / 255 for channel in re.findall(r"\d+", colour)[:3]]
        linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
