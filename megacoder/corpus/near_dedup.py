"""Near duplicates: repositories, or files, whose words are mostly those of an earlier one.

As in the paper, a repository is one document, so that none is left with holes; its signature is the elementwise minimum
of its files'. Of near units the first in name order is kept. A unit is dropped only if it is near to a kept one: no
chain of small differences can drop something new, and every drop names the unit kept instead.

Everything large stays on disk: each shard writes signatures and sorted band records; tasks that own a range of a
band's hashes find near pairs; the main process goes through the pairs by ranges of units and decides, holding one byte
per unit; each shard reads its own copies from the decisions. Where files are compared after repositories, the files'
signatures are reused.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.drops import Drop, DropFile, write_drops
from megacoder.corpus.lsh import EDGE, SignatureFiles, band_runs, candidate_pairs, near_pairs
from megacoder.corpus.minhash import signatures
from megacoder.corpus.names import NameFiles, write_names
from megacoder.corpus.near_config import NearDedupConfig
from megacoder.corpus.runs import key_ranges, read_range, write_runs
from megacoder.corpus.shards import finished, redoing, writing
from megacoder.corpus.steps import RunTasks, Shard, hash_of
from megacoder.data.parquet import open_parquet

__all__ = ["NearDedup", "choose_copies", "read_copy"]

Level = Literal["repository", "file"]

_RECORDS_AT_ONCE = 1 << 20  # band records or near pairs that a task sorts: 40 MB, sort keys included
_FILES_AT_ONCE = 4096


class NearDedup:
    """Drops near copies of repositories or of files; a `Step`."""

    names = ("near-dedup",)

    def __init__(self, level: Level) -> None:
        self._level: Level = level

    def __call__(self, shards: Sequence[Shard], config: CorpusConfig, run: RunTasks) -> list[DropFile | None]:
        """The rows of near copies in each shard, with what each is a copy of."""
        options = config.near_dedup
        signed = [_SignTask(shard=shard, level=self._level, options=options) for shard in shards]
        counts = tuple(run(_sign, signed, "near-dedup: signing"))
        files = SignatureFiles(
            paths=tuple(task.signatures for task in signed), counts=counts, num_hashes=options.num_hashes
        )
        if not files.starts[-1]:
            return [None] * len(shards)
        copies = _search(signed, files, options, run)
        names = NameFiles(paths=tuple(task.names for task in signed), counts=counts)
        takes = [_TakeTask(signed=task, index=index, names=names, copies=copies) for index, task in enumerate(signed)]
        return run(_take, takes, "near-dedup: dropping")


@dataclass(frozen=True, kw_only=True)
class _SignTask:
    shard: Shard
    level: Level
    options: NearDedupConfig

    @property
    def size(self) -> int:
        return self.shard.size

    @property
    def key(self) -> str:
        return hash_of([self.shard.key, self.level])

    @property
    def signatures(self) -> Path:
        """(units, num_hashes) uint32: repositories in name order, or files in row order."""
        return self.shard.beside(f"signed-{self.level}")

    @property
    def bands(self) -> Path:
        """A run of band records for each band."""
        return self.shard.beside(f"bands-{self.level}")

    @property
    def names(self) -> Path:
        """The units' names."""
        return self.shard.beside(f"names-{self.level}")

    def unit_names(self, kept: np.ndarray) -> list[str]:
        """The name of every unit in order, given the kept rows."""
        if self.level == "repository":
            return list(dict.fromkeys(self.shard.columns(["repo"], kept)["repo"].to_pylist()))
        table = self.shard.columns(["repo", "path"], kept)
        return [f"{repo}/{path}" for repo, path in zip(*(column.to_pylist() for column in table), strict=True)]

    def unit_of_row(self, kept: np.ndarray) -> np.ndarray:
        """The unit of each kept row, ascending."""
        if self.level == "file":
            return np.arange(len(kept))
        repos = self.shard.columns(["repo"], kept)["repo"].combine_chunks()  # those of one repository are contiguous
        return np.unique(repos.dictionary_encode().indices.to_numpy(), return_inverse=True)[1]


