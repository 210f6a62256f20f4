"""Exact duplicates: of files with the same text the one that comes first is kept, in the order repository, path.

Shards hold repositories in name order and files in path order, so "first" is a position, the same for any number of
workers and any order of the inputs. Sixteen bytes of SHA-256 a file are held and sorted: 24 bytes a file in all.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.steps import Drop, RunTasks, Shard

__all__ = ["DIGEST_BYTES", "ExactDedup", "digest", "later_copies"]

DIGEST_BYTES = 16

_AT_ONCE = 8_000_000  # files, at 24 bytes each to sort


def digest(text: str) -> bytes:
    """Identifies a text; 128 bits of SHA-256."""
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


class ExactDedup:
    """Drops every file whose text an earlier one has; a `Step`."""

    names = ("dedup",)

    def __call__(self, shards: Sequence[Shard], config: CorpusConfig, run: RunTasks) -> list[list[Drop]]:
        """The later copies in each shard."""
        parts = -(-sum(len(shard.kept) for shard in shards) // _AT_ONCE)
        copies: list[list[np.ndarray]] = [[] for _ in shards]
        for part in range(parts):
            rows, digests = zip(*(_rows_of_part(shard, part, parts) for shard in shards), strict=True)
            for found, row, copied in zip(copies, rows, later_copies(digests), strict=True):
                found.append(row[copied])
        return [
            [Drop(stage="dedup", reason="copy of another file", rows=np.sort(np.concatenate(found)))] if found else []
            for found in copies
        ]


def _rows_of_part(shard: Shard, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """The kept rows (N,) whose digests fall into one of `parts` equal ranges, and these digests (N, 16)."""
    joined = b"".join(shard.columns(["digest"])["digest"].to_pylist())
    digests = np.frombuffer(joined, np.uint8).reshape(-1, DIGEST_BYTES)
    leading = digests[:, 0].astype(np.int64) << 8 | digests[:, 1]
    mine = leading * parts >> 16 == part
    return shard.kept[mine], digests[mine]


def later_copies(shards: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each shard's digests, (N, 16) uint8 in row order, which rows (N,) bool repeat an earlier one."""
    rows = np.concatenate([np.zeros((0, DIGEST_BYTES), np.uint8), *shards])
    high, low = np.ascontiguousarray(rows).view(np.uint64).T
    order = np.lexsort((low, high))  # stable: equal digests stay in row order
    repeats = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    copies = np.zeros(len(rows), bool)
    copies[order[1:]] = repeats
    return np.split(copies, np.cumsum([len(shard) for shard in shards])[:-1]) if shards else []
