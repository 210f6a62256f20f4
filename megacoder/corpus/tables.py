"""Tables of files as repositories: Parquet and JSONL whose rows hold a text, its repository and its path.

Rows of a repository may be anywhere (The Stack keeps a folder for each language), so they are gathered first, by an
external sort: each table becomes runs of rows sorted by repository and path, of bounded size, and a shard reads from
every run the row groups that hold its repositories. A row that is malformed is recorded under its table's name.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from megacoder.core.config import did_you_mean
from megacoder.core.errors import ConfigError, CorpusError, FormatError
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.reading import Selection, make_document, make_drop, name_reason
from megacoder.corpus.shards import finished, parquet_writer, redoing
from megacoder.data.jsonl import EMPTY_LINE, JsonRows
from megacoder.data.parquet import open_parquet

__all__ = ["GatherTask", "Gathered", "Run", "TableColumns", "gather_table", "is_table", "read_rows", "row_groups"]

_SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz")
_RUN_SCHEMA = pa.schema(
    [("repo", pa.string()), ("path", pa.string()), ("license", pa.string()), ("size", pa.int64()),
     ("reason", pa.string()), ("text", pa.string())]
)  # fmt: skip
_RUN_BYTES = 96 << 20  # of texts sorted in memory at once
_GROUP_BYTES = 1 << 20  # a shard reads at most this much of each run before and after its own rows

_KNOWN = {
    "text": ("content", "text", "code"),
    "repo": ("max_stars_repo_name", "repo_name", "repo", "repository_name", "repository"),
    "path": ("max_stars_repo_path", "path", "file_path", "filepath", "file_name"),
    "license": ("max_stars_repo_licenses", "license", "licenses", "detected_licenses"),
}


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Columns of tables given as input; for None, the first of the usual names that a table has."""

    text: str | None = None
    """column of the text; usual: content, text, code"""
    repo: str | None = None
    """column of the repository's name; usual: max_stars_repo_name (The Stack), repo_name, repo"""
    path: str | None = None
    """column of the file's path; usual: max_stars_repo_path (The Stack), path, file_path"""
    license: str | None = None
    """column of the license, which may be missing; usual: max_stars_repo_licenses (The Stack), license"""

    def chosen(self, present: Iterable[str], where: str) -> dict[str, str]:
        """Role -> column, out of the columns `present`; ConfigError for a column that is not there."""
        present = list(present)
        found = {}
        for role, usual in _KNOWN.items():
            given = getattr(self, role)
            name = given or next((name for name in usual if name in present), None)
            if name in present:
                found[role] = name
            elif given is not None:
                hint = did_you_mean(given, present, otherwise=f"; there are {', '.join(map(repr, present))}")
                raise ConfigError(f"{where}: no column {given!r}{hint}")
            elif role != "license":
                raise ConfigError(
                    f"{where}: none of the columns {', '.join(map(repr, present))} is known to hold the {role}; "
                    f"name it with --columns.{role}"
                )
        return found


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows of one table, sorted by repository and path."""

    file: Path
    groups: tuple[tuple[str, str], ...]
    """first and last repository of each row group"""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """A table after its sort."""

    sizes: dict[str, int]
    """repository -> bytes of its texts that would be read"""
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class GatherTask:
    """One table to sort."""

    key: str
    table: Path
    size: int
    target: Path
    """what the runs' file names begin with"""
    columns: TableColumns
    selection: Selection


def is_table(name: str) -> bool:
    """Whether a file of this name is read as a table."""
    return name.lower().endswith(_SUFFIXES)


def gather_table(task: GatherTask) -> Gathered:
    """Writes the runs of one table, unless done with the same key. CorpusError for a file that is not a table."""
    done = finished(task.target, task.key)
    if done is None:
        with redoing(task.target, task.key) as done:
            done["sizes"], done["runs"] = _sort(task)
    runs = tuple(Run(file=Path(name), groups=tuple((a, b) for a, b in groups)) for name, groups in done["runs"])
    return Gathered(sizes=done["sizes"], runs=runs)


def _sort(task: GatherTask) -> tuple[dict[str, int], list[tuple[str, list[tuple[str, str]]]]]:
    sizes: dict[str, int] = {}
    runs: list[tuple[str, list[tuple[str, str]]]] = []
    rows: list[tuple[Any, ...]] = []
    pending = 0
    for row in _rows(task):
        repo, path, _, size, reason, _ = row
        sizes[repo] = sizes.get(repo, 0) + (0 if reason else size)
        if reason is None and (reason := name_reason(path, size, task.selection)):
            row = (*row[:4], reason, None)
        rows.append(row)
        pending += len(row[5] or "") + 200
        if pending >= _RUN_BYTES:
            runs.append(_write_run(rows, task.target.with_name(f"{task.target.name}-{len(runs):04d}.parquet")))
            rows, pending = [], 0
    if rows:
        runs.append(_write_run(rows, task.target.with_name(f"{task.target.name}-{len(runs):04d}.parquet")))
    return sizes, runs


