"""Parquet files by name: the one place that tells pyarrow which file is meant.

pyarrow takes a relative name with a colon, such as `my:corpus/part.parquet`, for the address of a file system, but
never an absolute one. Writers hand it an open file.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megacoder.core.errors import FormatError

if TYPE_CHECKING:  # takes as long to import as the rest, and few need it
    import pyarrow.dataset as ds

__all__ = ["open_dataset", "open_parquet", "read_rows", "read_table"]

_ROWS_AT_ONCE = 256


def open_parquet(path: Path, *, page_checksums: bool = False) -> pq.ParquetFile:
    """The file, to be read piece by piece; `page_checksums`: checked where the file has them."""
    return pq.ParquetFile(path.absolute(), page_checksum_verification=page_checksums)


def read_rows(path: Path, choose: Callable[[Path, list[str]], list[str]]) -> Iterator[dict[str, Any] | str]:
    """The rows of the file, or what is wrong with a row; `choose` picks from the names of its columns, or raises.

    FormatError where the file cannot be read.
    """
    try:
        with open_parquet(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=choose(path, file.schema_arrow.names)):
                yield from _plain(batch)
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path}: not readable as Parquet: {error}") from None


def _plain(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [f"a text that is not UTF-8 ({error.reason})"]
        return [row for index in range(len(batch)) for row in _plain(batch.slice(index, 1))]


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Those columns, by default all, of the whole file."""
    return pq.read_table(path.absolute(), columns=None if columns is None else list(columns))


def open_dataset(path: Path) -> "ds.Dataset":
    """The file, for reading chosen columns and rows."""
    import pyarrow.dataset as ds

    return ds.dataset(path.absolute())
