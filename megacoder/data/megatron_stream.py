"""The samples of a Megatron run in its order, served like any other stream: for runs that move over.

The global batch of a step holds the same samples as Megatron's; rank r of dp serves every dp-th of them. Megatron's
seed is `stream.seed`, its `--reset-position-ids --reset-attention-mask` is `stream.document_masks`, and its
`--eod-mask-loss` is `stream.train_across_documents = false`. There is no fill-in-the-middle: Megatron's depends on the
order in which samples are requested.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megacoder.core.config import check_at_least, to_dict
from megacoder.core.console import say_once
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.indexed import IndexedDataset
from megacoder.data.megatron_order import (
    SampleOrder,
    blending_indices,
    build_sample_order,
    normalized,
    size_with_surplus,
    split_range,
)
from megacoder.data.stream import Batch, StreamConfig, check_order, check_shares
from megacoder.data.tokenizer import Tokenizer
from megacoder.ops.cross_entropy import IGNORE_INDEX

__all__ = ["MegatronConfig", "MegatronStream"]

_LONG_BUILD = 1 << 20  # samples; a hundred million take minutes, most of them for NumPy's shuffle
_DECISIVE = ("seq_length", "seed", "train_across_documents")


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """What else decides the order of a Megatron run."""

    num_samples: int | None = None
    """the Megatron run's --train-iters times --global-batch-size; if unset, steps * global_batch_size of this run"""
    consumed_samples: int = 0
    """samples that the Megatron run has trained on; this run continues after them"""
    split: tuple[float, ...] = (1.0, 0.0, 0.0)
    """the Megatron run's --split: the first of these shares of the sequences is the training data"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_samples", prefix="data.megatron.")
        check_at_least(self, 0, "consumed_samples", prefix="data.megatron.")
        split_range(self.split, 0)


class MegatronStream:
    """Serves the windows of one data-parallel rank, step after step, to the end of the run's samples."""

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        tokenizer: Tokenizer,
        config: StreamConfig,
        megatron: MegatronConfig,
        *,
        num_samples: int,
        global_batch_size: int,
        weights: Sequence[float],
        dp_rank: int,
        dp_size: int,
    ) -> None:
        """`num_samples` are those of this run, from `megatron.consumed_samples` on."""
        _check(config, datasets, weights)
        check_shares(global_batch_size, dp_rank=dp_rank, dp_size=dp_size)
        self.config, self.global_batch_size = config, global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.windows = megatron.consumed_samples
        """samples that all ranks together have served, Megatron's included"""
        self._datasets, self._tokenizer = datasets, tokenizer
        total = megatron.num_samples or megatron.consumed_samples + num_samples
        if total >= _LONG_BUILD:
            say_once(f"building Megatron's order of {total:,} samples")
        self._blend, sizes = _blend(weights, len(datasets), total)
        self._orders = [
            build_sample_order(
                dataset.sequence_lengths, split_range(megatron.split, dataset.num_sequences),
                num_samples=size, seq_length=config.seq_length, seed=config.seed,
            )
            for dataset, size in zip(datasets, sizes, strict=True)
        ]  # fmt: skip
        if self._blend is None and len(datasets) > 1:  # without weights, datasets are blended by their sizes
            counts = [len(order) for order in self._orders]
            self._blend = blending_indices(normalized(counts), min(total, sum(counts)))
        for number, order in enumerate(self._orders):
            if self._blend is not None and np.count_nonzero(self._blend[0] == number) > len(order):
                raise ConfigError(
                    f"data.weights = {list(weights)}: the blend takes more samples than dataset {number} has"
                )
        self.num_samples = len(self._orders[0]) if self._blend is None else len(self._blend[0])
        """samples to serve, in all"""
        self._order = {
            "compat": "megatron",
            "datasets": [[dataset.num_documents, dataset.num_tokens] for dataset in datasets],
            "tokenizer": tokenizer.digest,
            "num_samples": total,
            "split": list(megatron.split),
            "weights": list(weights),
            **{key: value for key, value in to_dict(config).items() if key in _DECISIVE},
        }

    def next_batch(self, *, threads: Executor | None = None, num_threads: int = 1) -> Batch:
        """This rank's windows of the next step; one thread makes them. DataError once the samples are used up."""
        stop = self.windows + self.global_batch_size
        if stop > self.num_samples:
            raise DataError(
                f"the Megatron order has {self.num_samples:,} samples, but this step needs {stop:,}; set "
                "data.megatron.num_samples to the number that Megatron's run was planned for, or end the run here"
            )
        ours = range(self.windows + (self.dp_rank - self.windows) % self.dp_size, stop, self.dp_size)
        windows = torch.from_numpy(np.stack([self.sample(index) for index in ours]))
        self.windows = stop
        tokens, labels = windows[:, :-1].clone(), windows[:, 1:].clone()  # a single row would share its memory
        ends = tokens == self._tokenizer.eos_id
        if not self.config.train_across_documents:
            labels.masked_fill_(ends, IGNORE_INDEX)
        starts = None
        if self.config.document_masks:
            starts = torch.ones_like(ends)
            starts[:, 1:] = ends[:, :-1]
        return Batch(tokens=tokens, labels=labels, starts=starts)

    def sample(self, index: int) -> np.ndarray:
        """Sample `index` of the run: int64 (S + 1,)."""
        number, index = (0, index) if self._blend is None else (int(part[index]) for part in self._blend)
        return _read(self._datasets[number], self._orders[number], index)

    def state_dict(self) -> dict[str, Any]:
        """Plain integers, the same on every rank."""
        return {"windows": self.windows, "order": self._order, "streams": []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state, on any number of ranks; ConfigError where it belongs to another order."""
        check_order(self._order, state)
        self.windows = state["windows"]


def _read(dataset: IndexedDataset, order: SampleOrder, index: int) -> np.ndarray:
    place = int(order.shuffle[index])
    (first, begin), (last, end) = order.samples[place : place + 2].tolist()
    parts = [dataset.sequence(int(order.documents[number])) for number in range(first, last + 1)]
    parts[-1] = parts[-1][: end + 1]
    parts[0] = parts[0][begin:]
    return np.concatenate(parts, dtype=np.int64)


def _check(config: StreamConfig, datasets: Sequence[IndexedDataset], weights: Sequence[float]) -> None:
    needed = {"add_bos": False, "packing": "concatenate"}
    wrong = [f"data.stream.{key}" for key, value in needed.items() if getattr(config, key) != value]
    wrong += ["data.stream.fim.rate"] if config.fim.rate > 0 else []
    if wrong:
        raise ConfigError(
            f'data.compat = "megatron" serves datasets as they are, and {wrong[0]} would change them; set '
            'data.stream.add_bos = false, data.stream.packing = "concatenate" and data.stream.fim.rate = 0.0'
        )
    if weights and len(weights) != len(datasets):
        raise ConfigError(f"data.weights = {list(weights)}: give one for each of the {len(datasets)} datasets, or none")


def _blend(
    weights: Sequence[float], num_datasets: int, total: int
) -> tuple[tuple[np.ndarray, np.ndarray] | None, list[int | None]]:
    """The blending indices, None without weights, and the samples to build of each dataset, None for one epoch."""
    if not weights:
        return None, [total if num_datasets == 1 else None] * num_datasets
    shares = normalized(weights)
    sizes = [size_with_surplus(total, share) for share in shares]
    taken = sum(size for size, _ in sizes)
    return blending_indices(normalized(shares), taken), [prepared for _, prepared in sizes]
