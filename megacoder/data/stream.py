"""The training tokens as a function of (seed, config, position): the same for any number of ranks, never re-dealt.

There are V logical streams, and every epoch of a dataset, in its keyed order, is cut into V stretches of equally many
tokens, one for each stream (see `megacoder.data.endless`). A stream is its stretches one after another, each document
as BOS, its files (some of them as fill-in-the-middle examples), EOS; they are packed into windows of `seq_length`
tokens. Window g of the run is the next one of stream g mod V. Where datasets are blended, a table says which of them a
stream's next window is taken from (see `megacoder.data.blend`).

So nothing depends on the number of ranks or on how long the run is: rank r of dp serves the windows g = r (mod dp)
and reads only the streams that those come from. A stream's state is four integers for each dataset, and the state of
a run is those of all its streams. A batch mixes as many documents as it has windows, without shuffle buffer or index.

Every epoch serves every token once. A small dataset has fewer streams of its own, a power of two again: V' of them, of
which the run's stream g takes number g mod V'. Otherwise each would have a fraction of a short document.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from megacoder.core.config import check_at_least, to_dict
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.blend import blend_table
from megacoder.data.cuts import CharacterCutter
from megacoder.data.endless import MIN_DOCUMENTS, MIN_TOKENS, EndlessDocuments, Order
from megacoder.data.fim import FimConfig
from megacoder.data.indexed import IndexedDataset
from megacoder.data.packing import BEST_FIT_WINDOWS, BestFit, Concatenated, Packer
from megacoder.data.permutation import key_of, stream_phase
from megacoder.data.tokenizer import Tokenizer

__all__ = [
    "STRETCHES",
    "Batch",
    "Batches",
    "ResumableBatches",
    "StreamConfig",
    "TokenStream",
    "check_order",
    "check_shares",
    "check_version",
    "merge_states",
]

STRETCHES = "streams_of_datasets"
"""In an order: their numbers."""
_NOT_OF_THE_ORDER = {"seq_length", "num_streams", "document_masks"}  # change no token, or are added below


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What decides the order and the form of the training tokens."""

    seq_length: int = 4096
    """tokens per window, the sequence that the model sees"""
    num_streams: int = 1024
    """V, a power of two: number of logical streams; cannot change during a run"""
    seed: int = 1234
    """seed of the document order and of fill-in-the-middle"""
    add_bos: bool = True
    """put the begin-of-sentence token, where the tokenizer has one, before each document, as before a prompt"""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """concatenate: join documents and cut them into windows (the paper); best_fit: keep documents whole where they fit,
    with document masks and padding; it buffers 16 windows of tokens for each stream of a rank"""
    document_masks: bool = False
    """keep attention and positions within a document; the paper does not"""
    train_across_documents: bool = False
    """train the last token of a document to predict the first of the next"""
    fim: FimConfig = field(default_factory=FimConfig)
    """fill-in-the-middle"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "seq_length", prefix="data.stream.")
        if self.num_streams < 1 or self.num_streams & (self.num_streams - 1):
            raise ConfigError(f"data.stream.num_streams = {self.num_streams}: must be a power of two")
        if self.packing == "best_fit" and not self.document_masks:
            raise ConfigError(
                'data.stream.packing = "best_fit" needs document masks: set data.stream.document_masks = true'
            )
        if self.packing == "best_fit" and self.train_across_documents:
            raise ConfigError(
                'data.stream.train_across_documents = true with packing = "best_fit", where neighbouring documents are '
                "unrelated; leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's windows of one step, in the order of their numbers in the run."""

    tokens: Tensor
    """int64 (B, S)"""
    labels: Tensor
    """int64 (B, S): the next token, -100 where it begins another document"""
    starts: Tensor | None = None
    """bool (B, S): first tokens of documents, and of windows; None where tokens may see other documents"""


class Batches(Protocol):
    """Where a step's sequences come from."""

    def next_batch(self) -> Batch:
        """This data-parallel rank's part of the next global batch."""


