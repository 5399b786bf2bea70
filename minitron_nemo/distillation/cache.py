"""The teacher's sparse distributions on disk: one directory for each sequence length, in any order, for any layout.

    cache.json                   what every entry depends on (`Identity`), and the sources of the samples
    places/                      which sample a row is for: its source there, its number in it; planned beforehand
    token_ids/, log_probs/       [rows, sequence_length, k + m]; rows are samples, a file holds a block of them
    tail_log_probs/              [rows, sequence_length]
    sample_ids/                  the sha256 of each row's token ids; written last, so it says that a block is whole

All but cache.json are arrays of Zarr 3: each sample is a chunk of its own with a crc32c behind it, so one sample is
read, and found damaged, alone. Blocks are computed in any order by whoever is free; a block that is not whole is
written again. Rows are added behind, never changed: runs of the same teacher may share a cache and let it grow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minitron_nemo.checkpoint.files import fsync, write_atomic
from minitron_nemo.errors import UserError
from minitron_nemo.kernels import SparseEntries

SCHEMA_VERSION = 1
BLOCK = 64  # samples in a file
DTYPES = {"fp32": "float32", "fp16": "float16"}
_ENTRIES = ("token_ids", "log_probs", "tail_log_probs")
_PLACES_CHUNK = 2**16
_SAMPLE_BITS = 40
_SAMPLE = 2**_SAMPLE_BITS - 1


@dataclass(frozen=True)
class Identity:
    """What decides every stored number, beside the sample itself."""

    teacher: str  # hash of its weights and architecture
    vocab_size: int
    sequence_length: int
    temperature: float
    top_k: int
    tail_samples: int  # 0: the tail is one bucket
    seed: int  # of the tail's draws
    precision: str  # of the stored log-probabilities


# How a recipe spells the fields of `Identity`.
_KEYS = {
    "teacher": "the teacher",
    "vocab_size": "the vocabulary's size",
    "sequence_length": "data.sequence_length",
    "temperature": "distill.temperature",
    "top_k": "teacher.cache.top_k",
    "tail_samples": "teacher.cache.tail_samples",
    "seed": "teacher.cache.seed",
    "precision": "teacher.cache.precision",
}


@dataclass(frozen=True)
class Visits:
    """Distinct samples: `places` is int64 [n, 2] of (number in `sources`, sample in it)."""

    sources: tuple[str, ...]  # fingerprints: of the tokens, their packing and the sequence length
    places: NDArray[np.int64]

    def distinct(self) -> Visits:
        """In the order of first visits."""
        _, first = np.unique(self.places, axis=0, return_index=True)
        return Visits(self.sources, self.places[np.sort(first)])

    def after(self, earlier: Visits) -> Visits:
        """`earlier`, of the same sources, and then those that are new."""
        return Visits(self.sources, np.concatenate([earlier.places, self.places])).distinct()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.sources).encode() + self.places.tobytes()).hexdigest()


class TeacherCache:
    """An existing cache. Any process may read; one process plans; each block is written by one process."""

    def __init__(self, directory: Path, identity: Identity) -> None:
        """Raises UserError if there is none in `directory`, or one of another identity."""
        self.directory = directory
        self.identity = identity
        self._load()

    def _load(self) -> None:
        self.sources = _checked(self.directory / "cache.json", self.identity)
        zarr = import_zarr()
        self._arrays = {name: zarr.open_array(self.directory / name) for name in ("places", "sample_ids", *_ENTRIES)}
        self._places: NDArray[np.int64] = self._arrays["places"][:]
        ids = self._stored_ids()[: len(self._places)]
        self._stored = ids.any(1)  # rows whose entries are there; an absent file reads as zeros
        # Half of a sha256 tells samples apart; 24 bytes a sample stay in memory.
        rows = np.flatnonzero(self._stored)
        prefixes = ids[rows, :16].copy().view("S16")[:, 0]
        order = np.argsort(prefixes, kind="stable")
        self._index = prefixes[order], rows[order]

    @staticmethod
    def create(directory: Path, identity: Identity) -> TeacherCache:
        """Open the cache in `directory`, or make an empty one. Raises UserError for one of another identity."""
        if not (directory / "cache.json").exists():
            zarr = import_zarr()
            compressors = [
                zarr.codecs.BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
                zarr.codecs.Crc32cCodec(),
            ]
            directory.mkdir(parents=True, exist_ok=True)
            tokens, entries = identity.sequence_length, identity.top_k + identity.tail_samples
            shapes: dict[str, tuple[str, tuple[int, ...], int]] = {
                "token_ids": ("uint32", (tokens, entries), 1),
                "log_probs": (DTYPES[identity.precision], (tokens, entries), 1),
                "tail_log_probs": ("float32", (tokens,), 1),
                "sample_ids": ("uint8", (32,), BLOCK),
                "places": ("int64", (2,), _PLACES_CHUNK),
            }
            for name, (dtype, shape, rows) in shapes.items():
                zarr.create_array(
                    directory / name,
                    shape=(0, *shape),
                    chunks=(rows, *shape),
                    shards=(BLOCK, *shape) if name in _ENTRIES else None,
                    dtype=dtype,
                    compressors=compressors,
                    fill_value=-1 if name == "places" else 0,
                    overwrite=True,
                )
            _write_identity(directory, identity, ())
        return TeacherCache(directory, identity)

    def plan(self, visits: Visits) -> list[int]:
        """Add rows for those samples that have none, and return all blocks that are not whole."""
        known, keys = self._keys(visits)
        planned = self._places[self._places[:, 0] >= 0]
        new = keys[~np.isin(keys, _key(planned))]
        if len(new):
            _write_identity(self.directory, self.identity, known)
            start, rows = len(self._places), -(-len(new) // BLOCK) * BLOCK
            for name in (*_ENTRIES, "sample_ids", "places"):  # places last: whatever it has rows for, the others have
                array = self._arrays[name]
                array.resize((start + rows, *array.shape[1:]))
            self._arrays["places"][start : start + len(new)] = np.stack([new >> _SAMPLE_BITS, new & _SAMPLE], 1)
            self._load()
        blocks = range(len(self._places) // BLOCK)
        return [block for block in blocks if len(self.planned(block)) and not self._is_whole(block)]

    def planned(self, block: int) -> NDArray[np.int64]:
        """(source, sample) of the block's rows, int64 [up to BLOCK, 2]; source counts in `sources`."""
        places = self._places[block * BLOCK : (block + 1) * BLOCK]
        return places[places[:, 0] >= 0]

    def write(self, block: int, sample_ids: Sequence[str], entries: SparseEntries) -> None:
        """Store a block's rows, in their order: `entries` of the samples' tokens, one sample after the other."""
        tokens = self.identity.sequence_length
        for name in _ENTRIES:
            array = self._arrays[name]
            rows = np.zeros((BLOCK, *array.shape[1:]), array.dtype)
            values = getattr(entries, name).cpu().numpy()
            rows[: len(sample_ids)] = values.reshape(len(sample_ids), tokens, *values.shape[1:])
            self._store(name, block, rows)
        ids = np.zeros((BLOCK, 32), np.uint8)
        ids[: len(sample_ids)] = [list(bytes.fromhex(name)) for name in sample_ids]
        self._store("sample_ids", block, ids)

    def _store(self, name: str, block: int, rows: NDArray[Any]) -> None:
        """Write a file of one block; it is on the disk afterwards."""
        self._arrays[name][block * BLOCK : (block + 1) * BLOCK] = rows  # beside, then renamed
        file = self._file(name, block)
        fsync(file)
        fsync(file.parent)

    def check(self, visits: Visits) -> None:
        """Raise UserError unless the cache has all of these samples."""
        known, keys = self._keys(visits)
        if len(known) > len(self.sources):
            raise UserError(
                f"{self.directory}/cache.json: made for other data: a source, data.pack_seed or the tokenizer changed "
                "since; give another teacher.cache.path, or run `minitron cache-teacher` to add this data"
            )
        lacking = int((~np.isin(keys, _key(self._places[self._stored]))).sum())
        if lacking:
            raise UserError(
                f"{self.directory}: lacks {lacking} of the {len(keys)} samples that the training visits; "
                "run `minitron cache-teacher`"
            )

    def read(self, sample_ids: Sequence[str]) -> SparseEntries:
        """The entries of these samples, one after the other, on the CPU.

        Raises UserError, naming it, for a sample that is not there and for a file that is missing or damaged.
        """
        rows = [self._row(name) for name in sample_ids]
        values = {name: np.stack([self._read(name, row // BLOCK, row) for row in rows]) for name in _ENTRIES}
        token_ids, log_probs, tails = (torch.from_numpy(values[name]).flatten(0, 1) for name in _ENTRIES)
        return SparseEntries(token_ids.long(), log_probs.float(), tails, self.identity.top_k)

    def _row(self, sample_id: str) -> int:
        prefixes, rows = self._index
        wanted = np.frombuffer(bytes.fromhex(sample_id)[:16], "S16")[0]
        place = int(np.searchsorted(prefixes, wanted))
        if place == len(prefixes) or prefixes[place] != wanted:
            raise UserError(f"{self.directory}: lacks the sample {sample_id}; run `minitron cache-teacher`")
        return int(rows[place])

    def _read(self, name: str, block: int, rows: int | slice) -> Any:
        file = self._file(name, block)
        try:
            if not file.exists():  # Zarr takes it for a block of zeros
                raise FileNotFoundError("it is not there")
            return self._arrays[name][rows]
        except Exception as error:  # codecs raise what they like
            raise UserError(
                f"{file}: damaged ({' '.join(str(error).split())}); remove it and run `minitron cache-teacher`"
            ) from error

    def _stored_ids(self) -> NDArray[np.uint8]:
        """uint8 [rows, 32], zeros where a block is not written yet."""
        array = self._arrays["sample_ids"]
        try:
            ids: NDArray[np.uint8] = array[:]
        except Exception:
            for block in range(array.shape[0] // BLOCK):  # which one is it?
                if self._file("sample_ids", block).exists():
                    self._read("sample_ids", block, slice(block * BLOCK, (block + 1) * BLOCK))
            raise
        return ids

    def _keys(self, visits: Visits) -> tuple[list[str], NDArray[np.int64]]:
        """The cache's sources and, behind them, what `visits` has beside; its samples as `_key` has them."""
        known = list(dict.fromkeys([*self.sources, *visits.sources]))
        numbers = np.array([known.index(source) for source in visits.sources], np.int64)
        return known, _key(np.stack([numbers[visits.places[:, 0]], visits.places[:, 1]], 1))

    def _is_whole(self, block: int) -> bool:
        return all(self._file(name, block).exists() for name in ("sample_ids", *_ENTRIES))

    def _file(self, name: str, block: int) -> Path:
        dims = len(self._arrays[name].shape)
        return self.directory / name / "c" / str(block) / "/".join("0" * (dims - 1))


def _key(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for (source, sample)."""
    return (places[:, 0] << _SAMPLE_BITS) | places[:, 1]


def _checked(path: Path, identity: Identity) -> tuple[str, ...]:
    """The cache's sources, if it is one of `identity`."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run `minitron cache-teacher`") from None
    except json.JSONDecodeError:
        raise UserError(f"{path}: not readable as JSON; remove {path.parent} and make the cache again") from None
    if found.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {found.get('schema_version')} is not {SCHEMA_VERSION}")
    for name, value in asdict(identity).items():
        if (stored := found["identity"].get(name)) != value:
            raise UserError(
                f"{path}: {_KEYS[name]} was {stored} when the cache was written and is {value} now; restore it, or "
                "give another teacher.cache.path"
            )
    return tuple(found["sources"])


def _write_identity(directory: Path, identity: Identity, sources: Sequence[str]) -> None:
    content = {"schema_version": SCHEMA_VERSION, "identity": asdict(identity), "sources": list(sources)}
    write_atomic(directory / "cache.json", json.dumps(content, indent=2) + "\n")


def import_zarr() -> Any:
    """The library, imported where it is used. Raises UserError where it is not installed."""
    try:
        import zarr
        import zarr.codecs
    except ImportError as error:
        raise UserError(
            f"teacher.placement: cached needs Zarr 3 ({error}); pip install '.[cache]' in the clone"
        ) from None
    return zarr