def _sign(task: _SignTask) -> int:
    """Writes the signatures, band records and names of a shard's units; returns the number of units."""
    if (done := finished(task.signatures, task.key)) is not None:
        return int(done["units"])
    options, kept = task.options, task.shard.kept()
    with redoing(task.signatures, task.key) as result:
        names = task.unit_names(kept)
        write_names(task.names, names)
        num_words = [np.zeros(0, np.int64)]
        with writing(task.signatures) as file:
            for signed, words in _merged(_signed_rows(task, kept)):
                signed.tofile(file)
                num_words.append(words)
        eligible = np.flatnonzero(np.concatenate(num_words) >= options.min_words)
        stored = SignatureFiles(paths=(task.signatures,), counts=(len(names),), num_hashes=options.num_hashes)
        write_runs(task.bands, band_runs(stored.shard(0), eligible, bands=options.bands, rows=options.rows))
        result["units"] = len(names)
    return len(names)


Signed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Consecutive rows: their units, (N,) ascending, signatures, (N, K), and word counts, (N,)."""


def _merged(chunks: Iterable[Signed]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Signatures (M, K) and word counts (M,) of units, in order: minima and sums over their rows."""
    unit, lowest, total = -1, np.zeros((0, 0), np.uint32), np.zeros(0, np.int64)  # of the last unit, which may continue
    for units, signed, words in chunks:
        firsts = np.flatnonzero(np.diff(units, prepend=-1))
        lowests, totals = np.minimum.reduceat(signed, firsts, axis=0), np.add.reduceat(words, firsts)
        if units[0] == unit:
            np.minimum(lowests[:1], lowest, out=lowests[:1])
            totals[:1] += total
        elif len(total):
            yield lowest, total
        yield lowests[:-1], totals[:-1]
        unit, lowest, total = int(units[-1]), lowests[-1:], totals[-1:]
    if len(total):
        yield lowest, total


def _signed_rows(task: _SignTask, kept: np.ndarray) -> Iterator[Signed]:
    """The kept rows, a few megabytes at a time.

    Where repositories are compared before files, the files' signatures are stored for the second pass.
    """
    options, units = task.options, task.unit_of_row(kept)
    record = np.dtype([("row", "<i8"), ("words", "<i8"), ("signature", "<u4", (options.num_hashes,))])
    target = task.shard.beside("signed-rows")
    if options.level == "both" and finished(target, task.shard.scan_key) is not None:
        stored = np.memmap(target, record, "r") if len(kept) else np.zeros(0, record)
        places = np.searchsorted(stored["row"], kept)
        for start in range(0, len(kept), _FILES_AT_ONCE):
            found = stored[places[start : start + _FILES_AT_ONCE]]
            yield units[start : start + _FILES_AT_ONCE], found["signature"], found["words"]
        return
    with ExitStack() as stack:
        file = None
        if options.level == "both" and task.level == "repository":
            stack.enter_context(redoing(target, task.shard.scan_key))
            file = stack.enter_context(writing(target))
        position = 0
        for texts in _kept_texts(task.shard, kept):
            chunk = slice(position, position + len(texts))
            position += len(texts)
            signed, words = signatures(texts, num_hashes=options.num_hashes, ngram=options.ngram)
            if file is not None:
                records = np.empty(len(texts), record)
                records["row"], records["words"], records["signature"] = kept[chunk], words, signed
                records.tofile(file)
            yield units[chunk], signed, words


def _kept_texts(shard: Shard, kept: np.ndarray) -> Iterator[list[bytes]]:
    """The texts of the kept rows in order, a few megabytes at a time."""
    start = 0
    with open_parquet(shard.scanned) as file:
        for group in range(file.num_row_groups):
            column = file.read_row_group(group, columns=["text"]).column(0)
            rows = kept[(kept >= start) & (kept < start + len(column))] - start
            start += len(column)
            if len(rows):
                yield column.take(pa.array(rows)).cast(pa.binary()).to_pylist()


@dataclass(frozen=True, kw_only=True)
class _PairTask:
    key: str
    band_files: tuple[Path, ...]
    files: SignatureFiles
    options: NearDedupConfig
    bands: range
    keys: tuple[int, int]
    gone: Path
    """EDGE records of the copies found so far, by unit"""
    target: Path
    size: int


def _pair(task: _PairTask) -> tuple[int, bool]:
    """Writes the near pairs of some bands; returns how many, and whether a group was too large for all of its pairs."""
    if (done := finished(task.target, task.key)) is not None:
        return int(done["pairs"]), bool(done["truncated"])
    truncated, found, gone = False, [np.zeros(0, EDGE)], np.fromfile(task.gone, EDGE)["later"]
    with redoing(task.target, task.key) as result:
        for band in task.bands:
            pairs, cut = candidate_pairs(
                task.band_files, task.files.starts, task.keys, band=band, bands=task.options.bands, gone=gone
            )
            truncated |= cut
            found.append(near_pairs(pairs, task.files, similarity=task.options.similarity))
        edges = np.unique(np.concatenate(found))
        write_runs(task.target, [edges])
        result["pairs"], result["truncated"] = len(edges), truncated
    return len(edges), truncated


