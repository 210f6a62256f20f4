"""Near duplicates: repositories, or files, whose words are mostly those of an earlier one.

As in the paper a repository is one document, so that no repository is left with holes; its signature is the minimum of
its files'. Of near units the first in name order stays. A unit goes only if it is near to one that stays: no chain of
small differences ends in the loss of something new, and every loss names what stands for it.

Everything large stays on disk: each shard leaves signatures and sorted band records; tasks that own a range of a
band's hashes find near pairs; the pairs, sorted, decide. The main process holds one byte a unit and the pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacoder.core.files import replacing
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.lsh import EDGE, SignatureFiles, band_runs, candidate_pairs, near_pairs
from megacoder.corpus.minhash import EMPTY, signatures
from megacoder.corpus.near_config import NearDedupConfig
from megacoder.corpus.runs import key_ranges, write_runs
from megacoder.corpus.shards import disk_errors, finished, redoing
from megacoder.corpus.steps import Drop, RunTasks, Shard, hash_of

__all__ = ["NearDedup", "choose_copies", "read_copy"]

Level = Literal["repository", "file"]

_RECORDS_AT_ONCE = 1 << 20  # band records a task sorts: 40 MB with what they are sorted by


class NearDedup:
    """Drops near copies of repositories or of files; a `Step`."""

    names = ("near-dedup",)

    def __init__(self, level: Level) -> None:
        self._level: Level = level

    def __call__(self, shards: Sequence[Shard], config: CorpusConfig, run: RunTasks) -> list[list[Drop]]:
        """The rows of near copies in each shard, with what each is a copy of."""
        options = config.near_dedup
        signed = [_SignTask(shard=shard, level=self._level, options=options) for shard in shards]
        counts = run(_sign, signed, "near-dedup: signing")
        files = SignatureFiles(
            paths=tuple(task.signatures for task in signed), counts=tuple(counts), num_hashes=options.num_hashes
        )
        copies = _search(signed, files, options, run)
        return _drops(signed, files.starts, copies, self._level)


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
        return self.shard.scanned.with_name(f"signed-{self.level}-{self.shard.name}.u32")

    @property
    def bands(self) -> Path:
        """A run of band records for each band."""
        return self.signatures.with_suffix(".bands")

    def units(self) -> list[str]:
        """The names of the units."""
        if self.level == "repository":
            return list(dict.fromkeys(self.shard.columns(["repo"])["repo"].to_pylist()))
        table = self.shard.columns(["repo", "path"])
        return [f"{repo}/{path}" for repo, path in zip(*(column.to_pylist() for column in table), strict=True)]

    def unit_of_row(self) -> np.ndarray:
        """The unit of each kept row."""
        if self.level == "file":
            return np.arange(len(self.shard.kept))
        repos = self.shard.columns(["repo"])["repo"].combine_chunks()  # those of one repository are contiguous
        return np.unique(repos.dictionary_encode().indices.to_numpy(), return_inverse=True)[1]


def _sign(task: _SignTask) -> int:
    """Writes the signatures and band records of a shard's units; their number."""
    if (done := finished(task.signatures, task.key)) is not None:
        return int(done["units"])
    options, unit_of_row = task.options, task.unit_of_row()
    num_units = int(unit_of_row.max(initial=-1)) + 1
    merged = np.full((num_units, options.num_hashes), EMPTY)
    num_words = np.zeros(num_units, np.int64)
    with redoing(task.signatures, task.key) as result:
        position = 0
        for texts in _kept_texts(task.shard):
            units = unit_of_row[position : position + len(texts)]
            position += len(texts)
            signed, words = signatures(texts, num_hashes=options.num_hashes, ngram=options.ngram)
            np.add.at(num_words, units, words)
            firsts = np.flatnonzero(np.diff(units, prepend=-1))  # a unit's rows are contiguous
            lowest = np.minimum.reduceat(signed, firsts, axis=0)
            np.minimum(merged[units[firsts]], lowest, out=lowest)
            merged[units[firsts]] = lowest
        with disk_errors(task.signatures), replacing(task.signatures) as temporary:
            merged.tofile(temporary)
        eligible = np.flatnonzero(num_words >= options.min_words)
        runs = band_runs(merged, eligible, bands=options.bands, rows=options.rows)
        write_runs(task.bands, list(runs))
        result["units"] = num_units
    return num_units


def _kept_texts(shard: Shard) -> Iterator[list[bytes]]:
    """The texts of the kept rows in order, a few megabytes at a time."""
    kept, start = shard.kept, 0
    with pq.ParquetFile(shard.scanned) as file:
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
    gone: np.ndarray
    target: Path
    size: int


