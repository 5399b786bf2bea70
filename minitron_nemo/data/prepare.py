"""Documents to Megatron indexed datasets, split into training and held-out by the hash of their text.

Held-out sources come first, and a text is taken only where it is met first, so that none is on both sides; the
fraction depends on the text alone, so a text that two training sources share has the same side in both.

Every source becomes one directory, renamed into place when whole: after a kill, finished sources are not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from types import TracebackType

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from minitron_nemo.checkpoint.files import read_json, replacing_directory, write_atomic
from minitron_nemo.config import DataConfig, TextSource
from minitron_nemo.data.documents import Document, read_documents, source_name, stamp
from minitron_nemo.data.prepared import SCHEMA_VERSION, Prepared, PreparedSource, Split
from minitron_nemo.data.tokenizer import Tokenizer, load_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.progress import Progress

TEXT_VERSION = 2  # raised whenever the same files give other documents than before
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4_000_000


def prepare_data(config: DataConfig, tokenizer_dir: Path, output: Path, progress: bool = True) -> None:
    """Tokenise all sources into `output` (see prepared.py); one process does it, the others wait.

    A source is skipped when its files, the tokenizer, the split and the sources before it are unchanged; weights,
    seeds and the sequence length do not matter here. Killed at any moment and started again, it writes the same bytes.
    Raises UserError naming the source or file that has no text or cannot be read, and where a share is to be held out
    that comes to no document.
    """
    if not config.train:
        raise UserError("data.train: no sources; give at least one path")
    if not 0 <= config.heldout_fraction < 1:
        raise UserError(f"data.heldout_fraction: {config.heldout_fraction} is not in [0, 1)")
    tokenizer = load_tokenizer(tokenizer_dir)
    output.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()  # ids of the documents of the sources so far, but for those in `unread`
    unread: list[Path] = []
    sources: list[PreparedSource] = []
    key = f"{SCHEMA_VERSION} {TEXT_VERSION} {tokenizer.fingerprint}"
    held_out = [(source, True, 1.0) for source in config.heldout]
    for source, whole, fraction in held_out + [(source, False, config.heldout_fraction) for source in config.train]:
        key = hashlib.sha256(f"{key} {whole} {fraction} {stamp(source)}".encode()).hexdigest()
        directory = output / _directory_name(len(sources), source)
        prepared = _finished(directory, key)
        if prepared is None:
            seen.update(*map(_read_ids, unread))
            unread.clear()
            prepared = _prepare_source(source, whole, fraction, key, tokenizer, directory, seen, progress)
        unread += [output / split.prefix for split in (prepared.train, prepared.heldout) if split]
        sources.append(prepared)
    if config.heldout_fraction and not any(source.heldout for source in sources):
        read = sum(source.train.documents for source in sources if source.train)
        raise UserError(
            f"data.heldout_fraction: {config.heldout_fraction:g} holds out none of the {read} documents of data.train, "
            "and nothing else is there to evaluate on; raise it, or give data.heldout sources"
        )
    result = Prepared(
        SCHEMA_VERSION,
        _content_fingerprint(tokenizer.separator_id, sources),
        tokenizer.fingerprint,
        tokenizer.separator_id,
        tokenizer.vocab_size,
        tuple(sources),
    )
    write_atomic(output / "prepared.json", json.dumps(asdict(result), indent=2) + "\n")


def inputs_stamp(config: DataConfig) -> str:
    """Changes whenever the text that the sources name may have changed; reads no text. Raises UserError."""
    stamps = [stamp(source) for source in chain(config.heldout, config.train)]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()


def same_text(one: DataConfig, other: DataConfig) -> bool:
    """Whether both are prepared alike: the same sources, in their order, and the same share held out."""

    def prepared(config: DataConfig) -> list[object]:
        sources = [[replace(source, weight=None) for source in part] for part in (config.train, config.heldout)]
        return [*sources, config.heldout_fraction]

    return prepared(one) == prepared(other)


def is_held_out(document_id: bytes, fraction: float) -> bool:
    """Whether the hash of a document's text, read as a number in [0, 1), lies below `fraction`."""
    return int.from_bytes(document_id[:8], "big") < fraction * 2.0**64


def _directory_name(index: int, source: TextSource) -> str:
    name = "".join(char if char.isalnum() or char in "._" else "-" for char in source_name(source).replace("==", "-"))
    return f"{index:02d}-{name.strip('-.')[-48:]}"