def _search(signed: Sequence[_SignTask], files: SignatureFiles, options: NearDedupConfig, run: RunTasks) -> Path:
    """The file of all near copies, as EDGE records by unit: each with the unit kept instead and the similarity."""
    num_units = int(files.starts[-1])
    ranges = key_ranges(num_units, _RECORDS_AT_ONCE)
    bands_at_once = max(1, min(options.bands, _RECORDS_AT_ONCE // num_units))
    copies = signed[0].signatures.with_name(f"near-{signed[0].level}-copies")
    write_runs(copies, [])
    while True:
        key = hash_of([[task.key for task in signed], _state(copies)])
        tasks = [
            _PairTask(
                key=hash_of([key, band, keys]), band_files=tuple(task.bands for task in signed), files=files,
                options=options, bands=range(band, min(band + bands_at_once, options.bands)), keys=keys, gone=copies,
                target=copies.with_name(f"near-{signed[0].level}-{band:03d}-{index:05d}.edges"),
                size=num_units // len(ranges) * bands_at_once + 1,
            )
            for band in range(0, options.bands, bands_at_once)
            for index, keys in enumerate(ranges)
        ]  # fmt: skip
        compared = run(_pair, tasks, "near-dedup: comparing")
        num_pairs = sum(pairs for pairs, _ in compared)
        found = list(choose_copies(_by_unit([task.target for task in tasks], num_units, num_pairs), num_units))
        if num_found := sum(map(len, found)):
            write_runs(copies, [np.concatenate([np.fromfile(copies, EDGE), *found])])
        if not num_found or not any(cut for _, cut in compared):
            return copies


def _by_unit(files: Sequence[Path], num_units: int, num_pairs: int) -> Iterator[np.ndarray]:
    """The EDGE records of all files by their later unit, about `_RECORDS_AT_ONCE` at a time."""
    step = max(1, num_units * _RECORDS_AT_ONCE // max(num_pairs, 1))
    for start in range(0, num_units, step):
        keys = (start, min(start + step, num_units) - 1)
        yield np.unique(np.concatenate([read_range(file, EDGE, keys, field="later") for file in files]))


def choose_copies(edges: Iterable[np.ndarray], num_units: int) -> Iterator[np.ndarray]:
    """Decides on the units in order: one that is near to earlier kept units is a copy of the first of them.

    `edges` are EDGE records ordered by the later unit, then the earlier one, in parts; yields, part by part, the edges
    from a copy to the unit kept instead.
    """
    gone = np.zeros(num_units, bool)
    for part in edges:
        chosen = []
        for place, (later, earlier, _) in enumerate(part.tolist()):
            if not gone[later] and not gone[earlier]:
                gone[later] = True
                chosen.append(place)
        yield part[chosen]


def read_copy(detail: str) -> tuple[str, float]:
    """Parses a dropped row's detail: the name of what it is a copy of, and the similarity."""
    name, _, similarity = detail.rpartition(" ")
    return name, float(similarity.strip("()"))


def _state(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class _TakeTask:
    signed: _SignTask
    index: int
    names: NameFiles
    copies: Path

    @property
    def size(self) -> int:
        return self.signed.size


def _take(task: _TakeTask) -> DropFile | None:
    """Writes the rows of the shard's own copies as drops."""
    start, end = task.names.starts[task.index : task.index + 2].tolist()
    copies = read_range(task.copies, EDGE, (start, end - 1), field="later")
    signed, target = task.signed, task.signed.shard.beside(f"dropped-near-{task.signed.level}")
    if not len(copies):
        return write_drops(target, [])
    kept = signed.shard.kept()
    units = signed.unit_of_row(kept) + start
    places = np.minimum(np.searchsorted(copies["later"], units), len(copies) - 1)
    chosen = np.flatnonzero(copies["later"][places] == units)
    similar = copies["similarity"].tolist()
    named = [f"{name} ({share:.2f})" for name, share in zip(task.names.take(copies["earlier"]), similar, strict=True)]
    details = tuple(named[place] for place in places[chosen].tolist())
    reason = f"near copy of another {signed.level}"
    return write_drops(target, [Drop(stage="near-dedup", reason=reason, rows=kept[chosen], details=details)])
