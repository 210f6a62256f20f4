"""What steps leave out of a shard, in files: however much a corpus loses, the main process holds one name for each."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacoder.core.files import replacing
from megacoder.corpus.shards import disk_errors
from megacoder.data.parquet import read_table

__all__ = ["Drop", "DropFile", "read_drops", "write_drops"]

_SCHEMA = pa.schema([("row", pa.int64()), ("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Some rows of a shard that a step leaves out for one reason."""

    stage: str
    reason: str
    """a short fixed phrase, so that drops can be counted by it"""
    rows: np.ndarray
    """int64, ascending"""
    details: tuple[str, ...] = ()
    """what to record beside the reason, one a row: the file it copies, the test it holds; or none at all"""


@dataclass(frozen=True, kw_only=True)
class DropFile:
    """What one step leaves out of one shard."""

    path: Path
    key: str
    """changes when the content does"""


def write_drops(path: Path, drops: Sequence[Drop]) -> DropFile | None:
    """Leaves the drops at `path`; None, and no file, where there are none."""
    parts = [_table(drop) for drop in drops if len(drop.rows)]
    if not parts:
        path.unlink(missing_ok=True)
        return None
    with disk_errors(path), replacing(path) as temporary, open(temporary, "wb") as file:
        pq.write_table(pa.concat_tables(parts), file, compression="zstd")
    with path.open("rb") as written:
        return DropFile(path=path, key=hashlib.file_digest(written, "sha256").hexdigest()[:32])


def read_drops(paths: Sequence[Path]) -> Iterator[tuple[int, str, str, str | None]]:
    """(row, stage, reason, detail) of every drop in the files."""
    for path in paths:
        yield from zip(*(column.to_pylist() for column in read_table(path).columns), strict=True)


def _table(drop: Drop) -> pa.Table:
    count = len(drop.rows)
    details = [detail or None for detail in drop.details] or [None] * count
    columns = [drop.rows, [drop.stage] * count, [drop.reason] * count, details]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
