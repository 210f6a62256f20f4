"""Megatron's order of samples, exactly: its document, sample, shuffle and blending indices, as pure functions.

For runs that move over from Megatron-LM. Sequences (its documents) of all the epochs that the run's samples need are
shuffled together, concatenated and cut every S tokens into samples of S + 1, and these are shuffled; a last epoch of
which less than 80% is needed is shuffled separately. Unlike the order of `megacoder.data.stream`, this one must be
built before a run, at 20 bytes per sample and 4 per sequence and epoch, and changes with the number of samples.

The random state is NumPy's RandomState, whose stream NumPy has frozen. Megatron's loop over sequences is replaced by a
lookup: sample i begins at token i S of the concatenation, in the sequence that holds it.

Source: Megatron-LM, megatron/core/datasets/{gpt_dataset,blended_dataset,blended_megatron_dataset_builder}.py and
helpers.cpp, version 0.16.

Legend: N samples, S tokens of each (and one more as the last label), E epochs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megacoder.core.errors import ConfigError, DataError
from megacoder.core.native import native

__all__ = ["SampleOrder", "blending_indices", "build_sample_order", "normalized", "size_with_surplus", "split_range"]

_SEPARATE_BELOW = 0.80  # a last epoch of which a smaller share is needed is shuffled separately
_SURPLUS = 0.005  # share of samples that each dataset of a blend has in reserve


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The three indices of one dataset."""

    documents: np.ndarray
    """int32 (E x sequences,): the sequences in the order in which they are concatenated"""
    samples: np.ndarray
    """int64 (N + 1, 2): where samples begin, as (index into `documents`, token of that sequence)"""
    shuffle: np.ndarray
    """uint32 or int64 (N,): the sample that is served as the i-th"""

    def __len__(self) -> int:
        return len(self.shuffle)


def build_sample_order(
    lengths: np.ndarray, sequences: np.ndarray, *, num_samples: int | None, seq_length: int, seed: int
) -> SampleOrder:
    """The order of at least `num_samples` samples, or of one epoch where that is None.

    `lengths` are tokens of all sequences of the dataset, `sequences` the numbers of those to use. Raises DataError
    where they do not fill a sample.
    """
    per_epoch = int(lengths[sequences].sum(dtype=np.int64))
    if per_epoch < 2:
        raise DataError(f"{per_epoch} tokens are too few for a sample")
    wanted = 0 if num_samples is None else num_samples * seq_length + 1
    epochs = max(1, -(-wanted // per_epoch))
    whole = ((epochs - 1) * per_epoch - 1) // seq_length  # samples of all epochs but the last
    apart = (
        epochs > 1
        and num_samples is not None
        and num_samples - whole < int(_SEPARATE_BELOW * ((per_epoch - 1) // seq_length))
    )
    random = np.random.RandomState(seed)
    repeats = [epochs - 1, 1] if apart else [epochs]
    documents = np.concatenate([_shuffled(np.tile(sequences.astype(np.int32), n), random) for n in repeats])
    samples = _sample_starts(lengths, documents, seq_length)
    total = len(samples) - 1
    if total < 1:
        raise DataError(f"{per_epoch} tokens are too few for a sample of {seq_length}")
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    edges = [0, whole, total] if apart else [0, total]
    ranges = [np.arange(a, b, dtype=dtype) for a, b in pairwise(edges)]
    return SampleOrder(
        documents=documents, samples=samples, shuffle=np.concatenate([_shuffled(part, random) for part in ranges])
    )


def blending_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 (size,) dataset of each sample and int64 (size,) its number there: the greatest error is served first.

    A million samples of six datasets take a tenth of a second in C++ and some seconds in Python, with equal results.
    """
    datasets, numbers = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    compiled = getattr(native(), "blending_indices", None)  # None where nothing is compiled
    if compiled is not None:
        compiled(list(weights), size, datasets.ctypes.data, numbers.ctypes.data)
        return datasets, numbers
    counts, indices = [0] * len(weights), range(len(weights))
    for sample in range(size):
        due = float(max(sample, 1))
        errors = [weights[i] * due - counts[i] for i in indices]
        chosen = errors.index(max(errors))
        datasets[sample], numbers[sample] = chosen, counts[chosen]
        counts[chosen] += 1
    return datasets, numbers


def size_with_surplus(num_samples: int, weight: float) -> tuple[int, int]:
    """(samples of one dataset that a blend takes, samples that Megatron prepares for it)."""
    taken = math.ceil(num_samples * weight)
    return taken, math.ceil(taken * (1 + _SURPLUS))


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights of sum 1, with NumPy's rounding."""
    values = np.array(weights, dtype=np.float64)
    return (values / np.sum(values)).tolist()


def split_range(split: Sequence[float], num_sequences: int) -> np.ndarray:
    """int32: the sequences of the first part; of `--split 969,30,1` that is the training data."""
    if not split or any(not (part >= 0 and math.isfinite(part)) for part in split) or not split[0] > 0:
        raise ConfigError(f"data.megatron.split = {list(split)}: must be shares of training, validation and test data")
    return np.arange(0, round(normalized(split)[0] * float(num_sequences)), dtype=np.int32)


def _shuffled(values: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    random.shuffle(values)
    return values


def _sample_starts(lengths: np.ndarray, documents: np.ndarray, seq_length: int) -> np.ndarray:
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    tokens = np.arange((int(ends[-1]) - 1) // seq_length + 1, dtype=np.int64) * seq_length
    places = np.searchsorted(ends, tokens, side="right")
    starts = np.stack([places, tokens - (ends[places] - lengths[documents[places]])], axis=1)
    starts[0] = 0  # also where the first sequences are empty
    return starts
