"""Packs documents into windows of S tokens, as the paper does (concatenate and cut) or whole where they fit (best fit).

A packer is one stream of one dataset: a cursor over its stretches (see `megacoder.data.endless`) that fills one window
after another. Its state is four integers, the first of them the epoch.

Concatenated: documents follow each other and are cut every S tokens; a window begins where the last one ended. Streams
begin inside documents, as if they had long been running. Otherwise the first windows of all streams would be beginnings
of documents, the next windows would all lie S tokens later, and a model would learn one kind of window after the other
(8 layers on 373 files: after 256 beginnings the loss jumped from 5.8 nats to 7.5, the gradient norm from 0.5 to 300).

Best fit: documents are taken as a group until they would fill `BEST_FIT_WINDOWS` windows, those longer than S are cut
into pieces of S and a rest, and all pieces are packed into windows, the longest first, each into the fullest window
that has room (best-fit decreasing; Ding et al., arXiv:2404.10830). A group's windows come in a keyed order, as those
with long pieces are made first. Free space is padded, as a document of its own without labels. Groups do not depend on
each other, so that a packer can resume inside one without the ones before; it holds the group's tokens in memory, which
is why a group is small. Stretches end between pieces.

A packer is endless unless it is given a number of `epochs`: after their last token it pads, without labels.

Legend: S tokens of a window.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megacoder.core.errors import DataError
from megacoder.data.endless import EndlessDocuments, Order, Point
from megacoder.data.permutation import key_of, permute
from megacoder.ops.cross_entropy import IGNORE_INDEX

__all__ = ["BEST_FIT_WINDOWS", "BestFit", "Concatenated", "Packer", "best_fit"]

BEST_FIT_WINDOWS = 16
"""Least number of windows that a best-fit packer fills together."""


class Packer(Protocol):
    """One stream of one dataset."""

    order: Order
    """the documents that it comes to"""

    def fill(self, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        """Writes the next window into rows of S, int64, int64 and bool.

        Labels are the next token, or IGNORE_INDEX at the end of a document; `starts` is True at first tokens of
        documents and of the window, and False on entry.
        """

    def position(self) -> list[int]:
        """Four integers: epoch, place of a document, and two more."""

    def move(self, *position: int, of_another_run: bool = False) -> None:
        """Moves back or forth to a `position`; one of another run may lie beyond the end of a file that was longer as a
        fill-in-the-middle example there."""


class Concatenated:
    """Concatenate and cut. Its position: epoch, place of the document, file in it, token in the file as served."""

    def __init__(
        self, source: EndlessDocuments, stream: int, *, across_documents: bool, pad_id: int, epochs: int | None = None
    ) -> None:
        """With `across_documents` the last token of a document has the next document's first token as its label."""
        self._source, self._stream, self._across_documents = source, stream, across_documents
        self._pad_id, self._epochs = pad_id, epochs
        self.order = Order(source)
        self._enter(0)
        self.move(0, *self._begin)

    def position(self) -> list[int]:
        return [self._epoch, self._place, self._file, self._offset]

    def move(self, *position: int, of_another_run: bool = False) -> None:
        epoch, self._place, self._file, self._offset = position
        self._moved_to = (self._place, self._file, self._offset) if of_another_run else None
        self._enter(epoch)
        self._ids: np.ndarray | None = None
        self._opens = False  # whether the file under the cursor holds its document's first token
        self._leapt = False  # whether the cursor has come from another place within a document, or from there

    def fill(self, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        filled, size = 0, len(tokens)
        starts[0] = True
        while True:
            ids, offset = self._current(), self._offset
            if ids is None:
                tokens[filled:], labels[max(0, filled - 1) :] = self._pad_id, IGNORE_INDEX
                starts[filled : filled + 1] = True
                return
            at_edge = self._leapt or (self._opens and offset == 0)
            if filled:  # the label of the token before
                known = self._across_documents and not self._leapt
                labels[filled - 1] = ids[offset] if known or not at_edge else IGNORE_INDEX
            if filled == size:
                return
            taken = min(len(ids) - offset, size - filled)
            stop = filled + taken
            tokens[filled:stop] = ids[offset : offset + taken]
            labels[filled : stop - 1] = tokens[filled + 1 : stop]
            if at_edge:
                starts[filled] = True
            self._offset, filled, self._leapt = offset + taken, stop, False

    def _enter(self, epoch: int) -> None:
        start, stop = self._source.stretch(epoch, self._stream)
        self._epoch, self._begin, self._end = epoch, self._in_file(start), self._in_file(stop)

    def _in_file(self, point: Point) -> tuple[int, int, int]:
        """(place, file, token in the file) of a point."""
        if point.offset == 0:
            return point.place, 0, 0
        dataset = self._source.dataset
        files = dataset.document_sequences(point.number)
        ends = np.cumsum(dataset.sequence_lengths[files.start : files.stop])
        file = int(np.searchsorted(ends, point.offset, side="right"))
        return point.place, file, point.offset - int(ends[file - 1] if file else 0)

    def _current(self) -> np.ndarray | None:
        """The ids of the file under the cursor, after moving to the next one that has any left; None at the end."""
        ids = self._ids
        while ids is None or self._offset == len(ids):
            if ids is not None:
                self._file, self._offset, ids = self._file + 1, 0, None
            if (self._place, self._file, self._offset) >= self._end:
                if self._epoch + 1 == self._epochs:
                    self._ids = None
                    return None
                cut = self._end[1:] != (0, 0)
                self._enter(self._epoch + 1)
                self._place, self._file, self._offset = self._begin
                self._leapt |= cut or self._begin[1:] != (0, 0)
                continue
            files = self._source.dataset.document_sequences(self.order(self._epoch, self._place))
            if self._file >= len(files):
                self._place, self._file, self._offset = self._place + 1, 0, 0
                continue
            ids = self._read(files)
        self._ids = ids
        return ids

    def _read(self, files: range) -> np.ndarray:
        """The file under the cursor, of its document's `files`, up to the end of the stretch."""
        ids = self._source.read(files[self._file], epoch=self._epoch, opens_document=self._file == 0)
        self._opens = self._file == 0 or not (self._source.add_bos or self._any_tokens(files[: self._file]))
        # As a fill-in-the-middle example the file may be shorter than the one that was cut, or than in the other run.
        if (self._place, self._file, self._offset) in (self._begin, self._moved_to):
            self._offset = min(self._offset, len(ids))
        if (self._place, self._file) == self._end[:2]:
            ids = ids[: self._end[2]]
        if self._offset > len(ids):
            raise DataError(
                f"{self._source.dataset.prefix}: the data position is token {self._offset} of sequence "
                f"{files[self._file]}, which has {len(ids)}; is this a different dataset?"
            )
        return ids

    def _any_tokens(self, files: range) -> bool:
        return any(len(self._source.dataset.sequence(file)) for file in files)


class BestFit:
    """Best-fit decreasing. Its position: epoch and place of the group's first document, piece in it, window."""

    def __init__(
        self, source: EndlessDocuments, stream: int, *, seq_length: int, pad_id: int, epochs: int | None = None
    ) -> None:
        self._source, self._stream, self._size, self._pad_id = source, stream, seq_length, pad_id
        self._epochs = epochs
        self.order = Order(source)
        start, _ = self._stretch(0)
        self.move(0, *start, 0)

    def position(self) -> list[int]:
        return [*self._first, self._window]

    def move(self, *position: int, of_another_run: bool = False) -> None:
        *self._first, self._window = position
        self._windows: list[list[tuple[np.ndarray, int, int]]] = []  # pieces: ids of a document, and a range of them

    def fill(self, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        if not self._windows:
            self._next, self._windows = self._group()
            if self._window >= len(self._windows):
                raise DataError(
                    f"{self._source.dataset.prefix}: the data position is window {self._window} of a group of "
                    f"{len(self._windows)}; is this a different dataset?"
                )
        filled = 0
        for ids, start, stop in self._windows[self._window]:
            end = filled + stop - start
            tokens[filled:end] = ids[start:stop]
            labels[filled : end - 1] = tokens[filled + 1 : end]
            labels[end - 1] = ids[stop] if stop < len(ids) else IGNORE_INDEX
            starts[filled] = True
            filled = end
        if filled < len(tokens):
            tokens[filled:], labels[filled:] = self._pad_id, IGNORE_INDEX
            starts[filled] = True
        self._window += 1
        if self._window == len(self._windows):
            self.move(*self._next, 0)

    def _stretch(self, epoch: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Its ends as (place, piece): a piece goes to the stretch that has its first token."""
        start, stop = self._source.stretch(epoch, self._stream)
        return (start.place, start.offset // self._size), (stop.place, stop.offset // self._size)

    def _group(self) -> tuple[list[int], list[list[tuple[np.ndarray, int, int]]]]:
        """Where the next group begins, and this one's windows as pieces; after the last piece, a window of none."""
        size = self._size
        pieces: list[tuple[np.ndarray, int, int]] = []
        epoch, place, piece = self._first
        (_, end), total = self._stretch(epoch), 0
        while total < BEST_FIT_WINDOWS * size:
            if (place, piece) >= end:
                if epoch + 1 == self._epochs:
                    break
                epoch += 1
                (place, piece), end = self._stretch(epoch)
                continue
            ids = self._source.document(self.order(epoch, place), epoch=epoch)
            stop = min(len(ids), end[1] * size) if place == end[0] else len(ids)
            pieces += [(ids, at, min(at + size, len(ids))) for at in range(piece * size, stop, size)]
            total += max(0, stop - piece * size)
            place, piece = place + 1, 0
        windows = best_fit([stop - start for _, start, stop in pieces], size) or [[]]
        key = key_of(self._source.seed, self._stream, epoch, place, piece)
        order = permute(np.arange(len(windows)), len(windows), seed=key, epoch=0)
        return [epoch, place, piece], [[pieces[piece] for piece in windows[window]] for window in order.tolist()]


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Windows of at most `size` as lists of pieces, for pieces of these lengths, each from 1 to `size`."""
    windows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, window), in rising order
    for piece in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fullest = bisect_left(room, (lengths[piece], 0))
        if fullest < len(room):
            free, window = room.pop(fullest)
        else:
            free, window = size, len(windows)
            windows.append([])
        windows[window].append(piece)
        if free > lengths[piece]:
            insort(room, (free - lengths[piece], window))
    return windows
