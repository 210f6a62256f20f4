"""Blending by token weight as a table: which dataset the next window of a stream is taken from.

Windows hold equal numbers of tokens, so shares of windows are shares of tokens. Dataset d with q of a table's Q entries
is due at the times (k + 1/2) / q, k = 0, 1, ...; the table lists the datasets in the order of these times and is
repeated forever. So each dataset has exactly its share of every round, and no prefix deviates from it by more than a
window or so; there is no end to run past, and no state but the number of windows. Each of the V streams goes through
the table by itself, from starts spread over the table, so that neighbouring windows mix datasets too.

Megatron picks greedily by the largest error, for a number of samples that must be known in advance, from datasets that
are each made a little larger than needed; where that margin is too small, the run ends in an IndexError.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megacoder.core.errors import ConfigError
from megacoder.data.permutation import stream_phase

__all__ = ["MAX_ROUND", "blend_counts", "blend_table"]

MAX_ROUND = 1 << 20
"""Most entries of a table, 2 MB: weights that need more are rounded, to one entry each at least, so that a dataset with
less than a millionth of the tokens is served more often than its share."""

MAX_DATASETS = 1 << 16
"""Their numbers are uint16."""


def blend_table(weights: Sequence[float]) -> np.ndarray:
    """One round: uint16 (Q,), dataset numbers, each as often as its weight says.

    Weights need not sum to 1; decimal ones such as 0.87 are met exactly. From a dataset of weight 0 nothing is drawn.
    """
    for weight in weights:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(f"weights = {list(weights)}: {weight} is not a positive number, or 0")
    if not 0 < len(weights) <= MAX_DATASETS:
        raise ConfigError(f"{len(weights)} weights: from 1 to {MAX_DATASETS:,}")
    if not any(weights):
        raise ConfigError(f"weights = {list(weights)}: at least one must be a positive number")
    counts = _whole_numbers([Fraction(str(weight)) for weight in weights])
    due = np.concatenate([(2 * np.arange(count) + 1) / (2 * max(1, count)) for count in counts])
    datasets = np.repeat(np.arange(len(counts)), counts)
    return datasets[np.argsort(due, kind="stable")].astype(np.uint16)


def blend_counts(table: np.ndarray, *, num_windows: int, num_streams: int, num_datasets: int) -> list[int]:
    """How many of the first `num_windows` windows of a run came from each dataset."""
    streams = np.arange(num_streams)
    served = num_windows // num_streams + (streams < num_windows % num_streams)  # windows of each stream
    begin = np.array([stream_phase(stream, num_streams, len(table)) for stream in range(num_streams)])
    counts = []
    for dataset in range(num_datasets):
        before = np.concatenate([[0], np.cumsum(np.tile(table == dataset, 2))])  # in two rounds, end to end
        rounds, rest = np.divmod(served, len(table))
        counts.append(int((rounds * before[len(table)] + before[begin + rest] - before[begin]).sum()))
    return counts


def _whole_numbers(weights: list[Fraction]) -> list[int]:
    """The smallest whole numbers in these proportions, or nearly so where their sum would exceed MAX_ROUND."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    size = math.lcm(*(share.denominator for share in shares))
    if size <= MAX_ROUND:
        return [int(share * size) for share in shares]
    counts = [max(int(share > 0), int(share * MAX_ROUND)) for share in shares]
    by_loss = sorted(range(len(shares)), key=lambda i: shares[i] * MAX_ROUND - counts[i], reverse=True)
    for index in by_loss[: max(0, MAX_ROUND - sum(counts))]:
        counts[index] += 1
    return counts
