"""Source files in Parquet: written in row groups of bounded bytes, read by row without holding a repository in memory.

Row groups are bounded by bytes, not rows, so that memory is bounded whatever the files. Output is compressed by zstd at
level 3: within a fifth of the size of level 9 at four times its speed. What a build reads several times and then
removes is compressed by lz4: half as well in half the time.
"""

import bisect
import errno
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megacoder.core.errors import CorpusError
from megacoder.core.files import replacing, write_json
from megacoder.data.parquet import open_parquet

__all__ = [
    "CORPUS_SCHEMA", "DROPPED_SCHEMA", "PARTS", "SCAN_SCHEMA", "TextReader", "disk_errors", "finished",
    "parquet_writer", "redoing", "writing",
]  # fmt: skip

_FILE = [("repo", pa.string()), ("path", pa.string()), ("language", pa.string())]
_LICENSE = ("license", pa.string())
_DROP = [("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string())]

SCAN_SCHEMA = pa.schema(
    [*_FILE, ("size", pa.int64()), _LICENSE, *_DROP, ("digest", pa.binary(16)), ("text", pa.string())]
)
"""What the scan writes for the steps; `text` and `digest` are null in rows of dropped files."""
CORPUS_SCHEMA = pa.schema([("sample", pa.string()), *_FILE, _LICENSE, ("content", pa.string())])
"""One row per file; the rows of a sample are contiguous, and their contents concatenate to its text."""
DROPPED_SCHEMA = pa.schema([*_FILE, ("size", pa.int64()), *_DROP])
PARTS = {"train": CORPUS_SCHEMA, "heldout": CORPUS_SCHEMA, "dropped": DROPPED_SCHEMA}
"""Sub-folders of a corpus and what their Parquet files hold."""

_ROW_GROUP_BYTES = 4 << 20
_CACHED_ROW_GROUPS = 12


@contextmanager
def parquet_writer(
    path: Path,
    schema: pa.Schema,
    *,
    row_group_bytes: int = _ROW_GROUP_BYTES,
    passing: bool = False,
    cut: Callable[[tuple[Any, ...], tuple[Any, ...]], Any] | None = None,
) -> Iterator[Callable[[tuple[Any, ...], int], None]]:
    """Yields `add(row, size)`; the file gets its final name when the block ends without an error.

    `size` is the row's weight in bytes, by which row groups are cut; `cut` is called with the first and last row of
    each; `passing` files are temporary, compressed for speed rather than size.
    """
    packed = {"compression": "lz4"} if passing else {"compression": "zstd", "compression_level": 3}
    with writing(path) as file, pq.ParquetWriter(file, schema, **packed) as writer:
        rows: list[tuple[Any, ...]] = []
        pending = 0

        def flush() -> None:
            nonlocal pending
            if cut is not None and rows:
                cut(rows[0], rows[-1])
            columns = zip(*rows, strict=True) if rows else [()] * len(schema)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=max(len(rows), 1))
            rows.clear()
            pending = 0

        def add(row: tuple[Any, ...], size: int) -> None:
            nonlocal pending
            rows.append(row)
            pending += size + 64  # 64: the row's names and numbers, about
            if pending >= row_group_bytes:
                flush()

        yield add
        flush()


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the name `path` when the block ends without an error; CorpusError as `disk_errors`."""
    with disk_errors(path), replacing(path) as temporary, open(temporary, "wb") as file:
        yield file


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an operating system error while `path` is written into one line that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run the same command again" if full else "choose another --out"
        raise CorpusError(f"{path}: not written: {error.strerror or error}; {advice}") from None


class TextReader:
    """Random access to the column `text` of a Parquet file, holding only a few row groups."""

    def __init__(self, path: Path) -> None:
        self._file = open_parquet(path)
        self._starts = [0]
        for group in range(self._file.num_row_groups):
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        self._cache: OrderedDict[int, list[str]] = OrderedDict()

    def __getitem__(self, row: int) -> str:
        group = bisect.bisect_right(self._starts, row) - 1
        if group not in self._cache:
            if len(self._cache) == _CACHED_ROW_GROUPS:
                self._cache.popitem(last=False)
            self._cache[group] = self._file.read_row_group(group, columns=["text"]).column(0).to_pylist()
        self._cache.move_to_end(group)
        return self._cache[group][row - self._starts[group]]

    def close(self) -> None:
        self._file.close()


def finished(target: Path, key: str) -> dict[str, Any] | None:
    """What the task for `target` stored with `redoing`, if it finished with this `key`."""
    try:
        marker = json.loads(_marker(target).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return marker if marker["key"] == key else None


@contextmanager
def redoing(target: Path, key: str) -> Iterator[dict[str, Any]]:
    """Marks `target` as finished with `key` when the block ends; the dictionary yielded is stored with the mark.

    The old mark is removed first, so that a crash in between never pairs it with new data.
    """
    marker = _marker(target)
    marker.unlink(missing_ok=True)
    result: dict[str, Any] = {"key": key}
    yield result
    with disk_errors(marker):
        write_json(marker, result)


def _marker(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")
