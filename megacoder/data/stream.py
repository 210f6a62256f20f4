"""The training tokens as a function of (seed, config, position): the same for any number of ranks, never re-dealt.

Documents are dealt in the keyed order of each epoch, epochs without end, like cards to V logical streams: the
document at position p of that endless order goes to stream p mod V. A stream is its documents one after another, each
as BOS, its files (some of them as fill-in-the-middle examples), EOS; it is cut into windows of `seq_length` tokens.
Window g of the run is the next one of stream g mod V.

So nothing depends on the number of ranks or on how long the run is: rank r of dp serves the windows g = r (mod dp)
and reads only the streams that those come from. A stream's state is three integers, and the state of a run is those
of all its streams. A batch mixes as many documents as it has windows, without shuffle buffer or index.

Within an epoch every token is served once. Streams run ahead of each other by the lengths of their documents, so
epochs overlap at their seams. There are never more streams than documents (V is halved until it fits): otherwise the
first windows would be the beginnings of the same few documents, from many epochs at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacoder.core.config import to_dict
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.fim import FillInTheMiddle, FimConfig
from megacoder.data.indexed import IndexedDataset
from megacoder.data.permutation import permute
from megacoder.data.segments import document_starts, next_token_labels
from megacoder.data.tokenizer import Tokenizer

__all__ = ["Batch", "StreamConfig", "TokenStream", "merge_states"]

_DEALT_AT_ONCE = 64  # documents whose numbers a stream computes together
_NOT_OF_THE_ORDER = {"seq_length", "num_streams", "document_masks"}  # as they change no token, or are counted anew


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What decides the order and the form of the training tokens."""

    seq_length: int = 4096
    """tokens in a window"""
    num_streams: int = 1024
    """V, a power of two: logical streams that documents are dealt to; best left alone during a run"""
    seed: int = 1234
    """of the order of documents and of fill-in-the-middle"""
    add_bos: bool = True
    """puts the begin-of-sentence token in front of each document, as the tokenizer does in front of a prompt"""
    document_masks: bool = False
    """attention and positions stay within a document; the paper concatenates without"""
    fim: FimConfig = field(default_factory=FimConfig)
    """fill-in-the-middle"""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ConfigError(f"seq_length = {self.seq_length}: at least 1")
        if self.num_streams < 1 or self.num_streams & (self.num_streams - 1):
            raise ConfigError(f"num_streams = {self.num_streams}: a power of two")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's windows of one step, in the order of their numbers in the run."""

    tokens: Tensor
    """int64 (B, S)"""
    labels: Tensor
    """int64 (B, S): the next token, -100 where that begins another document"""
    starts: Tensor | None = None
    """bool (B, S): first tokens of documents, and of windows; None where tokens may see other documents"""


