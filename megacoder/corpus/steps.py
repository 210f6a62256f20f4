"""The steps between reading and writing: they see every shard and drop more files.

A step is given the shards as they are and writes, to one file per shard, which rows to drop and why. It may be global
(dedup: it reads a few columns of all shards), or a pass of document stages over each shard by itself (`DocumentPass`),
and it runs its own shard tasks through `run`, on whatever engine the build uses. A step must be a pure function of what
the shards hold: it is run again after a crash, except for tasks marked as finished (`finished`, `redoing`).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.drops import DropFile
from megacoder.data.parquet import read_table

__all__ = ["RunTasks", "Shard", "Step", "hash_of"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A scanned shard (`SCAN_SCHEMA`) and what the steps so far have dropped from it; its files are all on disk."""

    name: str
    key: str
    """changes when the rows or the drops do"""
    scan_key: str
    """changes when the rows do"""
    scanned: Path
    size: int
    """bytes of the documents read, for progress"""
    drops: tuple[Path, ...] = ()
    """files of `write_drops`"""

    def kept(self) -> np.ndarray:
        """Rows (int64, ascending) of the documents that no stage has dropped."""
        stages = read_table(self.scanned, ["stage"])["stage"]
        kept = stages.is_null().to_numpy().copy()
        for path in self.drops:
            kept[read_table(path, ["row"])["row"].to_numpy()] = False
        return np.flatnonzero(kept)

    def columns(self, names: Sequence[str], kept: np.ndarray) -> pa.Table:
        """Those columns of the kept rows, in order."""
        return read_table(self.scanned, names).take(kept)

    def beside(self, kind: str) -> Path:
        """The path of a file that a step keeps about the shard."""
        return self.scanned.with_name(f"{kind}-{self.name}")

    def without(self, drops: DropFile | None) -> "Shard":
        """The shard after a step that drops these rows as well."""
        key = hash_of([self.key, drops and drops.key])
        return replace(self, key=key, drops=(*self.drops, *([drops.path] if drops else [])))


class RunTasks(Protocol):
    """Runs `function`, importable and pure, over tasks with a `size` in bytes; results in the order of the tasks."""

    def __call__(self, function: Callable[[Any], Any], tasks: Sequence[Any], title: str) -> list[Any]: ...


class Step(Protocol):
    """One step between reading and writing."""

    @property
    def names(self) -> tuple[str, ...]:
        """The stages under which it drops files, in the order of the accounts."""

    def __call__(self, shards: Sequence[Shard], config: CorpusConfig, run: RunTasks) -> list[DropFile | None]:
        """For each shard what to drop from its kept rows."""


def hash_of(value: Any) -> str:
    """A key for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
