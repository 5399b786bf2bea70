"""Debian's Chromium, headless, and what can be wrong with a page that it lays out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = (360, 800, 1600)

# Every piece of text with what is drawn of it: [text, left, top, right, bottom], and its chart's number or -1.
TEXTS = """() => {
    const svgs = [...document.querySelectorAll("svg")], found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode, parent = node.parentElement;
        if (!node.data.trim() || parent.closest("title, style")) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        const svg = svgs.indexOf(parent.closest("svg"));
        for (const box of svg < 0 ? range.getClientRects() : [parent.getBoundingClientRect()])
            if (box.width && box.height)
                found.push([node.data.trim(), box.left, box.top, box.right, box.bottom, svg]);
    }
    return found;
}"""
BOXES = """selector => [...document.querySelectorAll(selector)].map(element => {
    const box = element.getBoundingClientRect();
    return [element.getAttribute("aria-label") || element.tagName, box.left, box.top, box.right, box.bottom];
})"""
SLACK = 1.5  # px that boxes of letters may share: they are higher than what is drawn of them

Box = list[Any]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Fails where there is none: `make test` installs it (tests/report/install.sh)."""
    program = shutil.which("chromium")
    assert program is not None, "no chromium; run tests/report/install.sh"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # which root cannot have
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, path: Path, width: int, **context: Any) -> Iterator[tuple[Page, list[str]]]:
    """The page as a window of that width shows it, and all that the browser has to complain of."""
    said: list[str] = []
    window = browser.new_context(viewport={"width": width, "height": 900}, **context)
    page = window.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    try:
        yield page, said
    finally:
        window.close()


def faults(page: Page) -> list[str]:
    """Text over text, text cut off by its chart, figures over each other, and a page that is wider than its window."""
    texts, svgs = page.evaluate(TEXTS), page.evaluate(BOXES, "svg")
    figures = page.evaluate(BOXES, "figure, table, article, pre, p")
    found = [f"{one[0]!r} overlaps {other[0]!r}" for one, other in _overlaps(texts)]
    found += [f"{one} overlaps {other}" for one, other in _overlaps(figures)]
    for text in texts:
        if text[5] >= 0 and not _within(text, svgs[text[5]]):
            found.append(f"{text[0]!r} is cut off in {svgs[text[5]][0]}")
    width, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    return found + ([f"{width} px wide in a window of {window}"] if width > window else [])


def _overlaps(boxes: list[Box]) -> list[tuple[Box, Box]]:
    boxes = sorted(boxes, key=lambda box: box[2])
    return [
        (one, other)
        for index, one in enumerate(boxes)
        for other in boxes[index + 1 :]
        if other[2] < one[4] - SLACK
        and one[2] < other[4] - SLACK
        and other[1] < one[3] - SLACK
        and one[1] < other[3] - SLACK
    ]


def _within(text: Box, svg: Box) -> bool:
    return (
        text[1] > svg[1] - SLACK and text[2] > svg[2] - SLACK and text[3] < svg[3] + SLACK and text[4] < svg[4] + SLACK
    )
