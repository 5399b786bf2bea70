"""Which text comes out of which source, and what is said about sources that are not as they should be."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from minitron_nemo.config import TextSource
from minitron_nemo.data import pypi
from minitron_nemo.data.documents import read_documents, stamp
from minitron_nemo.data.prose import markdown_to_prose, rst_to_prose
from minitron_nemo.errors import UserError

RST = """\
.. _target:

=====
Title
=====

The cache is asked first, and only when it has no answer is the database
asked for the same thing in a `second query <https://example.org/x>`_.

.. note::
    A note is prose as well, and its ``literal`` text and its :class:`~package.module.Name` and
    :ref:`link text <label>` stay readable without the markup.

.. code-block:: python

    this = "code that must not be taken for prose, although it has more than a dozen words in it."

    more = "of the same code after a blank line, again with more than a dozen words in it."

Too short to keep.

The following example shows what the settings file could hold for a server on this machine::

    CACHES = {"default": "a literal block with enough words to look like a sentence at first sight."}

* The first item of a list is a sentence that is long enough to be kept by the filter.
* The second item is **another one** of them, and it has *emphasis* in two different places.

term
    A definition is kept without its term when it is long enough to be read as a sentence.

==========  ==========================================================================
column      a table is not prose even though its cells may hold whole sentences, as here.
==========  ==========================================================================

:param name: a field list is not prose either, whatever the number of words that it may have.

>>> print("a doctest is not prose even if its line has quite a number of words in it.")
"""

RST_PROSE = """\
The cache is asked first, and only when it has no answer is the database asked for the same thing in a second query.

A note is prose as well, and its literal text and its Name and link text stay readable without the markup.

The following example shows what the settings file could hold for a server on this machine:

The first item of a list is a sentence that is long enough to be kept by the filter.

The second item is another one of them, and it has emphasis in two different places.

A definition is kept without its term when it is long enough to be read as a sentence."""

MARKDOWN = """\
# A title with enough words in it that only its mark tells it from a sentence here