class TokenStream:
    """Serves the windows of one data-parallel rank, step after step, without end.

    Where `dp_size` divides V each rank reads 1/dp of the streams; otherwise ranks share streams, and each walks over
    the windows of the others in them.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        tokenizer: Tokenizer,
        config: StreamConfig,
        *,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank {dp_rank} of dp_size {dp_size}: from 0 to dp_size - 1")
        if global_batch_size < 1 or global_batch_size % dp_size:
            raise ConfigError(f"global_batch_size {global_batch_size}: a multiple of the {dp_size} data-parallel ranks")
        if dataset.num_tokens == 0:
            raise DataError(f"{dataset.prefix}: a dataset without tokens")
        self.config, self.global_batch_size = config, global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.windows = 0
        """windows that all ranks together have served"""
        self.num_streams = min(config.num_streams, 1 << (dataset.num_documents.bit_length() - 1))
        self._shares = gcd(self.num_streams, dp_size)
        source = _Documents(dataset, tokenizer, config, num_streams=self.num_streams)
        self._streams = [
            _Stream(source, index) for index in range(dp_rank % self._shares, self.num_streams, self._shares)
        ]
        self._bos_id, self._eos_id = tokenizer.bos_id if config.add_bos else None, tokenizer.eos_id
        self._order = {
            "documents": dataset.num_documents,
            "tokens": dataset.num_tokens,
            "tokenizer": tokenizer.digest,
            "num_streams": self.num_streams,
            **{key: value for key, value in to_dict(config).items() if key not in _NOT_OF_THE_ORDER},
        }

    def next_batch(self) -> Batch:
        """This rank's windows of the next step: `global_batch_size` / `dp_size` of them."""
        windows = np.empty((self.global_batch_size // self.dp_size, self.config.seq_length + 1), dtype=np.int64)
        others = np.empty(self.config.seq_length + 1, dtype=np.int64)
        row, first = 0, self.windows
        behind = (self.dp_rank - first) % self._shares  # to the first window that comes from a stream of ours
        for window in range(first + behind, first + self.global_batch_size, self._shares):
            stream = self._streams[window % self.num_streams // self._shares]
            if window % self.dp_size == self.dp_rank:
                stream.read(windows[row])
                row += 1
            else:
                stream.read(others)
        self.windows += self.global_batch_size
        tensor = torch.from_numpy(windows)
        labels = next_token_labels(tensor, bos_id=self._bos_id, eos_id=self._eos_id)
        tokens, starts = tensor[:, :-1].contiguous(), None
        if self.config.document_masks:
            starts = document_starts(tokens, bos_id=self._bos_id, eos_id=self._eos_id)
        return Batch(tokens=tokens, labels=labels, starts=starts)

    def state_dict(self) -> dict[str, Any]:
        """Plain integers: where each stream of this rank stands, and what the order depends on.

        Written to a checkpoint after `merge_states` over all ranks.
        """
        streams = [[stream.index, stream.document, stream.file, stream.offset] for stream in self._streams]
        return {"windows": self.windows, "order": self._order, "streams": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a whole run's state, for any number of ranks and any batch size.

        Raises ConfigError where the state belongs to another order, DataError where it lacks streams of this rank.
        """
        for key, value in self._order.items():
            if state["order"].get(key) != value:
                raise ConfigError(
                    f"{key} is {value!r}, but the data position to continue from was made with "
                    f"{state['order'].get(key)!r}; start anew, or set it back"
                )
        positions = {index: position for index, *position in state["streams"]}
        missing = [stream.index for stream in self._streams if stream.index not in positions]
        if missing:
            raise DataError(f"the data position lacks stream {missing[0]}; merge the states of all ranks first")
        for stream in self._streams:
            stream.move(*positions[stream.index])
        self.windows = state["windows"]


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole run's state from those of all ranks after the same step."""
    steps = {state["windows"] for state in states}
    if len(steps) != 1:
        raise DataError(f"ranks are at different windows: {sorted(steps)}")
    streams = {stream[0]: stream for state in states for stream in state["streams"]}
    return {**states[0], "streams": [streams[index] for index in sorted(streams)]}


class _Documents:
    """What all streams share: which document comes when, and how a file of it reads in its epoch."""

    def __init__(
        self, dataset: IndexedDataset, tokenizer: Tokenizer, config: StreamConfig, *, num_streams: int
    ) -> None:
        self.dataset, self.config, self.num_streams = dataset, config, num_streams
        self._fim = FillInTheMiddle(config.fim, tokenizer, seed=config.seed)
        self._vocab_size = tokenizer.vocab_size
        self._bos = np.array([tokenizer.bos_id], dtype=dataset.dtype)

    def deal(self, stream: int, first: int) -> list[tuple[int, int]]:
        """(document, epoch) of the documents `first`, `first` + 1, ... of a stream."""
        positions = stream + np.arange(first, first + _DEALT_AT_ONCE, dtype=np.int64) * self.num_streams
        epochs, places = np.divmod(positions, self.dataset.num_documents)
        documents = permute(places, self.dataset.num_documents, seed=self.config.seed, epoch=epochs)
        return list(zip(documents.tolist(), epochs.tolist(), strict=True))

    def read(self, sequence: int, *, epoch: int, opens_document: bool) -> np.ndarray:
        """The ids of one file as they are served."""
        tokens = self.dataset.sequence(sequence)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise DataError(
                f"{self.dataset.prefix}: sequence {sequence} has ids outside the tokenizer's {self._vocab_size:,}; "
                "was the dataset made with another one?"
            )
        tokens = self._fim(tokens, epoch=epoch, file=sequence)
        return np.concatenate([self._bos, tokens]) if opens_document and self.config.add_bos else tokens


class _Stream:
    """One logical stream: a cursor over the files of its documents."""

    def __init__(self, source: _Documents, index: int) -> None:
        self.index = index
        self._source = source
        self._dealt_from, self._dealt = 0, list[tuple[int, int]]()
        self.move(0, 0, 0)

    def move(self, document: int, file: int, offset: int) -> None:
        """To token `offset` of the document's file, both counted from 0; `document` counts those of this stream."""
        self.document, self.file, self.offset = document, file, offset
        self._tokens: np.ndarray | None = None

    def read(self, window: np.ndarray) -> None:
        """Fills `window` and moves on by one token less: the last one is only looked at, as a label."""
        filled, size = 0, len(window) - 1
        while filled < size:
            tokens = self._current()
            taken = min(len(tokens) - self.offset, size - filled)
            window[filled : filled + taken] = tokens[self.offset : self.offset + taken]
            filled += taken
            self.offset += taken
        window[size] = self._current()[self.offset]

    def _current(self) -> np.ndarray:
        """The ids of the file under the cursor, after moving to the next one that has any left."""
        while self._tokens is None or self.offset == len(self._tokens):
            document, epoch = self._number()
            sequences = self._source.dataset.document_sequences(document)
            if self._tokens is not None:
                self.file, self.offset, self._tokens = self.file + 1, 0, None
            if self.file >= len(sequences):
                self.move(self.document + 1, 0, 0)
            else:
                self._tokens = self._source.read(sequences[self.file], epoch=epoch, opens_document=self.file == 0)
                if self.offset > len(self._tokens):
                    raise DataError(
                        f"{self._source.dataset.prefix}: the data position is token {self.offset} of sequence "
                        f"{sequences[self.file]}, which has {len(self._tokens)}; another dataset?"
                    )
        return self._tokens

    def _number(self) -> tuple[int, int]:
        """(document, epoch) under the cursor."""
        behind = self.document - self._dealt_from
        if not 0 <= behind < len(self._dealt):
            self._dealt_from, behind = self.document, 0
            self._dealt = self._source.deal(self.index, self.document)
        return self._dealt[behind]