def _finished(directory: Path, key: str) -> PreparedSource | None:
    """The source in `directory` if it was made with this key; the directory appears only when whole."""
    record = directory / "source.json"
    if not record.exists():
        return None
    again = f"remove {directory}, and it is prepared again"
    data = read_json(record, again)
    try:
        return PreparedSource.from_dict(data["source"]) if data["key"] == key else None
    except (KeyError, TypeError) as error:
        raise UserError(f"{record}: not what `minitron prepare` writes ({error}); {again}") from None


def _prepare_source(
    source: TextSource,
    held_out: bool,
    fraction: float,
    key: str,
    tokenizer: Tokenizer,
    directory: Path,
    seen: set[bytes],
    progress: bool,
) -> PreparedSource:
    """Write one source's splits into `directory`; documents whose id is in `seen` are left out."""
    size, documents = read_documents(source)
    taken = set(seen)
    read = empty = 0
    with (
        Progress(f"prepare {source_name(source)}", size, "bytes", shown=progress) as bar,
        replacing_directory(directory) as partial,
        _SplitWriter(partial, directory.name, "train", tokenizer) as train,
        _SplitWriter(partial, directory.name, "heldout", tokenizer) as heldout,
    ):
        for batch in _batches(documents):
            fresh: list[tuple[bytes, Document]] = []
            for document in batch:
                if not document.text:
                    empty += 1
                elif (id_ := document.id) not in taken:
                    taken.add(id_)
                    fresh.append((id_, document))
            encoded = tokenizer.encode_batch([document.text for _, document in fresh])
            for (id_, document), tokens in zip(fresh, encoded, strict=True):
                (heldout if is_held_out(id_, fraction) else train).add(id_, document, tokens)
            read += len(batch)
            bar.advance(sum(document.size for document in batch))  # what holds no document, at the end
        prepared = PreparedSource(source_name(source), source.path, held_out, train.finish(), heldout.finish())
        _require_text(source, prepared, read - empty)
        write_atomic(partial / "source.json", json.dumps({"key": key, "source": asdict(prepared)}, indent=2) + "\n")
    if empty:
        print(
            f"[prepare] {prepared.name}: {empty} of {read} documents have no text; of .md and .rst only prose is kept",
            flush=True,
        )
    return prepared


def _require_text(source: TextSource, prepared: PreparedSource, read: int) -> None:
    if read == 0:
        raise UserError(f"{source.path}: no text in it; give a source with text or remove this one from the recipe")
    if prepared.held_out and prepared.heldout is None:
        raise UserError(f"{source.path}: all its {read} documents are in an earlier held-out source; remove this one")
    if not prepared.held_out and prepared.train is None:
        raise UserError(
            f"{source.path}: none of its {read} documents is left for training: they are held out or in an earlier "
            "source; lower data.heldout_fraction or remove this source"
        )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """One indexed dataset while it is written; its files appear with the first document."""

    def __init__(self, folder: Path, final_folder: str, split: str, tokenizer: Tokenizer) -> None:
        self._path = folder / split
        self._final_prefix = f"{final_folder}/{split}"
        self._separator_id = tokenizer.separator_id
        self._dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._builder: IndexedDatasetBuilder | None = None
        self._ids: list[bytes] = []
        self._digest = hashlib.sha256()
        self._tokens = 0
        self._characters = 0

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._builder is not None:
            self._builder.data_file.close()

    def add(self, id_: bytes, document: Document, tokens: list[int]) -> None:
        """Append the separator and `tokens` as one entry."""
        if self._builder is None:
            self._builder = IndexedDatasetBuilder(f"{self._path}.bin", self._dtype)
        entry = np.array([self._separator_id, *tokens], dtype=np.int32)
        self._builder.add_document(entry, [entry.size])
        self._digest.update(entry.size.to_bytes(4, "little") + entry.astype("<i4").tobytes())
        self._ids.append(id_)
        self._tokens += entry.size
        self._characters += len(document.text)

    def finish(self) -> Split | None:
        """Write the index and the ids; None if there was no document."""
        if self._builder is None:
            return None
        self._builder.finalize(f"{self._path}.idx")
        Path(f"{self._path}.ids").write_bytes(b"".join(self._ids))
        return Split(self._final_prefix, len(self._ids), self._tokens, self._characters, self._digest.hexdigest())


def _read_ids(prefix: Path) -> set[bytes]:
    content = Path(f"{prefix}.ids").read_bytes()
    return {content[start : start + 32] for start in range(0, len(content), 32)}


def _content_fingerprint(separator_id: int, sources: list[PreparedSource]) -> str:
    content = [[split and split.sha256 for split in (source.train, source.heldout)] for source in sources]
    return hashlib.sha256(json.dumps([separator_id, content]).encode()).hexdigest()
