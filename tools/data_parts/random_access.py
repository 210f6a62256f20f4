"""Documents of the corpus in random order: our reader and megatron-core's, both mapped into memory and warm.

Each access makes a view of the tokens and reads the first and the last of them.
"""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from data_parts.corpus import Corpus
from data_parts.megatron import indexed_dataset
from megacoder.data.indexed import IndexedDataset

if TYPE_CHECKING:
    from bench_data import Options

__all__ = ["measure"]

ACCESSES = 200_000


def measure(options: "Options", corpus: Corpus) -> dict[str, dict[str, float | str]]:
    """Microseconds of an access by reader, and how many times as fast ours is."""
    ours, theirs = IndexedDataset(corpus.tokens), indexed_dataset().IndexedDataset(str(corpus.tokens))
    order = np.random.default_rng(0).integers(0, ours.num_documents, ACCESSES).tolist()
    readers: dict[str, Callable[[int], np.ndarray]] = {
        "megacoder document": ours.document,
        "megacoder sequence": ours.sequence,
        "megatron-core": theirs.__getitem__,
    }
    for index in order[:1000]:
        assert np.array_equal(ours.document(index), theirs[index])
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(options.rounds):
        for name, read in readers.items():
            seconds[name].append(_time(read, order))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "microseconds": round(median / ACCESSES * 1e6, 3),
            "times_megatron": round(medians["megatron-core"] / median, 2),
        }
        for name, median in medians.items()
    }


def _time(read: Callable[[int], np.ndarray], order: list[int]) -> float:
    total, start = 0, time.perf_counter()
    for index in order:
        tokens = read(index)
        total += int(tokens[0]) + int(tokens[-1])
    return time.perf_counter() - start
