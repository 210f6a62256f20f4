"""One dataset as an endless row of documents: the keyed order of an epoch, then that of the next, dealt to V streams.

The document at position p of the row goes to stream p mod V, as cards are dealt. Which document that is, in which
epoch, and how its files look in that epoch (some are fill-in-the-middle examples) are functions of (seed, p): nothing
is precomputed, and any stream can resume anywhere.
"""

import numpy as np

from megacoder.core.errors import DataError
from megacoder.data.cuts import CharacterCutter
from megacoder.data.fim import FillInTheMiddle, FimConfig
from megacoder.data.indexed import IndexedDataset
from megacoder.data.permutation import permute

__all__ = ["Deal", "EndlessDocuments"]

_DEALT_AT_ONCE = 256  # document numbers that a stream computes together: as arrays, at nearly the cost of one
_DEALT_FIRST = 8  # the same at the start of a run, for all streams at once


class EndlessDocuments:
    """A dataset's documents in their order, and their files as they are served."""

    def __init__(
        self,
        dataset: IndexedDataset,
        cutter: CharacterCutter,
        fim: FimConfig,
        *,
        seed: int,
        add_bos: bool,
        num_streams: int,
    ) -> None:
        self.dataset, self.seed, self.add_bos, self.num_streams = dataset, seed, add_bos, num_streams
        self._fim = FillInTheMiddle(fim, cutter, seed=seed)
        self._vocab_size = cutter.tokenizer.vocab_size
        self._bos = np.array([cutter.tokenizer.bos_id], dtype=dataset.dtype)

    def deal(self, streams: np.ndarray, first: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents, epochs) of the documents `first`, `first` + 1, ... of each stream: int64 (streams, count)."""
        positions = streams[:, None] + (first[:, None] + np.arange(count)) * self.num_streams
        epochs, places = np.divmod(positions, self.dataset.num_documents)
        return permute(places, self.dataset.num_documents, seed=self.seed, epoch=epochs), epochs

    def read(self, sequence: int, *, epoch: int, opens_document: bool) -> np.ndarray:
        """The ids of one file as they are served."""
        tokens = self.dataset.sequence(sequence)
        if len(tokens) and (tokens.max() >= self._vocab_size or (tokens.dtype.kind == "i" and tokens.min() < 0)):
            raise DataError(
                f"{self.dataset.prefix}: sequence {sequence} has ids outside the tokenizer's {self._vocab_size:,}; "
                "was the dataset made with another one?"
            )
        tokens = self._fim(tokens, epoch=epoch, file=sequence)
        return np.concatenate([self._bos, tokens]) if opens_document and self.add_bos else tokens

    def document(self, number: int, *, epoch: int) -> np.ndarray:
        """The ids of all files of a document as they are served."""
        sequences = self.dataset.document_sequences(number)
        files = [self.read(file, epoch=epoch, opens_document=file == sequences.start) for file in sequences]
        return np.concatenate(files) if files else np.empty(0, self.dataset.dtype)


class Deal:
    """Which documents are dealt to one stream, computed some at a time."""

    def __init__(self, source: EndlessDocuments, stream: int) -> None:
        self.source, self.stream = source, stream
        self._first = 0
        self._documents = self._epochs = np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(document, epoch) of the stream's document `index`."""
        behind = index - self._first
        if not 0 <= behind < len(self._documents):
            documents, epochs = self.source.deal(np.array([self.stream]), np.array([index]), _DEALT_AT_ONCE)
            self._first, self._documents, self._epochs = index, documents[0], epochs[0]
            behind = 0
        return int(self._documents[behind]), int(self._epochs[behind])

    @staticmethod
    def prepare(deals: "list[Deal]", indices: list[int]) -> None:
        """Computes the documents from `indices` on, for all streams of one dataset at once."""
        streams = np.array([deal.stream for deal in deals])
        documents, epochs = deals[0].source.deal(streams, np.array(indices), _DEALT_FIRST)
        for row, (deal, first) in enumerate(zip(deals, indices, strict=True)):
            deal._first, deal._documents, deal._epochs = first, documents[row], epochs[row]
