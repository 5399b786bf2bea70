"""A page taken apart with the standard library: what its charts, tables and sentences say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"


def charts(page: str, section: str, below: str = "") -> dict[str, list[str]]:
    """What the marks of each chart of a section, or of its part `below` a heading, say, by the chart's title."""
    return {title: [said for said, _ in marks] for title, marks in drawn(page, section, below).items()}


def drawn(page: str, section: str, below: str = "") -> dict[str, list[tuple[str, dict[str, str]]]]:
    """The marks of `charts` with the attributes that they are drawn with. Of a title there must be one chart."""
    found = {}
    for root in _charts(page, section, below):
        assert (title := root.attrib["aria-label"]) not in found, f"two charts are called {title}"
        found[title] = [
            (says.text or "", mark.attrib) for mark in root.iter() if (says := mark.find(f"{SVG}title")) is not None
        ]
    return found


def lines(page: str, section: str, title: str) -> list[list[tuple[float, float]]]:
    """The lines of a chart: the points of each, in px from the left and from the top."""
    [root] = [root for root in _charts(page, section, "") if root.attrib["aria-label"] == title]
    found = [path.attrib["d"] for path in root.iter(f"{SVG}path") if path.get("stroke-width") == "1.5"]
    numbers = [re.findall(r"-?[\d.]+", path) for path in found if re.fullmatch(r"M[^A-Z]+(L[^A-Z]+)+", path)]
    return [[(float(x), float(y)) for x, y in zip(line[::2], line[1::2], strict=True)] for line in numbers]


def _charts(page: str, section: str, below: str) -> list[ElementTree.Element]:
    text = _section(page, section)
    if below:
        text = text.partition(f"<h3>{below}</h3>")[2].partition("<h3>")[0]
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def sentences(page: str, section: str) -> list[str]:
    """The paragraphs of a section, without markup."""
    found = re.findall(r"<p(?: class=\"\w+\")?>(.*?)</p>", _section(page, section), re.DOTALL)
    return [re.sub(r"<[^>]+>", "", text) for text in found]


def headlines(page: str) -> list[tuple[str, str]]:
    """Figures and their words."""
    return [
        (figure, words)
        for words, figure in re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page.partition("</header>")[0])
    ]


def verdict(page: str) -> str:
    """The result in words, with simple spaces."""
    return re.sub(r"\s+", " ", re.findall(r'<p class="verdict">(.*?)</p>', page)[0])


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
