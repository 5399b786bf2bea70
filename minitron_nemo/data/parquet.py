"""Text columns of parquet files. The only place that imports pyarrow, an optional dependency."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron_nemo.errors import UserError

_ROWS = 1024  # in memory at once


def text_bytes(file: Path, text_key: str) -> int:
    """Size of the column `text_key`, uncompressed, from the file's footer. Raises UserError as `read_texts` does."""
    parquet, column = _open(file, text_key)
    groups = (parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups))
    return sum(group.column(column).total_uncompressed_size for group in groups)


def read_texts(file: Path, text_key: str) -> Iterator[str]:
    """The column's strings in the order of the rows, nulls left out.

    Raises UserError for a file that is not parquet, and for a column that is not there or holds no strings.
    """
    parquet, _ = _open(file, text_key)
    for batch in parquet.iter_batches(batch_size=_ROWS, columns=[text_key]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _open(file: Path, text_key: str) -> tuple[Any, int]:
    """The open file and the number of its column `text_key`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file}: parquet is read with pyarrow; pip install '.[parquet]' in the clone") from None
    try:
        opened = parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not readable as parquet: {' '.join(str(error).split())}") from None
    schema = opened.schema_arrow
    if text_key not in schema.names:
        raise UserError(f"{file}: no column {text_key!r} among {', '.join(schema.names)}; set text_key of this source")
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{file}: column {text_key!r} holds {kind}, not strings; set text_key of this source")
    # Columns are numbered by leaves: a nested column before this one has several.
    leaves = [opened.schema.column(number).path for number in range(len(opened.schema))]
    return opened, leaves.index(text_key)
