"""Exact duplicates: of files with the same text, the first by repository and path is kept.

A later one is dropped by default only where it stands alone in its repository: as a sample by itself it would teach
nothing new. Where another file depends on it, or it on another, dropping it would leave a hole in their sample; the
paper compares whole repositories to avoid that, and files only in languages whose dependencies it does not parse.

Shards hold repositories in name order and files in path order, so "first" is a position, the same for any number of
workers and any order of the inputs.

No process holds anything that grows with the corpus: each shard writes its files' digests as a sorted run (`runs.py`);
tasks that own a range of digests read it from all runs and find the copies; then each shard collects its own copies
from the results, and looks up the names of the kept files in their shards.
"""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc

from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.dependencies import linked_files, repository_dependencies
from megacoder.corpus.drops import Drop, DropFile, write_drops_once
from megacoder.corpus.names import NameFiles, write_names
from megacoder.corpus.runs import key_ranges, read_range, write_runs
from megacoder.corpus.shards import TextReader, finished, redoing
from megacoder.corpus.steps import RunTasks, Shard, hash_of
from megacoder.data.parquet import read_table

__all__ = ["DIGEST_BYTES", "ExactDedup", "copies_among", "digest"]

DIGEST_BYTES = 16
RECORD = np.dtype([("key", "<u8"), ("low", "<u8"), ("row", "<u4")])
"""A file's digest in two halves, and its row in the shard."""
COPY = np.dtype([("key", "<u8"), ("first", "<u8")])
"""Two files with the same text, by their global numbers: the later one, and the first of all."""

_RECORDS_AT_ONCE = 4 << 20  # digests that a task sorts: about 300 MB, sort keys included


def digest(text: str) -> bytes:
    """Identifies a text; 128 bits of SHA-256."""
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


class ExactDedup:
    """Drops files whose text equals an earlier file's: all of them, or those that stand alone; a `Step`."""

    names = ("dedup",)

    def __init__(self, which: Literal["alone", "all"]) -> None:
        self._which = which

    def __call__(self, shards: Sequence[Shard], config: CorpusConfig, run: RunTasks) -> list[DropFile | None]:
        """The copies to drop in each shard, with the name of the first."""
        if not shards:
            return []
        counted = run(_list_digests, shards, "dedup: listing")
        names = NameFiles(
            paths=tuple(shard.beside("names") for shard in shards), counts=tuple(rows for rows, _ in counted)
        )
        key = hash_of([shard.key for shard in shards])
        searches = [
            _SearchTask(
                key=hash_of([key, keys]), runs=tuple(shard.beside("digests") for shard in shards),
                starts=names.starts, keys=keys, target=shards[0].scanned.with_name(f"copies-{index:05d}"), size=1,
            )
            for index, keys in enumerate(key_ranges(sum(records for _, records in counted), _RECORDS_AT_ONCE))
        ]  # fmt: skip
        run(_search, searches, "dedup: comparing")
        takes = [
            _TakeTask(
                key=hash_of([key, index]), shard=shard, index=index, names=names,
                copies=tuple(search.target for search in searches), which=self._which,
            )
            for index, shard in enumerate(shards)
        ]  # fmt: skip
        return run(_take, takes, "dedup: dropping")


def _list_digests(shard: Shard) -> tuple[int, int]:
    """Writes a shard's digests and names; returns how many rows it has, and how many of them are kept."""
    target = shard.beside("digests")
    if (done := finished(target, shard.key)) is not None:
        return int(done["rows"]), int(done["kept"])
    with redoing(target, shard.key) as result:
        kept = shard.kept()
        table = shard.columns(["digest"], kept)
        halves = np.frombuffer(b"".join(table["digest"].to_pylist()), "<u8").reshape(-1, 2)
        records = np.empty(len(kept), RECORD)
        records["key"], records["low"], records["row"] = halves[:, 0], halves[:, 1], kept
        write_runs(target, [records])
        result["rows"], result["kept"] = _write_names(shard), len(kept)
    return int(result["rows"]), int(result["kept"])