class ResumableBatches(Batches, Protocol):
    """Endless ones, which can resume from a state."""

    @property
    def windows(self) -> int:
        """Windows that all ranks together have been served."""

    def next_batch(self, *, threads: ThreadPoolExecutor | None = None, num_threads: int = 1) -> Batch:
        """The next step's batch; `num_threads` tasks of `threads` make it together."""

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to the batch after those that `state` has seen."""


class TokenStream:
    """Serves the windows of one data-parallel rank, step after step, without end unless there are `epochs`.

    Where `dp_size` divides V each rank reads 1/dp of the streams; otherwise ranks share streams, and each steps over
    the others' windows in them.
    """

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        tokenizer: Tokenizer,
        config: StreamConfig,
        *,
        global_batch_size: int,
        weights: Sequence[float] = (),
        fim_rates: Sequence[float] = (),
        dp_rank: int,
        dp_size: int,
        epochs: int | None = None,
    ) -> None:
        """`weights` are the datasets' shares of the tokens, `fim_rates` replace `config.fim.rate`, one per dataset.

        Without weights, shares are proportional to the datasets' sizes. After `epochs` of a dataset, its windows are
        padding without labels.
        """
        check_shares(global_batch_size, dp_rank=dp_rank, dp_size=dp_size)
        weights, rates = _per_dataset(datasets, weights=weights, fim_rates=fim_rates, config=config)
        self.config, self.global_batch_size = config, global_batch_size
        self._add_bos = config.add_bos and tokenizer.has_bos
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.windows = 0
        """windows that all ranks together have served, in this run and in those whose data it goes on in"""
        self._first_window = 0  # of this run
        self._streams = [_num_streams(dataset, config) for dataset in datasets]
        self.num_streams = max(self._streams)
        self._shares = [gcd(number, dp_size) for number in self._streams]
        self._blend = blend_table(weights)
        self._phases = [stream_phase(one, self.num_streams, len(self._blend)) for one in range(self.num_streams)]
        cutter = CharacterCutter(tokenizer)
        self._packers: list[dict[int, Packer]] = []
        for number, (dataset, rate) in enumerate(zip(datasets, rates, strict=True)):
            source = EndlessDocuments(
                dataset, cutter, replace(config.fim, rate=rate),
                seed=config.seed if number == 0 else key_of(config.seed, number),
                add_bos=self._add_bos, num_streams=self._streams[number],
            )  # fmt: skip
            own = range(dp_rank % self._shares[number], self._streams[number], self._shares[number])
            self._packers.append({stream: _packer(source, stream, config, tokenizer, epochs) for stream in own})
        self._prepare()
        self._order = {
            "datasets": [[dataset.num_documents, dataset.num_tokens] for dataset in datasets],
            "tokenizer": tokenizer.digest,
            **self._settings_of_the_order(),
            **({"weights": list(weights), "blend_round": len(self._blend)} if len(datasets) > 1 else {}),
            **({"fim_rates": list(rates)} if fim_rates else {}),
        }

    def _settings_of_the_order(self) -> dict[str, Any]:
        config = self.config
        return {
            **{key: value for key, value in to_dict(config).items() if key not in _NOT_OF_THE_ORDER},
            "num_streams": self.num_streams,
            "add_bos": self._add_bos,
            STRETCHES: self._streams,
            **({"seq_length": config.seq_length} if config.packing == "best_fit" else {}),
        }

    def next_batch(self, *, threads: Executor | None = None, num_threads: int = 1) -> Batch:
        """This rank's windows of the next step: `global_batch_size` / `dp_size` of them.

        With `threads`, `num_threads` tasks for them fill the windows, each those of its own streams.
        """
        shape = (self.global_batch_size // self.dp_size, self.config.seq_length)
        tokens, labels = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        starts = np.zeros(shape, dtype=bool)
        if threads is None:
            self._fill(tokens, labels, starts)
        else:
            list(threads.map(lambda one: self._fill(tokens, labels, starts, one, num_threads), range(num_threads)))
        self.windows += self.global_batch_size
        return Batch(
            tokens=torch.from_numpy(tokens), labels=torch.from_numpy(labels),
            starts=torch.from_numpy(starts) if self.config.document_masks else None,
        )  # fmt: skip

    def _fill(self, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray, part: int = 0, parts: int = 1) -> None:
        """Fills the rows of part `part` of `parts` of this rank's streams, which advance."""
        unseen = tuple(np.empty_like(rows[0]) for rows in (tokens, labels, starts))  # of other ranks
        row, first, step = 0, self.windows, min(self._shares)
        behind = (self.dp_rank - first) % step  # to the first window that may come from a stream of ours
        for window in range(first + behind, first + self.global_batch_size, step):
            number = self._dataset_of(window % self.num_streams, window // self.num_streams)
            stream, shares = window % self._streams[number], self._shares[number]
            ours = window % self.dp_size == self.dp_rank
            packer = self._packers[number].get(stream)  # None: read by other ranks alone
            if packer is not None and stream // shares % parts == part:
                packer.fill(*((tokens[row], labels[row], starts[row]) if ours else unseen))
            row += ours

    def _dataset_of(self, stream: int, window: int) -> int:
        """The dataset of a stream's window."""
        return int(self._blend[(window + self._phases[stream]) % len(self._blend)])

    def state_dict(self) -> dict[str, Any]:
        """Plain integers: the position of each stream of this rank, and what the order depends on.

        Written to a checkpoint after `merge_states` over all ranks.
        """
        streams = [
            [stream, number, *packer.position()]
            for number, packers in enumerate(self._packers)
            for stream, packer in packers.items()
        ]
        return {
            "windows": self.windows, "first_window": self._first_window, "order": self._order, "streams": streams,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a whole run's state, for any number of ranks and any batch size.

        Raises ConfigError where the state belongs to another order, DataError where it lacks streams of this rank.
        """
        check_order(self._order, state)
        self._first_window = state.get("first_window", 0)  # absent from an older checkpoint
        positions = {(stream, number): position for stream, number, *position in state["streams"]}
        for number, packers in enumerate(self._packers):
            for stream, packer in packers.items():
                if (stream, number) not in positions:
                    raise DataError(f"the data position lacks stream {stream}; merge the states of all ranks first")
                packer.move(*positions[stream, number], of_another_run=self._first_window > 0)
        self.windows = state["windows"]
        self._prepare()

    def _prepare(self) -> None:
        for packers in self._packers:
            positions = [packer.position() for packer in packers.values()]
            orders = [packer.order for packer in packers.values()]
            Order.prepare(orders, [epoch for epoch, *_ in positions], [place for _, place, *_ in positions])


def check_order(order: dict[str, Any], state: dict[str, Any]) -> None:
    """ConfigError where `state` belongs to another order of tokens than `order` describes."""
    further = "or start a new run"
    if STRETCHES in order:
        check_version(state)
        further = "or start a new run that goes on from this one (init_from, init_optimizer, init_data)"
    for key in [*order, *(key for key in state["order"] if key not in order)]:
        if key == "datasets" and key in order and key in state["order"]:
            if len(order[key]) != len(state["order"][key]):
                raise ConfigError(
                    f"data.train has {len(order[key])} datasets, but the run began with {len(state['order'][key])}; "
                    f"put them back, {further}"
                )
            for number, (here, there) in enumerate(zip(order[key], state["order"][key], strict=True), start=1):
                if here != there:
                    raise ConfigError(
                        f"dataset {number} of data.train has {here[0]:,} documents and {here[1]:,} tokens, but the run "
                        f"began with {there[0]:,} and {there[1]:,}; put that dataset back, or start a new run"
                    )
        if order.get(key) != state["order"].get(key):
            raise ConfigError(
                f"{key} is {order.get(key)!r}, but the data position to continue from was made with "
                f"{state['order'].get(key)!r}; start a new run, or set it back"
            )


def check_version(state: dict[str, Any]) -> None:
    """ConfigError where a `TokenStream`'s state is of a version whose streams were others."""
    if STRETCHES not in state["order"]:
        raise ConfigError(
            "the data position to continue from is of an earlier version, which dealt whole documents to streams; "
            "choose another output, and start from the run's weights with init_from"
        )


def check_shares(global_batch_size: int, *, dp_rank: int, dp_size: int) -> None:
    """ConfigError where ranks cannot share a global batch."""
    if not 0 <= dp_rank < dp_size:
        raise ConfigError(f"dp_rank {dp_rank} of dp_size {dp_size}: from 0 to dp_size - 1")
    if global_batch_size < 1 or global_batch_size % dp_size:
        raise ConfigError(f"global_batch_size {global_batch_size}: a multiple of the {dp_size} data-parallel ranks")


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The whole run's state from those of all ranks after the same step."""
    states = list(states)
    steps = {state["windows"] for state in states}
    if len(steps) != 1:
        raise DataError(f"ranks are at different windows: {sorted(steps)}")
    streams = {tuple(stream[:2]): stream for state in states for stream in state["streams"]}
    return {**states[0], "streams": [streams[index] for index in sorted(streams)]}


def _num_streams(dataset: IndexedDataset, config: StreamConfig) -> int:
    """As many as asked for, or fewer, so that each has some documents or many tokens of every epoch."""
    most = max(dataset.num_documents // MIN_DOCUMENTS, dataset.num_tokens // MIN_TOKENS)
    most = min(most, dataset.num_tokens)
    if config.packing == "best_fit":  # as many groups
        most = min(most, dataset.num_tokens // (BEST_FIT_WINDOWS * config.seq_length * MIN_DOCUMENTS))
    return min(config.num_streams, 1 << max(0, most.bit_length() - 1))


def _packer(
    source: EndlessDocuments, stream: int, config: StreamConfig, tokenizer: Tokenizer, epochs: int | None
) -> Packer:
    pad_id = tokenizer.pad_id
    if config.packing == "best_fit":
        return BestFit(source, stream, seq_length=config.seq_length, pad_id=pad_id, epochs=epochs)
    return Concatenated(source, stream, across_documents=config.train_across_documents, pad_id=pad_id, epochs=epochs)


def _per_dataset(
    datasets: Sequence[IndexedDataset], *, weights: Sequence[float], fim_rates: Sequence[float], config: StreamConfig
) -> tuple[Sequence[float], Sequence[float]]:
    """Weights and rates of fill-in-the-middle of all datasets; ConfigError where some are missing."""
    if not datasets:
        raise ConfigError("no dataset to train on")
    for dataset in datasets:
        if dataset.num_tokens == 0:
            raise DataError(f"{dataset.prefix}: a dataset without tokens")
    for name, values in (("weights", weights), ("fim_rates", fim_rates)):
        if values and len(values) != len(datasets):
            raise ConfigError(
                f"data.{name} = {list(values)}: give one for each of the {len(datasets)} datasets, or none"
            )
    return (
        weights or [dataset.num_tokens for dataset in datasets],
        fim_rates or [config.fim.rate] * len(datasets),
    )