def _pair(task: _PairTask) -> bool:
    """Writes the near pairs of some bands; whether a group was too large to look at all of its pairs."""
    if (done := finished(task.target, task.key)) is not None:
        return bool(done["truncated"])
    truncated, found = False, [np.zeros(0, EDGE)]
    with redoing(task.target, task.key) as result:
        for band in task.bands:
            pairs, cut = candidate_pairs(
                task.band_files, task.files.starts, task.keys, band=band, bands=task.options.bands, gone=task.gone
            )
            truncated |= cut
            found.append(near_pairs(pairs, task.files, similarity=task.options.similarity))
        with disk_errors(task.target), replacing(task.target) as temporary:
            np.unique(np.concatenate(found)).tofile(temporary)
        result["truncated"] = truncated
    return truncated


def _search(
    signed: Sequence[_SignTask], files: SignatureFiles, options: NearDedupConfig, run: RunTasks
) -> dict[int, tuple[int, float]]:
    """Each near copy with what it is a copy of and how near, by global number."""
    copies: dict[int, tuple[int, float]] = {}
    num_units = int(files.starts[-1])
    ranges = key_ranges(num_units, _RECORDS_AT_ONCE)
    bands_at_once = max(1, min(options.bands, _RECORDS_AT_ONCE // max(num_units, 1)))
    while num_units:
        gone = np.array(sorted(copies), np.int64)
        key = hash_of([[task.key for task in signed], gone.tolist()])
        tasks = [
            _PairTask(
                key=hash_of([key, band, keys]), band_files=tuple(task.bands for task in signed), files=files,
                options=options, bands=range(band, min(band + bands_at_once, options.bands)), keys=keys, gone=gone,
                target=signed[0].signatures.with_name(f"near-{signed[0].level}-{band:03d}-{index:05d}.edges"),
                size=num_units // len(ranges) * bands_at_once + 1,
            )
            for band in range(0, options.bands, bands_at_once)
            for index, keys in enumerate(ranges)
        ]  # fmt: skip
        truncated = any(run(_pair, tasks, "near-dedup: comparing"))
        found = choose_copies([np.fromfile(task.target, EDGE) for task in tasks], num_units)
        copies |= found
        if not (truncated and found):
            return copies
    return copies


def choose_copies(edges: Sequence[np.ndarray], num_units: int) -> dict[int, tuple[int, float]]:
    """Goes through the units in order: one that is near to an earlier one that stays is a copy of the first such.

    `edges` are EDGE arrays in any order, repeats allowed; returns copy -> (what it is a copy of, similarity).
    """
    gone = np.zeros(num_units, bool)
    copies: dict[int, tuple[int, float]] = {}
    for later, earlier, similarity in np.unique(np.concatenate([np.zeros(0, EDGE), *edges])).tolist():
        if not gone[later] and not gone[earlier]:
            gone[later] = True
            copies[later] = (earlier, similarity)
    return copies


def read_copy(detail: str) -> tuple[str, float]:
    """What a dropped row's detail says: the name of what it is a copy of, and how near."""
    name, _, similarity = detail.rpartition(" ")
    return name, float(similarity.strip("()"))


def _drops(
    signed: Sequence[_SignTask], starts: np.ndarray, copies: dict[int, tuple[int, float]], level: Level
) -> list[list[Drop]]:
    """The rows of the copies, shard by shard; only names that are needed are read."""
    needed = {unit for copy, (earlier, _) in copies.items() for unit in (copy, earlier)}
    shard_of = {unit: int(np.searchsorted(starts, unit, "right")) - 1 for unit in needed}
    names: dict[int, str] = {}
    for shard in sorted(set(shard_of.values())):
        listed = signed[shard].units()
        names |= {unit: listed[unit - starts[shard]] for unit, place in shard_of.items() if place == shard}
    drops: list[list[Drop]] = [[] for _ in signed]
    for shard in sorted({shard_of[unit] for unit in copies}):
        unit_of_row = signed[shard].unit_of_row() + starts[shard]
        chosen = [position for position, unit in enumerate(unit_of_row.tolist()) if unit in copies]
        found = [copies[int(unit_of_row[position])] for position in chosen]
        details = tuple(f"{names[earlier]} ({similarity:.2f})" for earlier, similarity in found)
        rows = signed[shard].shard.kept[chosen]
        drops[shard] = [Drop(stage="near-dedup", reason=f"near copy of another {level}", rows=rows, details=details)]
    return drops