def _write_names(shard: Shard) -> int:
    """Writes the name of every row; returns the number of rows."""
    repos, paths = read_table(shard.scanned, ["repo", "path"]).columns
    write_names(shard.beside("names"), pc.binary_join_element_wise(repos, paths, "/"))
    return len(repos)


@dataclass(frozen=True, kw_only=True)
class _SearchTask:
    key: str
    runs: tuple[Path, ...]
    starts: np.ndarray
    keys: tuple[int, int]
    target: Path
    size: int


def _search(task: _SearchTask) -> None:
    """Writes the copies among the files whose digests lie in the range."""
    if finished(task.target, task.key) is not None:
        return
    with redoing(task.target, task.key):
        parts = [read_range(path, RECORD, task.keys) for path in task.runs]
        numbers = [part["row"].astype(np.int64) + start for part, start in zip(parts, task.starts, strict=False)]
        write_runs(task.target, [copies_among(np.concatenate(parts), np.concatenate(numbers))])


def copies_among(records: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """COPY records for RECORDs (N,) and the files' global numbers (N,)."""
    order = np.lexsort((numbers, records["low"], records["key"]))
    records, numbers = records[order], numbers[order]
    same = (records["key"][1:] == records["key"][:-1]) & (records["low"][1:] == records["low"][:-1])
    is_copy = np.concatenate([np.zeros(1, bool), same])[: len(records)]
    firsts = np.flatnonzero(~is_copy)
    first_of = np.repeat(firsts, np.diff([*firsts, len(records)]))
    found = np.empty(int(is_copy.sum()), COPY)
    found["key"], found["first"] = numbers[is_copy], numbers[first_of[is_copy]]
    return found


@dataclass(frozen=True, kw_only=True)
class _TakeTask:
    key: str
    shard: Shard
    index: int
    names: NameFiles
    copies: tuple[Path, ...]
    which: Literal["alone", "all"]

    @property
    def size(self) -> int:
        return self.shard.size


def _take(task: _TakeTask) -> DropFile | None:
    """Writes those of the shard's own copies that are to go as drops; the result is kept for a later call."""
    return write_drops_once(task.shard.beside("dropped-copies"), task.key, lambda: _choose(task))


def _choose(task: _TakeTask) -> list[Drop]:
    start, end = task.names.starts[task.index : task.index + 2].tolist()
    if start == end:
        return []
    found = np.sort(np.concatenate([read_range(path, COPY, (start, end - 1)) for path in task.copies]))
    rows = (found["key"] - np.uint64(start)).astype(np.int64)
    if task.which == "alone":
        alone = ~np.isin(rows, _linked_rows(task.shard, rows))
        found, rows = found[alone], rows[alone]
    details = tuple(task.names.take(found["first"].astype(np.int64)))
    return [Drop(stage="dedup", reason="copy of another file", rows=rows, details=details)]


def _linked_rows(shard: Shard, copies: np.ndarray) -> list[int]:
    """The kept rows that depend on another of their repository, or another on them, where `copies` are."""
    repos, paths, languages = (
        column.to_pylist() for column in read_table(shard.scanned, ["repo", "path", "language"]).columns
    )
    searched, kept, linked = {repos[row] for row in copies.tolist()}, set(shard.kept().tolist()), []
    with closing(TextReader(shard.scanned)) as texts:
        for repo, grouped in groupby(range(len(repos)), key=repos.__getitem__):
            if repo in searched:
                rows = list(grouped)
                known = {paths[row]: languages[row] for row in rows if languages[row] is not None}
                files = [row for row in rows if row in kept]
                depends_on = repository_dependencies(known, ((paths[row], texts[row]) for row in files))
                linked += [files[node] for node in linked_files(depends_on)]
    return linked
