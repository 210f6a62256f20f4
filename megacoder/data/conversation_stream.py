"""Conversations into windows for training: packed whole, masked from each other, only their answers trained.

Every epoch deals the conversations in its keyed order, some thousands at a time, and packs each lot into windows of S
tokens, the longest first, each into the fullest window that has room. A conversation longer than a window is truncated
at the right, as in the published script. So a window is a function of (seed, epoch, number), a run's place is two
integers, and any number of ranks can resume from it.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch

from megacoder.core.errors import ConfigError, DataError
from megacoder.data.indexed import IndexedDataset
from megacoder.data.packing import best_fit
from megacoder.data.permutation import permute
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
    ) -> None:
        """ConfigError where no answer of the dataset begins within `seq_length` tokens."""
        check_shares(global_batch_size, dp_rank=dp_rank, dp_size=dp_size)
        self._dataset, self._pad_id, self._size, self._seed = dataset, tokenizer.pad_id, seq_length, seed
        self._global_batch_size, self._dp_rank, self._dp_size = global_batch_size, dp_rank, dp_size
        self.windows = 0
        """windows that all ranks together have served"""
        self._epoch, self._next = 0, 0
        self._usable = np.array(
            [number for number in range(dataset.num_documents) if self._asked_first(number) < seq_length],
            dtype=np.int64,
        )
        if not len(self._usable):
            raise ConfigError(
                f"seq_length = {seq_length}: none of {dataset.num_documents} conversations has an answer that begins "
                "within it; increase it"
            )
        self._packed_epoch: int | None = None
        self._order = {
            "conversations": dataset.num_documents, "tokens": dataset.num_tokens, "tokenizer": tokenizer.digest,
            "seed": seed, "seq_length": seq_length,
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
            "windows": self.windows, "epoch": self._epoch, "next": self._next, "order": self._order, "streams": []
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues; ConfigError where `state` belongs to other data."""
        check_order(self._order, state)
        self.windows, self._epoch, self._next = state["windows"], state["epoch"], state["next"]
        self._packed_epoch = None

    def _take(self) -> list[int]:
        """The conversations of the next window."""
        while True:
            windows = self._windows(self._epoch)
            if self._next < len(windows):
                self._next += 1
                return windows[self._next - 1]
            self._epoch, self._next = self._epoch + 1, 0

    def _windows(self, epoch: int) -> list[list[int]]:
        if self._packed_epoch != epoch:
            count = len(self._usable)
            order = self._usable[permute(np.arange(count), count, seed=self._seed, epoch=epoch)]
            self._epoch_windows = [
                window for first in range(0, count, _LOT) for window in self._pack(order[first : first + _LOT].tolist())
            ]
            self._packed_epoch = epoch
        return self._epoch_windows

    def _pack(self, numbers: list[int]) -> list[list[int]]:
        lengths = [min(self._size, self._length(number)) for number in numbers]
        return [[numbers[piece] for piece in window] for window in best_fit(lengths, self._size)]

    def _fill(self, numbers: Sequence[int], tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        filled = 0
        for number in numbers:
            starts[filled], stop = True, filled
            limit = min(self._size, filled + min(self._size, self._length(number)))
            for turn, sequence in enumerate(self._dataset.document_sequences(number)):
                ids = self._dataset.sequence(sequence)[: limit - stop]
                tokens[stop : stop + len(ids)] = ids
                if turn % 2 and len(ids):  # token p is the label of place p - 1
                    labels[stop - 1 : stop - 1 + len(ids)] = ids
                stop += len(ids)
            filled = stop
        if filled < self._size:
            starts[filled] = True

    def _length(self, number: int) -> int:
        return sum(len(self._dataset.sequence(sequence)) for sequence in self._dataset.document_sequences(number))

    def _asked_first(self, number: int) -> int:
        sequences = self._dataset.document_sequences(number)
        if len(sequences) < 2 or len(sequences) % 2 == 0:
            raise DataError(f"{self._dataset.prefix}: document {number} has {len(sequences)} sequences, so it is not "
                            "a conversation; was this written by megacoder sft?")  # fmt: skip
        return len(self._dataset.sequence(sequences[0]))