A [link](https://example.org/(x)) and `code` and **strong** words stay, but the ![image](x.png) goes
away from this paragraph.

```python
print("fenced code is not prose, not even when it holds a sentence of more than twelve words.")
```

    indented = "code is not prose, not even when it holds a sentence of more than twelve words."

| a table | is not prose, not even when one cell holds a sentence of more than twelve words. |
|---|---|

- A list item is a sentence that is long enough to be kept by the filter of paragraphs.
"""


def texts(source: TextSource) -> list[str]:
    return [document.text for document in read_documents(source)[1] if document.text]


def test_restructured_text_becomes_its_sentences() -> None:
    assert rst_to_prose(RST) == RST_PROSE


def test_markdown_becomes_its_sentences() -> None:
    assert markdown_to_prose(MARKDOWN.replace("(x)", "x")).split("\n\n") == [
        "A link and code and strong words stay, but the goes away from this paragraph.",
        "A list item is a sentence that is long enough to be kept by the filter of paragraphs.",
    ]


CHINESE = """\
# 一个足够长的标题，它没有句号，所以不是正文里的句子，也不会被保留下来

缓存首先被查询，只有当它没有答案的时候，
才会向数据库查询同样的内容，详见[第二个查询](https://example.org)。

太短了。

| 表格里的句子也不是正文，即使单元格里有完整的句子，就像这里一样。 |
|---|

    缩进的代码不是正文，即使它看起来像一个很长很长的句子，就像这里一样。

- 列表中的第一项是一个足够长的句子，所以它会被过滤器保留下来！
"""


def test_scripts_without_spaces_have_sentences_too() -> None:
    assert markdown_to_prose(CHINESE).split("\n\n") == [
        "缓存首先被查询，只有当它没有答案的时候，才会向数据库查询同样的内容，详见第二个查询。",
        "列表中的第一项是一个足够长的句子，所以它会被过滤器保留下来！",
    ]
    japanese = "最初にキャッシュに問い合わせ、答えがないときだけ「データベース」に同じことを問い合わせます。"
    thai = "ระบบจะถามแคชก่อนเสมอ และจะถามฐานข้อมูลก็ต่อเมื่อแคชไม่มีคำตอบเท่านั้น"
    hindi = "पहले कैश से पूछा जाता है और जब उसके पास उत्तर नहीं होता तभी डेटाबेस से पूछा जाता है।"
    for text in (japanese, thai, hindi):
        assert markdown_to_prose(text) == rst_to_prose(text) == text
    assert not rst_to_prose("この文は短い。") and not rst_to_prose(japanese[:-1])  # few characters; no end
    quoted = "The words that another language uses for this question are: 缓存首先被查询只有当它没有答案的时候才会问."
    assert len(quoted.split()) == 11 and not rst_to_prose(quoted)  # mostly of a script with spaces


def test_directory_pattern_and_file_give_the_same_documents_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("  second\n\n")
    (tmp_path / "a.txt").write_text("first\n>>> kept as it is")
    (tmp_path / "c.jsonl").write_text('{"text": "third", "body": "x"}\n\n{"text": "fourth"}\n{"text": " "}\n')
    (tmp_path / "ignored.pdf").write_text("no")
    expected = ["first\n>>> kept as it is", "second", "third", "fourth"]
    assert texts(TextSource(str(tmp_path))) == expected
    assert texts(TextSource(f"{tmp_path}/**/*")) == expected
    assert texts(TextSource(str(tmp_path / "c.jsonl"))) == ["third", "fourth"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', r"a\.jsonl:2: no text under the key 'text'; set text_key"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 7}\n', r"a\.jsonl:3: no text under the key 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a \\ud83d b"}\n', r"a\.jsonl:2: \\ud83d is half of a surrogate pair"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: no text under the key"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8 \(byte 10\)"),
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 \(byte 3\)"),
        ("a.pdf", b"abc", r"a\.pdf: \.pdf is not read; use \.jsonl"),
    ],
)
def test_unreadable_text_is_named_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(TextSource(str(tmp_path / name)))


def test_a_path_without_text_files_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.txt", tmp_path / "*.txt"):
        with pytest.raises(UserError, match=f"^{str(path).replace('*', '.')}: "):
            texts(TextSource(str(path)))


def test_a_package_gives_the_prose_of_its_documentation_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = "This sentence number {} is in a file of the package and has more than a dozen words."
    files = ["docs/b.txt", "docs/deep/a.rst", "Docs/c.md", "tests/docs/d.rst", "src/e.rst", "README.rst", "docs/f.py"]
    root = tmp_path / "name-1.0"
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(sentence.format(number) + "\n")
    with tarfile.open(tmp_path / "name-1.0.tar.gz", "w:gz") as archive:
        for file in reversed(files):
            archive.add(root / file, f"name-1.0/{file}")
    monkeypatch.setattr(pypi, "fetch", lambda spec, sha256: tmp_path / "name-1.0.tar.gz")
    assert texts(TextSource("pypi:name==1.0")) == [sentence.format(number) for number in (2, 0, 1)]


def test_the_stamp_changes_with_the_files_and_needs_no_pinned_archive(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    source = TextSource(str(tmp_path))
    first = stamp(source)
    assert stamp(source) == first
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert stamp(source) != first
    assert stamp(TextSource("pypi:not-fetched==1", sha256="0" * 64)) != stamp(
        TextSource("pypi:not-fetched==1", sha256="1" * 64)
    )


def _write_parquet(file: Path, **columns: list) -> Path:
    parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
    return file


def test_parquet_gives_a_document_a_row_in_order_and_leaves_out_rows_without_text(tmp_path: Path) -> None:
    texts = ["first", None, "  second \n", "", "third: \u00e4\u00f6\u00fc"]
    file = _write_parquet(tmp_path / "texts.parquet", meta=[{"a": 1, "b": 2}] * 5, content=texts)
    size, documents = read_documents(TextSource(path=str(file), text_key="content"))
    assert [document.text for document in documents] == ["first", "second", "", "third: \u00e4\u00f6\u00fc"]
    assert size > 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["a"]}, r"texts.parquet: no column 'text' among content; set text_key"),
        ({"text": [1]}, r"texts.parquet: column 'text' holds int64, not strings"),
        (None, r"texts.parquet: not readable as parquet"),
    ],
)
def test_parquet_without_the_text_is_refused_in_one_line(
    tmp_path: Path, columns: dict[str, list] | None, message: str
) -> None:
    file = tmp_path / "texts.parquet"
    if columns is None:
        file.write_text("PAR1, or so it says")
    else:
        _write_parquet(file, **columns)
    with pytest.raises(UserError, match=message) as caught:
        list(read_documents(TextSource(path=str(file)))[1])
    assert "\n" not in str(caught.value)
