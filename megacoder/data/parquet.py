"""Parquet files by name: the one place that tells pyarrow which file is meant.

pyarrow takes a relative name with a colon, such as `my:corpus/part.parquet`, for the address of a file system, but
never an absolute one. Writers hand it an open file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:  # takes as long to import as the rest, and few need it
    import pyarrow.dataset as ds

__all__ = ["open_dataset", "open_parquet", "read_table"]


def open_parquet(path: Path, *, page_checksums: bool = False) -> pq.ParquetFile:
    """The file, to be read piece by piece; `page_checksums`: checked where the file has them."""
    return pq.ParquetFile(path.absolute(), page_checksum_verification=page_checksums)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Those columns, by default all, of the whole file."""
    return pq.read_table(path.absolute(), columns=None if columns is None else list(columns))


def open_dataset(path: Path) -> "ds.Dataset":
    """The file, for reading chosen columns and rows."""
    import pyarrow.dataset as ds

    return ds.dataset(path.absolute())
