"""What happens between reading and writing: steps that see every shard and leave out more of its files.

A step is given the shards as they stand and says, shard by shard, which rows to drop and why. It may be global (dedup:
it reads a few columns of all shards), or a pass of document stages over each shard by itself (`DocumentPass`), and it
runs its own shard tasks through `run`, on whatever engine the build uses. A step must be a pure function of what the
shards hold: it is done again after a crash, unless its tasks remember what they have done (`finished`, `redoing`).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacoder.corpus.config import CorpusConfig

__all__ = ["Drop", "RunTasks", "Shard", "Step", "hash_of"]


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
class Shard:
    """A scanned shard (`SCAN_SCHEMA`) and what the steps so far have dropped from it."""

    name: str
    key: str
    """changes when the rows or the drops do"""
    scanned: Path
    size: int
    """bytes of the documents read, for progress"""
    drops: tuple[Drop, ...] = ()

    @cached_property
    def kept(self) -> np.ndarray:
        """Rows (int64, ascending) of the documents that no stage has dropped."""
        documents = np.flatnonzero(pq.read_table(self.scanned, columns=["digest"])["digest"].is_valid().to_numpy())
        return np.setdiff1d(documents, np.concatenate([np.zeros(0, np.int64), *(drop.rows for drop in self.drops)]))

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Those columns of the kept rows, in order."""
        return pq.read_table(self.scanned, columns=list(names)).take(self.kept)

    def without(self, drops: Sequence[Drop]) -> "Shard":
        """The shard after a step that drops these rows as well."""
        drops = tuple(drop for drop in drops if len(drop.rows))
        told = [[drop.stage, drop.reason, drop.rows.tolist(), drop.details] for drop in drops]
        return replace(self, key=hash_of([self.key, told]), drops=(*self.drops, *drops))


class RunTasks(Protocol):
    """Runs `function`, importable and pure, over tasks with a `size` in bytes; results in the order of the tasks."""

    def __call__(self, function: Callable[[Any], Any], tasks: Sequence[Any], title: str) -> list[Any]: ...


class Step(Protocol):
    """One step between reading and writing."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the stages under which it drops files, in the order of the accounts."""

    def __call__(self, shards: Sequence[Shard], config: CorpusConfig, run: RunTasks) -> list[list[Drop]]:
        """For each shard what to drop from its kept rows."""


def hash_of(value: Any) -> str:
    """A key for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
