"""Conversations into windows for training: packed whole, masked from each other, only their answers trained.

Every epoch deals the conversations in its keyed order, some thousands at a time, and packs each lot into windows of S
tokens, the longest first, each into the fullest window that has room. The windows of a lot come in a keyed order, as
those with long conversations are made first. A conversation longer than a window is truncated at the right, as in the
published script. So a window is a function of (seed, epoch, lot, number), a run's place is three integers, and any
number of ranks can resume from it. A lot is packed when it is reached, in a fraction of a second.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch

from megacoder.core.console import counted
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.indexed import IndexedDataset
from megacoder.data.packing import best_fit
from megacoder.data.permutation import key_of, permute
from megacoder.data.stream import Batch, check_order, check_shares
from megacoder.data.tokenizer import Tokenizer
from megacoder.ops.cross_entropy import IGNORE_INDEX

__all__ = ["ConversationStream"]

_LOT = 4096
"""Conversations that are packed into windows together."""


class ConversationStream:
    """One data-parallel rank's windows of a dataset that `prepare_conversations` wrote."""

    def __init__(
        self,
        dataset: IndexedDataset,
        tokenizer: Tokenizer,
        *,
        seq_length: int,
        seed: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        epochs: int | None = None,
    ) -> None:
        """Endless, or after `epochs` without conversations; ConfigError where no answer of the dataset begins within
        `seq_length` tokens."""
        check_shares(global_batch_size, dp_rank=dp_rank, dp_size=dp_size)
        self._dataset, self._pad_id, self._size, self._seed = dataset, tokenizer.pad_id, seq_length, seed
        self._global_batch_size, self._dp_rank, self._dp_size = global_batch_size, dp_rank, dp_size
        self.windows = 0
        """windows that all ranks together have served"""
        self._epoch, self._lot, self._next = 0, 0, 0
        self._epochs = epochs
        asked_first, lengths = _measure(dataset)
        self._lengths = np.minimum(lengths, seq_length)
        """int64 (conversations,): tokens that a window holds of each"""
        self._usable = np.flatnonzero(asked_first < seq_length)
        if not len(self._usable):
            raise ConfigError(
                f"data.stream.seq_length = {seq_length}: none of "
                f"{counted(dataset.num_documents, 'conversation', 'conversations')} has an answer that begins within "
                "it; increase it"
            )
        self._packed: tuple[int, int] | None = None
        self._order = {
            "conversations": dataset.num_documents, "tokens": dataset.num_tokens, "tokenizer": tokenizer.digest,
            "seed": seed, "seq_length": seq_length, "lot": _LOT,
        }  # fmt: skip

    def next_batch(self, *, threads: Executor | None = None, num_threads: int = 1) -> Batch:
        """This rank's windows of the next step; made in this thread, as it is little work."""
        shape = (self._global_batch_size // self._dp_size, self._size)
        tokens = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        starts = np.zeros(shape, dtype=bool)
        for index in range(self._global_batch_size):
            conversations = self._take()
            if index % self._dp_size == self._dp_rank:
                row = index // self._dp_size
                self._fill(conversations, tokens[row], labels[row], starts[row])
        self.windows += self._global_batch_size
        return Batch(tokens=torch.from_numpy(tokens), labels=torch.from_numpy(labels), starts=torch.from_numpy(starts))

    def state_dict(self) -> dict[str, Any]:
        """Plain integers, the same on every rank; `streams` is there for `merge_states`."""
        return {
            "windows": self.windows, "epoch": self._epoch, "lot": self._lot, "next": self._next, "order": self._order,
            "streams": [],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues; ConfigError where `state` belongs to other data."""
        if "lot" not in state["order"]:
            raise ConfigError(
                "the data position to continue from is of an earlier version, which served long conversations first; "
                "choose another output, and start from the run's weights with init_from"
            )
        check_order(self._order, state)
        self.windows = state["windows"]
        self._epoch, self._lot, self._next = state["epoch"], state["lot"], state["next"]

    def _take(self) -> list[int]:
        """The conversations of the next window; none after the last epoch."""
        if self._epoch == self._epochs:
            return []
        windows = self._windows(self._epoch, self._lot)
        taken = windows[self._next]
        self._next += 1
        if self._next == len(windows):
            self._lot, self._next = self._lot + 1, 0
        if self._lot * _LOT >= len(self._usable):
            self._epoch, self._lot = self._epoch + 1, 0
        return taken

    def _windows(self, epoch: int, lot: int) -> list[list[int]]:
        """The conversations of each window of a lot, in the order of serving."""
        if self._packed != (epoch, lot):
            count = len(self._usable)
            places = np.arange(lot * _LOT, min((lot + 1) * _LOT, count))
            numbers = self._usable[permute(places, count, seed=self._seed, epoch=epoch)]
            windows = best_fit(self._lengths[numbers].tolist(), self._size)
            order = permute(np.arange(len(windows)), len(windows), seed=key_of(self._seed, lot), epoch=epoch)
            self._lot_windows = [numbers[windows[window]].tolist() for window in order.tolist()]
            self._packed = (epoch, lot)
        return self._lot_windows

    def _fill(self, numbers: Sequence[int], tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        filled = 0
        for number in numbers:
            starts[filled], stop = True, filled
            filled += int(self._lengths[number])
            for turn, sequence in enumerate(self._dataset.document_sequences(number)):
                ids = self._dataset.sequence(sequence)[: filled - stop]
                tokens[stop : stop + len(ids)] = ids
                if turn % 2 and len(ids):  # token p is the label of place p - 1
                    labels[stop - 1 : stop - 1 + len(ids)] = ids
                stop += len(ids)
        if filled < self._size:
            starts[filled] = True


def _measure(dataset: IndexedDataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each conversation before its first answer, and in all; DataError where there are no conversations."""
    firsts, counts = dataset.document_offsets[:-1], np.diff(dataset.document_offsets)
    wrong = np.flatnonzero((counts < 2) | (counts % 2 == 0))
    if len(wrong):
        raise DataError(f"{dataset.prefix}: document {wrong[0]} has {counts[wrong[0]]} sequences, so it is not a "
                        "conversation; was this written by megacoder sft?")  # fmt: skip
    ends = np.cumsum(np.append(0, dataset.sequence_lengths), dtype=np.int64)
    return dataset.sequence_lengths[firsts], np.diff(ends[dataset.document_offsets])