def _write_run(rows: list[tuple[Any, ...]], file: Path) -> tuple[str, list[tuple[str, str]]]:
    rows.sort(key=lambda row: row[:2])
    groups: list[tuple[str, str]] = []
    with parquet_writer(
        file, _RUN_SCHEMA, row_group_bytes=_GROUP_BYTES, cut=lambda a, b: groups.append((a[0], b[0]))
    ) as add:
        for row in rows:
            add(row, row[3] if row[5] is not None else 0)
    return str(file), groups


def row_groups(run: Run, first: str, last: str) -> tuple[int, ...]:
    """The row groups of `run` that may hold repositories from `first` to `last`."""
    return tuple(index for index, (low, high) in enumerate(run.groups) if low <= last and high >= first)


def read_rows(
    pieces: Sequence[tuple[Path, Sequence[int]]], repos: Sequence[str], selection: Selection
) -> Iterator[tuple[str, Iterator[Document | Dropped]]]:
    """For each of `repos`, in name order, its files from the row groups `pieces` of some runs, in path order."""
    merged = heapq.merge(*(_piece_rows(file, groups, repos[0], repos[-1]) for file, groups in pieces if groups))
    for repo, rows in groupby(merged, key=lambda row: row[0]):
        yield repo, _read_repository(repo, rows, selection)


def _piece_rows(file: Path, groups: Sequence[int], first: str, last: str) -> Iterator[tuple[Any, ...]]:
    """Rows as (repo, path, file, position, ...): equal paths stay in the order of the inputs."""
    with open_parquet(file) as parquet:
        for group in groups:
            columns = [column.to_pylist() for column in parquet.read_row_group(group).columns]
            for position, (repo, path, *rest) in enumerate(zip(*columns, strict=True)):
                if first <= repo <= last:
                    yield repo, path, str(file), (group, position), *rest


def _read_repository(repo: str, rows: Iterable[tuple[Any, ...]], selection: Selection) -> Iterator[Document | Dropped]:
    before = None
    for _, path, _, _, license_, size, reason, text in rows:
        if reason is None and path == before:
            reason = "path taken by an earlier file"
        if reason is not None:
            yield make_drop(repo, path, size, reason)
            continue
        before = path
        yield make_document(repo, path, text, selection, license=license_)


def _rows(task: GatherTask) -> Iterator[tuple[Any, ...]]:
    """The table's rows in `_RUN_SCHEMA`."""
    table = task.table
    try:
        values = (
            _parquet_rows(table, task.columns)
            if table.name.lower().endswith(".parquet")
            else _json_rows(table, task.columns)
        )
        for number, (size, row) in enumerate(values):
            yield _row(f"row {number}", table.name, size, row)
    except FormatError as error:
        raise CorpusError(f"{error}; repair it or leave it out") from None
    except OSError as error:  # pyarrow's errors about damaged files are OSErrors or ValueErrors
        raise CorpusError(f"{table}: not readable: {error}; repair it or leave it out") from None
    except pa.ArrowInvalid as error:
        raise CorpusError(f"{table}: not readable as {table.suffix[1:]}: {error}; repair it or leave it out") from None


def _row(place: str, table: str, size: int, row: dict[str, Any] | str) -> tuple[Any, ...]:
    if isinstance(row, str):
        return (table, place, None, size, row, None)
    text, repo, path = (row.get(role) for role in ("text", "repo", "path"))
    for role, value in (("text", text), ("repo", repo), ("path", path)):
        if not isinstance(value, str) or (role != "text" and not value):
            return (table, place, None, size, f"row without {role}", None)
    try:
        size = len(text.encode())  # type: ignore[union-attr]
        f"{repo}{path}".encode()
    except UnicodeEncodeError:
        return (table, place, None, size, "half a surrogate pair, which is no Unicode", None)
    return (repo, path.strip("/"), _license(row.get("license")), size, None, text)  # type: ignore[union-attr]


def _license(value: Any) -> str | None:
    if isinstance(value, str):
        return value or None
    if isinstance(value, (list, tuple)):  # The Stack: every license that was found in the repository
        return " AND ".join(sorted({str(name) for name in value if name})) or "none"
    return None


def _parquet_rows(table: Path, columns: TableColumns) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with open_parquet(table) as file:
        chosen = columns.chosen(file.schema_arrow.names, str(table))
        for batch in file.iter_batches(256, columns=list(dict.fromkeys(chosen.values()))):
            values = {role: _plain(batch.column(name)) for role, name in chosen.items()}
            for index in range(len(batch)):
                yield 0, {role: column[index] for role, column in values.items()}


def _plain(column: pa.Array) -> list[Any]:
    """The values; text that is not UTF-8 becomes None."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        plain = []
        for value in column:
            try:
                plain.append(value.as_py())
            except UnicodeDecodeError:
                plain.append(None)
        return plain


def _json_rows(table: Path, columns: TableColumns) -> Iterator[tuple[int, dict[str, Any] | str]]:
    chosen = None
    for _, size, row in JsonRows(table):
        if row == EMPTY_LINE:
            continue
        if isinstance(row, str):
            yield size, "row malformed"
            continue
        if chosen is None:
            chosen = columns.chosen(row, str(table))
        yield size, {role: row.get(name) for role, name in chosen.items()}
