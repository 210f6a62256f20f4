"""What steps drop from shards, in files: however much is dropped, the main process holds only the files' names."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacoder.corpus.shards import finished, redoing, writing
from megacoder.data.parquet import read_table

__all__ = ["Drop", "DropFile", "read_drops", "write_drops", "write_drops_once"]

_SCHEMA = pa.schema([("row", pa.int64()), ("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Rows of a shard that a step drops for one reason."""

    stage: str
    reason: str
    """a short fixed phrase, so that drops can be counted by it"""
    rows: np.ndarray
    """int64, ascending"""
    details: tuple[str, ...] = ()
    """what to record with the reason, one per row (the file it copies, the test it holds), or empty"""


@dataclass(frozen=True, kw_only=True)
class DropFile:
    """The file of what one step drops from one shard."""

    path: Path
    key: str
    """changes when the content does"""


def write_drops(path: Path, drops: Sequence[Drop]) -> DropFile | None:
    """Writes the drops to `path`; None, and no file, if there are none."""
    parts = [_table(drop) for drop in drops if len(drop.rows)]
    if not parts:
        path.unlink(missing_ok=True)
        return None
    with writing(path) as file:
        pq.write_table(pa.concat_tables(parts), file, compression="zstd")
    with path.open("rb") as written:
        return DropFile(path=path, key=hashlib.file_digest(written, "sha256").hexdigest()[:32])


def write_drops_once(path: Path, key: str, find: Callable[[], Sequence[Drop]]) -> DropFile | None:
    """`write_drops` of what `find` returns, unless done with the same `key`."""
    if (done := finished(path, key)) is None:
        with redoing(path, key) as done:
            drops = write_drops(path, find())
            done["drops"] = drops and drops.key
    return DropFile(path=path, key=done["drops"]) if done["drops"] else None


def read_drops(paths: Sequence[Path]) -> Iterator[tuple[int, str, str, str | None]]:
    """(row, stage, reason, detail) of every drop in the files."""
    for path in paths:
        yield from zip(*(column.to_pylist() for column in read_table(path).columns), strict=True)


def _table(drop: Drop) -> pa.Table:
    count = len(drop.rows)
    details = [detail or None for detail in drop.details] or [None] * count
    columns = [drop.rows, [drop.stage] * count, [drop.reason] * count, details]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
