"""Exact duplicates: of files with the same text the one that comes first is kept, in the order repository, path.

Shards hold repositories in name order and files in path order, so "first" is a position, the same for any number of
workers and any order of the inputs. Sixteen bytes of SHA-256 a file are held and sorted: 24 bytes a file in all.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

__all__ = ["DIGEST_BYTES", "digest", "later_copies"]

DIGEST_BYTES = 16


def digest(text: str) -> bytes:
    """Identifies a text; 128 bits of SHA-256."""
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def later_copies(shards: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each shard's digests, (N, 16) uint8 in row order, which rows (N,) bool repeat an earlier one."""
    rows = np.concatenate([np.zeros((0, DIGEST_BYTES), np.uint8), *shards])
    high, low = np.ascontiguousarray(rows).view(np.uint64).T
    order = np.lexsort((low, high))  # stable: equal digests stay in row order
    repeats = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    copies = np.zeros(len(rows), bool)
    copies[order[1:]] = repeats
    return np.split(copies, np.cumsum([len(shard) for shard in shards])[:-1]) if shards else []
