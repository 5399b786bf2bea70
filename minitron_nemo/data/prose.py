"""Markup to prose: paragraphs of real sentences out of reStructuredText and Markdown.

Not a parser of either: a filter that drops what is not prose (code, tables, titles, directives, field lists) and
reduces inline markup to its text. A paragraph that is still marked up, short or hardly made of words is left out.
Where a script has no spaces between words, characters are counted for them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

MIN_WORDS = 12
MIN_LETTERS = 0.75  # of a paragraph's characters, spaces aside
CHARACTERS_PER_WORD = 2  # of a script without spaces

_IDEOGRAPHIC = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_PUNCTUATION = "\u3001-\u3003\u3008-\u301f\uff01-\uff0f\uff1a-\uff20\uff5b-\uff65"  # of the same scripts
_WITHOUT_STOP = "\u0e00-\u0eff"  # Thai and Lao end a sentence with nothing but a space
_UNSPACED = re.compile(f"[{_IDEOGRAPHIC}{_WITHOUT_STOP}\u1000-\u109f\u1780-\u17ff]")  # and Burmese, Khmer
_WRAPPED = re.compile(f"(?<=[{_IDEOGRAPHIC}{_PUNCTUATION}])\n(?=[{_IDEOGRAPHIC}{_PUNCTUATION}])")
_BEGINS = "\"'(“「『（《【"
_ENDS = ".!?:)\"'”。！？：）」』．｡।॥؟۔។။።։"

# Directives whose indented content is prose, the latter with an argument that is not; any other is dropped.
_ADMONITIONS = ["attention", "caution", "danger", "error", "hint", "important", "note", "seealso", "tip", "warning"]
_TITLED = [
    "admonition",
    "class",
    "container",
    "deprecated",
    "topic",
    "versionadded",
    "versionchanged",
    "versionremoved",
]
_DIRECTIVE = re.compile(r"\.\.\s+(?:\|[^|]+\|\s+)?([A-Za-z][\w:+.-]*?)::(?:\s|$)")
_BULLET = re.compile(r"(?:[*+•-]|\(?(?:\d+|[A-Za-z#])[.)])(?:\s+|$)")
_FIELD = re.compile(r":[^:`\n]+:(?:\s|$)")
_TABLE = re.compile(r"[=+|-][-=+|\s]*[=+|-]{2}[-=+|\s]*|\|.*\|")
_TITLE_RULE = re.compile(r"([=\-`:'\"~^_*+#<>.])\1{2,}")

_RST_INLINE = (
    (re.compile(r"(?:(?<=\s)|^):[A-Za-z][\w:+.-]*:(?=`)"), ""),  # the role's name; its text follows
    (re.compile(r"(?<=[^\s\w`]):[A-Za-z][\w:+.-]*:(?=`)"), ""),
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`(?:__?)?"), r"\1"),  # `text <target>`
    (re.compile(r"`~(?:[\w-]+\.)*([\w-]+(?:\(\))?)`"), r"\1"),  # `~package.module.name` shows its last part
    (re.compile(r"`[!~]?([^`]+)`(?:__?)?"), r"\1"),
    (re.compile(r"\s?\[(?:\d+|#[\w-]*|\*)\]_"), ""),  # footnotes
    (re.compile(r"\*\*(\S(?:.*?\S)?)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*(\S(?:.*?\S)?)\*(?![\w*])"), r"\1"),
    (re.compile(r"\|(\w[^|]*\w)\|"), r"\1"),
    (re.compile(r"(?<=[^\W_])__?(?=[\s.,;:)!?]|$)"), ""),  # reference_
    (re.compile(r"\\ "), ""),
    (re.compile(r"\\(.)"), r"\1"),
)
_MARKDOWN_INLINE = (
    (re.compile(r"!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])"), ""),
    (re.compile(r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"<((?:https?|mailto):[^>]+)>"), r"\1"),
    (re.compile(r"</?[A-Za-z][^>]*>"), ""),
    (re.compile(r"(`+)(.+?)\1"), r"\2"),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<![\w*])([*_])(?=\S)(.+?)(?<=\S)\1(?![\w*])"), r"\2"),
    (re.compile(r"\\([\\`*_{}\[\]()#+.!|-])"), r"\1"),
)


def rst_to_prose(text: str) -> str:
    """Paragraphs separated by blank lines, each on one line; empty if there is no prose."""
    return _join(_inline(paragraph, _RST_INLINE) for paragraph in _rst_paragraphs(text))


def markdown_to_prose(text: str) -> str:
    """Paragraphs separated by blank lines, each on one line; empty if there is no prose."""
    return _join(_inline(paragraph, _MARKDOWN_INLINE) for paragraph in _markdown_paragraphs(text))


def is_prose(paragraph: str) -> bool:
    """At least MIN_WORDS words, mostly letters, beginning and ending as sentences do, no markup left."""
    if _words(paragraph) < MIN_WORDS or not (paragraph[-1] in _ENDS or re.match(f"[{_WITHOUT_STOP}]", paragraph[-1])):
        return False
    if not (paragraph[0].isalnum() or paragraph[0] in _BEGINS):
        return False
    if any(mark in paragraph for mark in ("::", "``", "\ufffd", ">>>", "|", "`")):
        return False
    dense = "".join(paragraph.split())
    return sum(map(_is_letter, dense)) >= MIN_LETTERS * len(dense)


def _words(paragraph: str) -> int:
    """A few words of such a script within another's text count as they stand there, by the spaces."""
    spaced, unspaced = len(paragraph.split()), len(_UNSPACED.findall(paragraph))
    return max(spaced, unspaced // CHARACTERS_PER_WORD) if 2 * unspaced > len(paragraph) else spaced


def _is_letter(character: str) -> bool:
    """Vowel signs and the like are parts of letters."""
    return character.isalpha() or unicodedata.category(character)[0] == "M"


def _join(paragraphs: Iterable[str]) -> str:
    return "\n\n".join(filter(is_prose, paragraphs))


def _inline(paragraph: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        paragraph = pattern.sub(replacement, paragraph)
    return " ".join(paragraph.split())


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _rst_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs with their inline markup, wherever they are nested."""
    dropped_below: int | None = None  # lines indented deeper than this belong to something that is not prose
    for block in _blocks(text):
        lines = block
        if dropped_below is not None:
            lines = _after_deeper(lines, dropped_below)
            if not lines:
                continue
            dropped_below = None
        first = lines[0].strip()
        indent = _indent(lines[0])
        if first.startswith(".."):
            directive = _DIRECTIVE.match(first)
            if directive is None or directive[1] not in _ADMONITIONS + _TITLED:
                dropped_below = indent  # comments, targets and substitutions as well
                lines = _after_deeper(lines[1:], indent)
            else:
                lines = _directive_content(first[directive.end() :], directive[1], lines[1:])
        for paragraph in _items(lines):
            if paragraph.endswith("::"):
                dropped_below = _indent(lines[-1])
                paragraph = paragraph[:-1]
            yield paragraph


def _directive_content(argument: str, name: str, below: list[str]) -> list[str]:
    """The prose of a directive's first block: its argument too, unless that is a version or a title."""
    content = [line for line in below if not _FIELD.match(line.strip())]
    if argument and name in _ADMONITIONS:
        content.insert(0, " " * (_indent(content[0]) if content else 0) + argument)
    return content


def _after_deeper(lines: list[str], indent: int) -> list[str]:
    """`lines` from the first that is not indented deeper than `indent`."""
    return lines[next((i for i, line in enumerate(lines) if _indent(line) <= indent), len(lines)) :]


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines without a blank line between them."""
    block: list[str] = []
    for line in text.expandtabs(8).splitlines():
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield block
            block = []
    if block:
        yield block


def _items(lines: list[str]) -> Iterator[str]:
    """The paragraphs of one block: list items apart from each other, terms apart from their definitions."""
    if not lines:
        return
    if any(_TABLE.fullmatch(line.strip()) or _TITLE_RULE.fullmatch(line.strip()) for line in lines):
        return  # a table, or a title with its underline
    current: list[str] = []
    indent = _indent(lines[0])
    for line in lines:
        stripped = line.strip()
        if _FIELD.match(stripped) or stripped.startswith(("..", ">>>", "__ ")):
            break
        bullet = _BULLET.match(stripped)
        term_before = len(current) == 1 and _indent(line) > indent
        if current and (bullet or term_before):
            yield _joined(current)
            current = []
        if not current:
            indent = _indent(line) + (bullet.end() if bullet else 0)
            stripped = stripped[bullet.end() :] if bullet else stripped
        current.append(stripped)
    if current:
        yield _joined(current)


def _joined(lines: list[str]) -> str:
    """Lines of one paragraph, with a space between two unless both sides are of a script that has none."""
    return _WRAPPED.sub("", "\n".join(lines)).replace("\n", " ")


def _markdown_paragraphs(text: str) -> Iterator[str]:
    fenced = re.sub(r"(?ms)^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1[ \t]*$|\Z)", "\n", text)
    for block in _blocks(re.sub(r"(?s)<!--.*?-->", "", fenced)):
        in_list = _BULLET.match(block[0].strip())
        if _indent(block[0]) >= 4 and not in_list:
            continue  # indented code
        lines = [re.sub(r"^\s*(?:>\s?)+", "", line) for line in block if not line.lstrip().startswith("#")]
        if lines:
            yield from _items(lines)
