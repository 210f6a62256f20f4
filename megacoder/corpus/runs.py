"""Records grouped by key without holding them in memory: an external sort by ranges of the key.

Each shard leaves *runs*, its records sorted by key, in one file. A task then owns a range of keys and reads just that
range of every run, found by bisection, so that equal keys of all shards meet in one task and nothing is read twice.
Keys are hashes: equal ranges hold about equally many records.
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np

from megacoder.corpus.shards import writing

__all__ = ["key_ranges", "read_range", "write_runs"]


def write_runs(path: Path, runs: Iterable[np.ndarray]) -> None:
    """Writes runs of one length and structured dtype, each sorted by its fields in order; the first is the key."""
    with writing(path) as file:
        for run in runs:
            np.sort(run, order=list(run.dtype.names or ())).tofile(file)


def key_ranges(num_records: int, max_records: int) -> list[tuple[int, int]]:
    """Ranges [first, last] that cover all keys and hold at most about `max_records` each."""
    count = max(1, -(-num_records // max_records))
    edges = [(index << 64) // count for index in range(count + 1)]
    return [(first, end - 1) for first, end in pairwise(edges)]


def read_range(
    path: Path, dtype: np.dtype, keys: tuple[int, int], *, field: str = "key", run: int = 0, num_runs: int = 1
) -> np.ndarray:
    """The records of one run of the file whose key, its first `field`, lies in the range, ends included, in order."""
    length = path.stat().st_size // dtype.itemsize // num_runs
    if length == 0:
        return np.zeros(0, dtype)
    records = np.memmap(path, dtype, "r", offset=run * length * dtype.itemsize, shape=(length,))
    first, last = (dtype[field].type(key) for key in keys)
    begin, end = np.searchsorted(records[field], first, "left"), np.searchsorted(records[field], last, "right")
    return np.array(records[begin:end])
