"""Held-out files with the text of a training file: they are dropped, so that no text is both trained on and evaluated.

Exact dedup may leave copies on which other files of their repositories depend, and the split may part them. Dropping
them from training instead would leave holes: a popular file, held out once, would be missing in every repository that
has it. The held-out part has a size limit, so a task may hold its digests.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megacoder.corpus.drops import Drop, DropFile, write_drops
from megacoder.corpus.runs import write_runs
from megacoder.corpus.shards import finished, redoing
from megacoder.corpus.steps import RunTasks, Shard, hash_of

__all__ = ["HELD_OUT_STAGE", "drop_leaks"]

HELD_OUT_STAGE = "held out"

_DIGEST = np.dtype([("key", "<u8"), ("low", "<u8")])


@dataclass(frozen=True, kw_only=True)
class _Task:
    key: str
    """changes when any shard or choice does"""
    shard: Shard
    column: str
    """names the unit that is held out: a repository or a path"""
    heldout: frozenset[str]
    """the shard's units that are held out"""
    known: Path
    """digests to compare with"""

    @property
    def size(self) -> int:
        return self.shard.size

    def rows(self, *, heldout: bool) -> tuple[np.ndarray, np.ndarray]:
        """Rows and digests of the kept files that are held out, or of those that are not."""
        kept = self.shard.kept()
        table = self.shard.columns([self.column, "digest"], kept)
        held = pc.is_in(table[self.column], value_set=pa.array(sorted(self.heldout), pa.string())).to_numpy()
        digests = np.frombuffer(b"".join(table["digest"].to_pylist()), _DIGEST)
        return kept[held == heldout], digests[held == heldout]


def drop_leaks(
    shards: Sequence[Shard], column: str, heldout: Sequence[frozenset[str]], run: RunTasks
) -> list[DropFile | None]:
    """For each shard what to drop from its `heldout` units, named by `column`; all others are trained on."""
    if not any(heldout):
        return [None] * len(shards)
    held, leaked = (shards[0].scanned.with_name(name) for name in ("digests-held-out", "digests-leaked"))
    key = hash_of([[shard.key for shard in shards], column, [sorted(units) for units in heldout]])

    def tasks(known: Path) -> list[_Task]:
        return [
            _Task(key=key, shard=shard, column=column, heldout=units, known=known)
            for shard, units in zip(shards, heldout, strict=True)
        ]

    _merge(run(_list_held_out, [task for task in tasks(held) if task.heldout], "held out: listing"), held)
    _merge(run(_list_trained, tasks(held), "held out: comparing"), leaked)
    drops = iter(run(_take, [task for task in tasks(leaked) if task.heldout], "held out: dropping"))
    return [next(drops) if units else None for units in heldout]


def _merge(parts: Iterable[Path], target: Path) -> None:
    write_runs(target, [np.unique(np.concatenate([np.fromfile(part, _DIGEST) for part in parts]))])


def _list_held_out(task: _Task) -> Path:
    """Writes the digests of the held-out files."""
    return _listed(task, "digests-held-out", lambda: task.rows(heldout=True)[1])


def _list_trained(task: _Task) -> Path:
    """Writes those of the known digests that training files have."""
    return _listed(
        task, "digests-trained", lambda: np.intersect1d(task.rows(heldout=False)[1], np.fromfile(task.known, _DIGEST))
    )


def _listed(task: _Task, name: str, digests: Callable[[], np.ndarray]) -> Path:
    target = task.shard.beside(name)
    if finished(target, task.key) is None:
        with redoing(target, task.key):
            write_runs(target, [digests()])
    return target


def _take(task: _Task) -> DropFile | None:
    """Writes the held-out files with a known digest as drops."""
    rows, digests = task.rows(heldout=True)
    leaked = rows[np.isin(digests, np.fromfile(task.known, _DIGEST))]
    drop = Drop(stage=HELD_OUT_STAGE, reason="copy of a training file", rows=leaked)
    return write_drops(task.shard.beside("dropped-leaks"), [drop])
