"""One dataset as an endless row of documents, the keyed order of one epoch after another, cut for V streams.

Each epoch is cut into V stretches of equally many tokens, most of whose ends lie inside documents, and stream v has
stretch v of every epoch. So streams reach the end of an epoch together, to within what BOS and fill-in-the-middle add,
and a run of k epochs of tokens serves every token k times. (Documents dealt like cards would differ in length: after
one epoch of 40,000 documents on 1,024 streams 14% of the tokens had not been served, and as many twice.)

Which document stands where, in which epoch, and how its files look in that epoch (some are fill-in-the-middle examples)
are functions of (seed, place). The ends of an epoch's stretches take one pass over the documents' lengths, 0.2 us each.
Of more than MOST_MEASURED documents, a stretch is as many documents for every stream, which then are so many that the
lengths even out.

Legend: D documents, N tokens, V streams; a place is a document's number in the order of an epoch.
"""

import threading
from typing import NamedTuple

import numpy as np

from megacoder.core.errors import DataError
from megacoder.data.cuts import CharacterCutter
from megacoder.data.fim import FillInTheMiddle, FimConfig
from megacoder.data.indexed import IndexedDataset
from megacoder.data.permutation import draw_many_bits, key_of, permute

__all__ = ["MIN_DOCUMENTS", "MIN_TOKENS", "EndlessDocuments", "Order", "Point"]

MIN_DOCUMENTS, MIN_TOKENS = 8, 8192
"""What a stream's stretch has at least, on average, one or the other: each end cuts a document in two. More streams mix
more documents into a batch."""
MOST_MEASURED = 1 << 24
_MEASURED_AT_ONCE = 1 << 20
_KEPT_EPOCHS = 4  # those that streams are in at one time
_NUMBERED_AT_ONCE = 256  # documents that a stream looks up together: as arrays, at nearly the cost of one
_NUMBERED_FIRST = 8  # the same at the start of a run, for all streams at once


class Point(NamedTuple):
    """Before a token of an epoch, as it is stored: fill-in-the-middle comes later."""

    place: int
    """D at the end of the epoch"""
    offset: int = 0
    """tokens of that document that lie before"""
    number: int = -1
    """of the document; -1 at the end of the epoch"""


class EndlessDocuments:
    """A dataset's documents in their order, its stretches, and the files as they are served."""

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
        self._ends: dict[int, list[Point]] = {}
        self._lock = threading.Lock()

    def numbers(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The documents at these places of these epochs, int64 arrays of one shape."""
        return permute(places, self.dataset.num_documents, seed=self.seed, epoch=epochs)

    def stretch(self, epoch: int, stream: int) -> tuple[Point, Point]:
        """Where the stream's tokens of an epoch begin and end; the stretches of all streams are the epoch."""
        with self._lock:  # threads fill windows of different streams
            if epoch not in self._ends:
                for old in sorted(self._ends)[: 1 - _KEPT_EPOCHS]:
                    del self._ends[old]
                by_tokens = self.dataset.num_documents <= MOST_MEASURED
                self._ends[epoch] = self._of_equal_length(epoch) if by_tokens else self._of_equal_number(epoch)
            ends = self._ends[epoch]
        return ends[stream], ends[stream + 1]

    def _of_equal_length(self, epoch: int) -> list[Point]:
        size, ends, before = self.dataset.num_documents, list[Point](), 0
        tokens = np.arange(self.num_streams) * self.dataset.num_tokens // self.num_streams  # before each stretch
        for first in range(0, size, _MEASURED_AT_ONCE):
            places = np.arange(first, min(first + _MEASURED_AT_ONCE, size))
            numbers = self.numbers(np.array(epoch), places)
            stops = before + np.cumsum(self.dataset.document_tokens(numbers))
            within = tokens[len(ends) : np.searchsorted(tokens, stops[-1])]
            found = np.searchsorted(stops, within, side="right")
            starts = np.concatenate([[before], stops[:-1]])[found]
            ends += map(Point, places[found].tolist(), (within - starts).tolist(), numbers[found].tolist())
            before = stops[-1]
        return [*ends, Point(size)]

    def _of_equal_number(self, epoch: int) -> list[Point]:
        """Each stretch but the first begins at a random token of its first document."""
        size = self.dataset.num_documents
        places = np.arange(self.num_streams) * size // self.num_streams
        numbers = self.numbers(np.array(epoch), places)
        lengths = np.maximum(self.dataset.document_tokens(numbers), 1).astype(np.uint64)
        offsets = draw_many_bits(key_of(self.seed, epoch), self.num_streams) % lengths
        offsets[0] = 0
        return [*map(Point, places.tolist(), offsets.tolist(), numbers.tolist()), Point(size)]

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


class Order:
    """Which documents a stream comes to, looked up some at a time."""

    def __init__(self, source: EndlessDocuments) -> None:
        self.source = source
        self._epoch, self._first = 0, 0
        self._numbers = np.empty(0, dtype=np.int64)

    def __call__(self, epoch: int, place: int) -> int:
        """The document at `place` of the epoch."""
        if epoch != self._epoch or not 0 <= place - self._first < len(self._numbers):
            _look_up([self], np.array([epoch]), np.array([place]), _NUMBERED_AT_ONCE)
        return int(self._numbers[place - self._first])

    @staticmethod
    def prepare(orders: "list[Order]", epochs: list[int], places: list[int]) -> None:
        """Looks up the documents from `places` on, for all streams of one dataset at once."""
        _look_up(orders, np.array(epochs), np.array(places), _NUMBERED_FIRST)


def _look_up(orders: list[Order], epochs: np.ndarray, places: np.ndarray, count: int) -> None:
    source = orders[0].source
    rows = np.minimum(places[:, None] + np.arange(count), source.dataset.num_documents - 1)
    numbers = source.numbers(np.broadcast_to(epochs[:, None], rows.shape), rows)
    for order, epoch, first, row in zip(orders, epochs.tolist(), places.tolist(), numbers, strict=True):
        order._epoch, order._first, order._numbers = epoch, first, row
