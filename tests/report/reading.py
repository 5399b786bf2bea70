"""A page taken apart with the standard library: what its charts, tables and sentences say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"


def charts(page: str, section: str) -> dict[str, list[str]]:
    """What the marks of each chart of a section say of themselves, by the chart's title; the first of equal ones."""
    found: dict[str, list[str]] = {}
    for svg in re.findall(r"<svg.*?</svg>", _section(page, section), re.DOTALL):
        root = ElementTree.fromstring(svg)
        says = [title.text or "" for title in root.iter(f"{SVG}title")]
        found.setdefault(root.attrib["aria-label"], says)
    return found


def sentences(page: str, section: str) -> list[str]:
    """The paragraphs of a section, without markup."""
    found = re.findall(r"<p(?: class=\"\w+\")?>(.*?)</p>", _section(page, section), re.DOTALL)
    return [re.sub(r"<[^>]+>", "", text) for text in found]


def rows(page: str, section: str, below: str = "") -> dict[str, list[str]]:
    """Cells of the section's first table, `below` a heading, by the row's label, value and error run together."""
    text = _section(page, section)
    if below:
        text = text.partition(f"<h3>{below}</h3>")[2]
    table = re.search(r"<tbody>.*?</tbody>", text, re.DOTALL)
    assert table is not None
    return {
        label: [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", cells)]
        for label, cells in re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table[0], re.DOTALL)
    }


def html(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
    assert found is not None, name
    return found[0]
